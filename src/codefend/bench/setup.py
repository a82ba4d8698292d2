"""What an evaluation works with: the loaded victim, tasks, defenses and attacks, and what is known about each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice, product
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.flop_counter import FlopCounterMode

from codefend.attacks import EVERY_ATTACK, NEEDS_SENTENCE, AttackSpec, TextAttackSpec
from codefend.bench.config import AttackChoice, DefenseChoice, EvalConfig, check
from codefend.bench.frozen import fingerprints
from codefend.bench.results import BARE
from codefend.core.devices import default_device
from codefend.core.images import quantize8
from codefend.core.runs import make_generator
from codefend.defense import Defense, StraightThrough
from codefend.prompts.asking import Policy, prompted
from codefend.tasks.metrics import attack_success, cider_d, document_frequencies
from codefend.types import CodefendError, Example, Metric, Purifier, Task, Victim, WhiteBox

TEXT_ONLY = ("answer", "answer-target")  # goals that need nothing but answers
RIGHT_OR_WRONG = ("all_tags", "vqa_accuracy", "exact_match")  # metrics in [0, 1] that say whether an answer is right


def _victim(name: str) -> Victim:
    from codefend.victims import load

    return load(name)


def _task(name: str, split: str, limit: int | None) -> Task:
    from codefend.tasks import load

    return load(name, split=split, limit=limit)


def _purifier(name: str, **options: Any) -> Purifier:
    from codefend.purifiers import load

    return load(name, **options)


def _policy(name: str) -> Callable[[str], str]:
    from codefend.prompts import load_any

    return load_any(name)


@dataclass(frozen=True)
class Loaders:
    """Where names become things; the defaults are the registries."""

    victim: Callable[[str], Victim] = _victim
    task: Callable[[str, str, int | None], Task] = _task  # (name, split, limit)
    purifier: Callable[..., Purifier] = _purifier  # (name, **options)
    policy: Callable[[str], Callable[[str], str]] = _policy  # name or file of a prompt policy


@dataclass(frozen=True)
class Examined:
    """A task with what judging needs: all its metrics per example, ids, and batches of one picture size."""

    task: Task
    metrics: dict[str, Metric]
    ids: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, task: Task) -> Examined:
        """Look through the examples once. Raises CodefendError for no examples, a repeated id or a missing answer."""
        ids, sizes, references = [], [], []
        for example in task.examples:
            ids.append(example.id)
            sizes.append((int(example.image.shape[1]), int(example.image.shape[2])))
            references.append(example.references)
            if not example.references:
                raise CodefendError(f"task {task.name!r}: example {example.id!r} has no reference answer")
        if not ids:
            raise CodefendError(f"task {task.name!r} has no examples")
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise CodefendError(f"task {task.name!r} has two examples called {twice[0]!r}")
        # Left alone, CIDEr-D would take its document frequencies from each batch.
        bound = partial(cider_d, frequencies=document_frequencies(references))
        metrics = {name: bound if metric is cider_d else metric for name, metric in task.metrics.items()}
        return cls(task, metrics, tuple(ids), tuple(sizes))

    def batches(self, size: int, limit: int | None) -> list[list[int]]:
        """Indices in order, ``size`` at a time, pictures of one size in each."""
        batches: list[list[int]] = []
        for index in islice(range(len(self.ids)), limit):
            if batches and len(batches[-1]) < size and self.sizes[batches[-1][0]] == self.sizes[index]:
                batches[-1].append(index)
            else:
                batches.append([index])
        return batches

    def examples(self, indices: Sequence[int]) -> list[Example]:
        return [self.task.examples[index] for index in indices]

    @cached_property
    def judge(self) -> str:
        """The metric that says whether an answer is right."""
        return next((name for name in RIGHT_OR_WRONG if name in self.metrics), self.task.headline)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
        return {name: metric(answers, examples) for name, metric in self.metrics.items()}

    def broken(self, clean: Tensor, attacked: Tensor) -> Tensor:
        """Untargeted success, ``[B]``: right became wrong; nan outside the denominator.

        Where no metric says right or wrong, a caption is right from CIDEr-D 0.1 (papers print 10) and broken when half
        of its score is gone.
        """
        if self.judge in RIGHT_OR_WRONG:
            return attack_success(clean, attacked)
        outside = ~(clean >= 0.1) | attacked.isnan()
        return (attacked < clean / 2).float().masked_fill(outside, float("nan"))


@dataclass(frozen=True)
class Contender:
    """A defense under evaluation. ``adaptive`` is what a white-box attack differentiates: the same function."""

    label: str
    defense: Defense
    randomized: bool
    gradient: str  # "exact", "straight-through" (BPDA), or "none needed" for the bare victim
    cost: dict[str, Any]

    @property
    def adaptive(self) -> Defense:
        purifier = self.defense.purifier
        if purifier is None or self.gradient == "exact":
            return self.defense
        return Defense(StraightThrough(purifier), self.defense.policy, self.label)


@dataclass(frozen=True)
class Bench:
    """Everything loaded and looked at once. ``victim`` answers; attacks are made on ``crafter``, mostly the same."""

    config: EvalConfig
    victim: Victim
    crafter: Victim
    tasks: dict[str, Examined]
    contenders: dict[str, Contender]
    surrogate: Contender | None
    attacks: dict[str, AttackChoice]
    shorter: dict[tuple[str, int], Purifier]  # defense and evaluations: what an attack with ``process`` goes through

    def describe(self) -> dict[str, Any]:
        """What the report needs and the rows don't say."""
        tasks = {
            name: {
                "headline": known.task.headline,
                "judge": known.judge,
                "target": known.task.target,
                "description": known.task.description,
                "licence": known.task.licence,
                "examples": len(known.ids),
            }
            for name, known in self.tasks.items()
        }
        costs = [
            {"defense": c.label, "randomized": c.randomized, "gradient": c.gradient, **c.cost}
            for c in self.contenders.values()
        ]
        attacks = {label: {"steps": choice.steps, **_spec(choice)} for label, choice in self.attacks.items()}
        return {
            "victim": self.victim.name,
            "crafted_on": self.crafter.name,
            "tasks": tasks,
            "costs": costs,
            "attacks": attacks,
            "prompts": self.prompts(),
            "weights": self.weights(),
        }

    def weights(self) -> dict[str, str]:
        """Fingerprints of the weights behind defenses and victims, as far as they lie in folders here."""
        config = self.config
        labels = [*config.defenses, *([config.surrogate] if config.surrogate else [])]
        purifiers = [DefenseChoice.parse(label).name for label in labels]
        return fingerprints([*purifiers, config.victim, config.craft_victim])

    def prompts(self) -> dict[str, str]:
        """Fingerprints of the defenses' prompt policies: what is evaluated must not change on the way."""
        policies = {label: known.defense.policy for label, known in self.contenders.items()}
        return {label: policy.key for label, policy in policies.items() if isinstance(policy, Policy)}


def _spec(choice: AttackChoice) -> dict[str, str]:
    spec = asdict(choice.spec)
    return {key: spec[key] for key in ("summary", "source", "threat", "goal")}


def open_bench(config: EvalConfig, loaders: Loaders | None = None) -> Bench:
    """Load everything, the cheap things first. Raises CodefendError for what cannot be evaluated."""
    loaders = loaders or Loaders()
    check(config)
    attacks = {label: AttackChoice.parse(label, config) for label in config.attacks}
    loaded = {name: loaders.task(name, config.split, config.limit) for name in config.tasks}
    tasks = {name: Examined.of(replace(t, target=config.target or t.target)) for name, t in loaded.items()}
    for name, known in tasks.items():
        known.score([""], known.examples([0]))  # a metric whose package is missing fails now
        targeted = [label for label, choice in attacks.items() if choice.spec.goal in NEEDS_SENTENCE]
        if targeted and not known.task.target:
            raise CodefendError(f"attack {targeted[0]!r} needs a target sentence, and task {name!r} has none")
    probe = _picture(next(iter(tasks.values()))).to(default_device())
    contenders = {label: contender(label, loaders, probe, config.seed) for label in config.defenses}
    surrogate = contender(config.surrogate, loaders, probe, config.seed) if config.surrogate else None
    victim = loaders.victim(config.victim)
    crafter = loaders.victim(config.craft_victim) if config.craft_victim else victim
    check_access(crafter, attacks)
    for policy in [known.defense.policy for known in (*contenders.values(), *([surrogate] if surrogate else []))]:
        prompted(crafter, policy), prompted(victim, policy)  # a soft prefix of another victim fails now
    return Bench(
        config, victim, crafter, tasks, contenders, surrogate, attacks, shortened(contenders, attacks, loaders)
    )


def check_access(crafter: Victim, attacks: dict[str, AttackChoice]) -> None:
    """Raise CodefendError naming the attacks that ``crafter`` shows too little for: it only answers text."""
    blind = [label for label, choice in attacks.items() if not _needs_answers_only(choice.spec)]
    if blind and not isinstance(crafter, WhiteBox):
        able = ", ".join(sorted(name for name, spec in EVERY_ATTACK.items() if _needs_answers_only(spec)))
        raise CodefendError(
            f"victim {crafter.name!r} only answers text, and {', '.join(blind)} need{'s' * (len(blind) == 1)} a white "
            f"box: set craft_victim=pocket to transfer from another victim, or use {able}"
        )


def _needs_answers_only(spec: AttackSpec | TextAttackSpec) -> bool:
    return spec.goal in TEXT_ONLY or (isinstance(spec, TextAttackSpec) and spec.threat == "score")


def shortened(
    contenders: Mapping[str, Contender], attacks: Mapping[str, AttackChoice], loaders: Loaders
) -> dict[tuple[str, int], Purifier]:
    """The purifiers that take fewer evaluations when told so (bridge, diffpure), as attacks with ``process`` ask."""
    found: dict[tuple[str, int], Purifier] = {}
    wanted = {choice.means.process for choice in attacks.values()} - {0}
    for label, evaluations in product(contenders, wanted):
        choice, own = DefenseChoice.parse(label), contenders[label].cost.get("evaluations") or 0
        for key in ("evaluations", "steps") if own > evaluations else ():
            try:
                shorter = loaders.purifier(choice.name, **{**choice.options, key: evaluations})
            except (CodefendError, TypeError):
                continue
            if getattr(shorter, "evaluations", own) == evaluations:
                found[label, evaluations] = shorter
    return found


def _picture(known: Examined) -> Tensor:
    return quantize8(known.task.examples[0].image)[None]


def contender(label: str, loaders: Loaders, picture: Tensor, seed: int = 0) -> Contender:
    """Load a defense and find out, on ``picture`` ``[1, 3, H, W]``, whether it is random, differentiable, and its cost.

    What a purifier declares (``stochastic``, ``differentiable``) is believed only where it makes the attack stronger.
    """
    choice = DefenseChoice.parse(label)
    policy = loaders.policy(choice.prompt) if choice.prompt else None
    if choice.name == BARE:
        gradient = "exact" if policy else "none needed"
        return Contender(label, Defense(None, policy, label), False, gradient, _cost(None, picture, seed))
    purifier = loaders.purifier(choice.name, **choice.options)
    randomized = bool(getattr(purifier, "stochastic", False)) or is_random(purifier, picture, seed)
    exact = getattr(purifier, "differentiable", True) and has_gradient(purifier, picture, seed)
    gradient = "exact" if exact else "straight-through"
    return Contender(label, Defense(purifier, policy, label), randomized, gradient, _cost(purifier, picture, seed))


def is_random(purifier: Purifier, picture: Tensor, seed: int) -> bool:
    """Whether two draws of noise give two pictures."""
    with torch.no_grad():
        first, second = (purifier(picture, generator=make_generator(seed, "probe", i)) for i in range(2))
    return not torch.equal(first, second)


def has_gradient(purifier: Purifier, picture: Tensor, seed: int) -> bool:
    """Whether a gradient reaches the input that isn't zero everywhere (rounding has one that is)."""
    picture = picture.clone().requires_grad_(True)
    with torch.enable_grad():
        purified = purifier(picture, generator=make_generator(seed, "probe"))
        if not purified.requires_grad:
            return False
        weights = torch.rand(purified.shape, generator=make_generator(seed, "weights")).to(purified)
        (gradient,) = torch.autograd.grad((purified * weights).sum(), picture, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def _cost(purifier: Purifier | None, picture: Tensor, seed: int) -> dict[str, Any]:
    """Milliseconds (median of three after a warm-up) and multiply-adds for one picture."""
    size = [int(picture.shape[2]), int(picture.shape[3])]
    if purifier is None:
        return {"ms_per_image": 0.0, "multiply_adds": 0, "evaluations": 0, "size": size}
    generator = make_generator(seed, "cost")
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            purifier(picture, generator=generator)
        times = [_seconds(purifier, picture, generator) for _ in range(3)]
    evaluations, count = getattr(purifier, "evaluations", None), getattr(purifier, "multiply_adds", None)
    # Counted from what ran where the purifier can't say: convolutions and matrix products, two flops each.
    adds = count(*size) if callable(count) else counter.get_total_flops() // 2
    return {
        "ms_per_image": sorted(times)[1] * 1000,
        "multiply_adds": int(adds),
        "evaluations": int(evaluations) if isinstance(evaluations, int) else None,
        "size": size,
    }


def _seconds(purifier: Purifier, picture: Tensor, generator: Generator) -> float:
    start = time.perf_counter()
    purifier(picture, generator=generator).cpu()  # waits for a GPU
    return time.perf_counter() - start
