"""What to evaluate: the config that is saved next to the rows, and how its defenses and attacks are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from codefend.attacks import EVERY_ATTACK, AttackSpec, TextAttackSpec
from codefend.attacks.specs import HasRestarts
from codefend.core.compat import current_attack_options
from codefend.core.settings import override, recorded
from codefend.core.specs import literal, lookup, parse_encoders, parse_spec, split_specs
from codefend.types import Budget, CodefendError

# T0, oblivious: the attack goes through the bare victim. T1, transfer: through a surrogate defense. T2, adaptive white
# box: through the defense itself. T2d: also with the seed of the defense's noise.
Threat = Literal["T0", "T1", "T2", "T2d"]


class Case(NamedTuple):
    """A task by name, with its options, and the victim that is judged on it."""

    task: str
    victim: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation. Defenses and attacks may carry options: ``bridge:evaluations=2``, ``apgd:steps=50,restarts=3``.

    A defense may end in a prompt policy, ``bridge+prompt=doubt`` or ``none+prompt=policy.json``, and in a number of
    answers to vote on, ``bridge+votes=8``: an attacker at T2 knows all. With ``craft_victim`` every attack is a
    transfer (T1), whatever ``threats`` says: the images are made on that victim, behind ``surrogate`` if one is set,
    and judged on ``victim``, which may then be a black box. The defense ``none`` is the bare victim; all its rows are
    T0, as there is nothing to adapt to.

    Adaptive attacks, and their settings:

    - exact gradient through every network evaluation, fp32: ``threats=T2``; ``diffpure:checkpoint=true`` as the defense
      keeps the memory of one evaluation
    - expectation over its noise: ``eot=20``, or ``apgd:eot=20`` for one attack
    - BPDA, exact forward and identity backward: ``attacks=apgd:bpda=true``; the default where there is no gradient
    - surrogate process with fewer evaluations: ``attacks=apgd:process=1``
    - evasion of the purifier's detector: ``attacks=apgd:evade=10``
    - features through the purifier: ``attacks=feature,feature-target``
    - transfer from an independently trained copy: ``threats=T1 surrogate=FOLDER``
    - known seed: ``threats=T2d``

    Options combine (``apgd:bpda=true,evade=10``); the worst case over attacks takes each example's lowest score.

    >>> from codefend import EvalConfig
    >>> EvalConfig(defenses=("none", "bridge"), attacks=("apgd:steps=50",), eps=(4, 8), limit=64).threats
    ('T0', 'T2')
    """

    victim: str = "pocket"  # the model that answers
    craft_victim: str = ""  # the white box that attacks are made on; empty: the victim itself
    tasks: tuple[str, ...] = ("caption", "vqa")  # see `codefend list tasks`
    defenses: tuple[str, ...] = ("none", "jpeg", "diffpure", "bridge")  # none: undefended
    attacks: tuple[str, ...] = ("apgd", "apgd-targeted")  # see `codefend list attacks`
    eps: tuple[float, ...] = (8.0,)  # l-inf: in 1/255; l2: in pixel units
    norm: Literal["linf", "l2"] = "linf"  # linf or l2
    steps: int = 0  # gradient steps, or queries of a score attack; 0: each attack's usual number
    eot: int = 1  # gradient samples per step, where the attacked defense is randomized
    restarts: int = 1  # of the attacks that have restarts, best per example
    threats: tuple[Threat, ...] = ("T0", "T2")  # threat models: T0, T1, T2, T2d
    surrogate: str = ""  # the defense that T1 goes through
    split: str = "test"  # of the task's data
    limit: int | None = None  # examples per task, see `sample`; None: all
    adaptive: tuple[str, ...] = ()  # the defenses attacked at T2 and T2d; empty: all
    adaptive_limit: int | None = None  # examples per task at T2 and T2d, the first of the task's; None: as limit
    batch: int = 16  # examples attacked and answered at a time
    seed: int = 0  # of the attacks and of the defenses' noise
    resubmissions: int = 1  # N: how often the same image is submitted to a randomized defense
    skip_wrong: bool = True  # T2, untargeted: leave out images whose clean answer already scores 0
    panels: int = 3  # examples per task whose images are stored for the report, the first ones
    target: str = ""  # the sentence that targeted attacks force; empty: each task's own
    seen: tuple[str, ...] = ()  # attacks that the defenses were trained on; the report compares them with the others
    attacked: str = ""  # another run's folder: attacked images made there with the same settings are checked and reused
    # Fields from here on are saved only where they differ from their default, so that older runs can be resumed.
    sample: Literal["first", "strata"] = "first"  # which examples: the first, or in proportion of kind and objects

    def __post_init__(self) -> None:
        for name in ("tasks", "defenses", "attacks", "adaptive", "seen"):  # a spec with options arrives in pieces
            object.__setattr__(self, name, split_specs(getattr(self, name)))

    @property
    def cases(self) -> dict[str, Case]:
        """What is evaluated, by the label that rows have as their task."""
        specs = {task: parse_spec(task) for task in self.tasks}
        return {task: Case(spec.name, self.victim, dict(spec.options)) for task, spec in specs.items()}

    def radius(self, eps: float) -> float:
        """``eps`` of the list in pixel units."""
        return eps / 255 if self.norm == "linf" else eps

    def recorded(self) -> dict[str, object]:
        """The fields for the run's config.json, all those of a subclass among them."""
        own = [field.name for field in fields(self)][len(fields(EvalConfig)) :]
        return {**recorded(self, later="sample"), **{name: getattr(self, name) for name in own}}


@dataclass(frozen=True)
class TransferConfig(EvalConfig):
    """Attacks made on each of ``crafters``, oblivious of any defense, and judged on them all and on ``judges``.

    ``judges`` may be black boxes, such as ``openai:URL#model``. The other settings are those of each single run.
    """

    crafters: tuple[str, ...] = ("pocket",)
    judges: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeedsConfig(EvalConfig):
    """One evaluation repeated with other seeds of noise and attack, on the same examples; a run for each in the folder.

    Each example's score is averaged over the seeds. The report compares every defense with ``reference``, paired over
    examples, at a confidence that is corrected for the number of comparisons.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = "bridge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise CodefendError("seeds must name one number or more, each once")
        if self.reference not in self.defenses:
            raise CodefendError(f"reference names {self.reference!r}, which is not among the defenses")


@dataclass(frozen=True)
class PhotographsConfig(EvalConfig):
    """Photographs judged by image encoders: ``encoders`` are the victims, each with a task of its own in the rows.

    Every encoder is attacked on its own features. ``lite1@320`` sees each crop resized to 320 pixels, as models do
    whose preprocessing resizes. ``photographs`` is a folder of other photographs than the held-out ones.
    """

    victim: str = "encoders"
    tasks: tuple[str, ...] = ("photographs",)
    # DiffPure at its best t on the pocket's tasks, and in fewer steps.
    defenses: tuple[str, ...] = ("none", "jpeg", "diffpure:t=0.03", "diffpure:t=0.05,steps=5", "bridge")
    attacks: tuple[str, ...] = ("feature",)
    steps: int = 20
    limit: int | None = 32
    threats: tuple[Threat, ...] = ("T0",)
    batch: int = 8
    encoders: tuple[str, ...] = ("lite0", "lite2", "lite1")
    side: int = 224  # of a crop, in pixels
    photographs: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.victim != "encoders" or self.tasks != ("photographs",):
            raise CodefendError("photographs are judged by encoders: set encoders=lite1, and neither victim nor tasks")
        if not self.encoders:
            raise CodefendError("encoders is empty; name at least one")
        for label in self.encoders:
            parse_encoders(label)
        if self.side % 32 or self.side < 32:
            raise CodefendError(f"side must be a multiple of 32, got {self.side}")
        if self.adaptive and "T2" not in self.threats:  # naming defenses to attack adaptively asks for T2
            object.__setattr__(self, "threats", (*self.threats, "T2"))

    @property
    def cases(self) -> dict[str, Case]:
        """A case for each encoder."""
        options = {"side": self.side, "folder": self.photographs, "seed": self.seed}
        return {f"photographs {label}": Case("photographs", f"encoder:{label}", options) for label in self.encoders}


@dataclass(frozen=True)
class DefenseChoice:
    """A defense as spelled in the config: ``name`` is a purifier or a folder, ``options`` its keyword arguments.

    ``prompt`` is a prompt policy's name or file, "" for none.
    """

    label: str
    name: str
    options: dict[str, Any]
    prompt: str = ""
    votes: int = 1

    @classmethod
    def parse(cls, text: str) -> DefenseChoice:
        """Read ``name``, ``name:key=value,...`` and either with ``+prompt=POLICY`` and ``+votes=N`` behind it.

        Raises CodefendError for a malformed option or an empty policy.
        """
        spec = parse_spec(text)
        options = {key: literal(value) for key, value in spec.options.items()}
        return cls(text, spec.name, options, spec.prompt, spec.votes)


@dataclass(frozen=True)
class AdaptiveOptions:
    """How an attack goes through a defense (T2, T2d), other than along the exact gradient."""

    bpda: bool = False  # exact forward, identity backward (Athalye et al. 2018), also where there is a gradient
    process: int = 0  # purifier evaluations that the attack goes through, fewer than the defense's (Lee & Kim 2023)
    evade: float = 0.0  # weight of the purifier's detection score above its threshold, or above the clean image's


ADAPTIVE: tuple[str, ...] = ("bpda", "process", "evade")


@dataclass(frozen=True)
class AttackChoice:
    """An attack as spelled in the config, with the budget's and its own options."""

    label: str
    spec: AttackSpec | TextAttackSpec
    options: dict[str, str]  # fields of the attack, as text
    steps: int
    eot: int
    adaptive: AdaptiveOptions = AdaptiveOptions()

    @classmethod
    def parse(cls, text: str, config: EvalConfig) -> AttackChoice:
        """Read ``name`` or ``name:steps=50,...``. Raises CodefendError for an unknown attack or option."""
        parsed = parse_spec(text)
        name, options = parsed.name, current_attack_options(parsed.options)
        spec = lookup("attack", name, EVERY_ATTACK)
        if spec.goal == "hidden-image":
            raise CodefendError(f"{name} needs images larger than the victim's: run `python benchmarks/scaling.py`")
        if isinstance(_built(spec), HasRestarts):
            options = {"restarts": str(config.restarts), **options}
        adaptive = {key: options.pop(key) for key in ADAPTIVE if key in options}
        steps = _whole(options.pop("steps", str(config.steps or spec.steps)), f"{name}:steps")
        eot = _whole(options.pop("eot", str(config.eot)), f"{name}:eot")
        choice = cls(text, spec, options, steps, eot, override(AdaptiveOptions(), adaptive))
        if choice.adaptive.evade and isinstance(spec, TextAttackSpec):
            raise CodefendError(f"{name}: evade is for attacks on the image alone, and {name} changes the text")
        choice.build()  # a wrong option fails now, not hours later
        return choice

    def build(self, say: str = "") -> Any:
        """A fresh `Attack` or `TextAttack` with its options set; ``say`` is the sentence that a text attack plants."""
        attack = _built(self.spec, say)
        return override(attack, self.options) if self.options else attack

    def describe(self) -> dict[str, Any]:
        """The attack's entry in ``bench.json``."""
        spec = self.spec
        return {
            "steps": self.steps,
            "summary": spec.summary,
            "source": spec.source,
            "threat": spec.threat,
            "goal": spec.goal,
        }

    def budget(self, config: EvalConfig, eps: float, *, randomized: bool) -> Budget:
        """The budget at ``eps`` of the config's list; samples are averaged only where they differ.

        An attack with a bound of its own has ``eps`` 0 in the rows, and ignores the budget's.
        """
        return Budget(config.norm, config.radius(eps or config.eps[0]), self.steps, self.eot if randomized else 1)


def _built(spec: AttackSpec | TextAttackSpec, say: str = "") -> Any:
    return spec.build(say) if isinstance(spec, TextAttackSpec) else spec.build()


def check(config: EvalConfig) -> None:
    """Raise CodefendError for a setting that no evaluation can have."""
    for name in ("tasks", "defenses", "attacks", "eps", "threats"):
        values = getattr(config, name)
        if not values:
            raise CodefendError(f"{name} is empty; name at least one")
        if len(set(values)) < len(values):
            raise CodefendError(f"{name} names something twice: {', '.join(map(str, values))}")
    for name in ("batch", "resubmissions", "eot", "restarts"):
        if getattr(config, name) < 1:
            raise CodefendError(f"{name} must be 1 or more, not {getattr(config, name)}")
    for eps in config.eps:
        check_radius(eps, config.norm)
    stray = set(config.adaptive) - set(config.defenses)
    if stray:
        raise CodefendError(f"adaptive names {sorted(stray)[0]!r}, which is not among the defenses; set adaptive, too")
    if "T1" in config.threats and not config.surrogate and not config.craft_victim:
        raise CodefendError("threat T1 transfers from a surrogate: set surrogate=DEFENSE or craft_victim=VICTIM")
    if config.craft_victim == config.victim:
        raise CodefendError(f"craft_victim is the victim {config.victim!r} itself; leave it out")
    unknown = set(config.seen) - set(config.attacks)
    if unknown:
        raise CodefendError(f"seen names {sorted(unknown)[0]!r}, which is not among the attacks")


def check_radius(eps: float, norm: Literal["linf", "l2"] = "linf") -> None:
    """Raise CodefendError for a radius, l-inf in 1/255 and l2 in pixel units, that no attack can have."""
    if not 0 < eps < math.inf:
        raise CodefendError(f"eps must be above 0 and finite, not {eps:g}; the clean images are always judged")
    if norm == "linf" and eps < 0.1:
        raise CodefendError(f"l-inf eps is counted in 1/255: write {eps * 255:g}, not {eps:g}")


def _whole(text: str, what: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise CodefendError(f"{what} must be a whole number of 1 or more, not {text!r}")
    return int(text)
