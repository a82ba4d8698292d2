"""Everything an evaluation works with, loaded and checked once: victims, tasks, defenses and attacks.

Defenses come with measurements of their randomness, gradient and cost. Fingerprints name the weights of a config: a
folder that is still being trained, or was calibrated again, would mix rows of two networks in one figure.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from codefend.attacks import EVERY_ATTACK, NEEDS_SENTENCE, AttackSpec, TextAttackSpec
from codefend.attacks.objectives import check_capability
from codefend.bench.attacking import clean_images
from codefend.bench.config import AttackChoice, Case, DefenseChoice, EvalConfig, check
from codefend.bench.results import BARE
from codefend.bench.tasks import EvaluatedTask, check_task, stratified
from codefend.core.assets import find_asset
from codefend.core.devices import default_device
from codefend.core.seeds import make_generator
from codefend.core.specs import parse_spec
from codefend.defense import Defense, StraightThrough
from codefend.prompts.policy import Policy, attach
from codefend.purifiers import FORMER, PURIFIERS
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError, HasFeatures, HasLoss, Task, Victim, WhiteBox

TEXT_ONLY = ("answer", "answer-target")  # goals that need nothing but answers
FEATURES_ONLY = ("feature", "feature-target")  # goals that need no language-model loss
LOSS_ONLY = ("untargeted", "targeted")  # goals that need no features
FINGERPRINT_CHUNK = 1 << 20  # bytes; larger files are read at both ends only, which new weights change


def _victim(name: str) -> Victim:
    from codefend.victims import load

    return load(name)


def _task(name: str, split: str, limit: int | None, **options: Any) -> Task:
    from codefend.tasks import load

    return load(name, split=split, limit=limit, **options)


def _purifier(name: str, **options: Any) -> Purifier:
    from codefend.purifiers import load

    return load(name, **options)


def _policy(name: str) -> Callable[[str], str]:
    from codefend.prompts import load_any

    return load_any(name)


@dataclass(frozen=True)
class Loaders:
    """One function for each kind of object; the defaults look names up in the registries."""

    victim: Callable[[str], Victim] = _victim
    task: Callable[..., Task] = _task  # (name, split, limit, **options)
    purifier: Callable[..., Purifier] = _purifier  # (name, **options)
    policy: Callable[[str], Callable[[str], str]] = _policy  # name or file of a prompt policy


@dataclass(frozen=True)
class EvaluatedDefense:
    """A defense with its measurements, made once per evaluation."""

    label: str
    defense: Defense
    randomized: bool
    gradient: str  # "exact", "straight-through" (BPDA), or "none needed" for the undefended victim
    cost: dict[str, Any]

    @property
    def differentiable(self) -> Defense:
        """The same function with a gradient, for white-box attacks: its own, or the identity's where it has none."""
        purifier = self.defense.purifier
        if purifier is None or self.gradient == "exact":
            return self.defense
        return replace(self.defense, purifier=StraightThrough(purifier))


@dataclass(frozen=True)
class Bench:
    """What was loaded for a config. Victims belong to the tasks: most configs have one victim for all."""

    config: EvalConfig
    tasks: dict[str, EvaluatedTask]
    defenses: dict[str, EvaluatedDefense]
    surrogate: EvaluatedDefense | None
    attacks: dict[str, AttackChoice]
    shorter: dict[tuple[str, int], Purifier]  # defense and evaluations: what an attack with ``process`` goes through

    def describe(self) -> dict[str, Any]:
        """What ``bench.json`` records for the report: all that the rows don't say."""
        costs = [
            {"defense": d.label, "randomized": d.randomized, "gradient": d.gradient, **d.cost}
            for d in self.defenses.values()
        ]
        return {
            "victim": ", ".join(dict.fromkeys(task.victim.name for task in self.tasks.values())),
            "crafted_on": ", ".join(dict.fromkeys(task.crafter.name for task in self.tasks.values())),
            "tasks": {label: task.describe() for label, task in self.tasks.items()},
            "costs": costs,
            "attacks": {label: choice.describe() for label, choice in self.attacks.items()},
            "prompts": self.prompts(),
            "weights": self.weights(),
        }

    def weights(self) -> dict[str, str]:
        """Fingerprints of the weights of defenses and victims, as far as they lie in folders on this machine."""
        config = self.config
        labels = [*config.defenses, *([config.surrogate] if config.surrogate else [])]
        purifiers = [DefenseChoice.parse(label).name for label in labels]
        return fingerprints([*purifiers, *(case.victim for case in config.cases.values()), config.craft_victim])

    def prompts(self) -> dict[str, str]:
        """Fingerprints of the defenses' prompt policies."""
        policies = {label: defense.defense.policy for label, defense in self.defenses.items()}
        return {label: policy.key for label, policy in policies.items() if isinstance(policy, Policy)}


def open_bench(config: EvalConfig, loaders: Loaders | None = None) -> Bench:
    """Load everything, the cheap things first. Raises CodefendError for what cannot be evaluated."""
    loaders = loaders or Loaders()
    check(config)
    attacks = {label: AttackChoice.parse(label, config) for label in config.attacks}
    tasks = {label: load_task(config, case, loaders) for label, case in config.cases.items()}
    check_targets(tasks, attacks)
    probe = clean_images([next(iter(tasks.values())).examples[0]]).to(default_device())
    defenses = {label: evaluated_defense(label, loaders, probe, config.seed) for label in config.defenses}
    surrogate = evaluated_defense(config.surrogate, loaders, probe, config.seed) if config.surrogate else None
    names = [case.victim for case in config.cases.values()]
    victims = {name: loaders.victim(name) for name in dict.fromkeys(names)}
    crafters = victims
    if config.craft_victim:
        crafters = dict.fromkeys(names, loaders.victim(config.craft_victim))
    for victim in crafters.values():
        check_access(victim, attacks)
    for victim in (*victims.values(), *crafters.values()):
        for evaluated in (*defenses.values(), *([surrogate] if surrogate else [])):
            attach(victim, evaluated.defense.policy)  # a soft prefix of another victim fails now
    evaluated_tasks = {
        label: EvaluatedTask.of(tasks[label], victims[case.victim], crafters[case.victim])
        for label, case in config.cases.items()
    }
    shorter = shortened(defenses, attacks)
    return Bench(config, evaluated_tasks, defenses, surrogate, attacks, shorter)


def load_task(config: EvalConfig, case: Case, loaders: Loaders) -> Task:
    """The task of a case: its first examples, or a stratified subset, with the config's target sentence if it has one.

    Raises CodefendError as `check_task` does, and when a metric's package is missing.
    """
    if config.sample == "strata":
        task = stratified(loaders.task(case.task, config.split, None, **case.options), config.limit)
    else:
        task = loaders.task(case.task, config.split, config.limit, **case.options)
    check_task(task)
    for metric in task.metrics.values():
        metric([""], [task.examples[0]])
    return replace(task, target=config.target or task.target)


def check_targets(tasks: Mapping[str, Task], attacks: Mapping[str, AttackChoice]) -> None:
    """Raise CodefendError for a targeted attack on a task without a target sentence."""
    targeted = [label for label, choice in attacks.items() if choice.spec.goal in NEEDS_SENTENCE]
    untargetable = [label for label, task in tasks.items() if not task.target]
    if targeted and untargetable:
        raise CodefendError(
            f"attack {targeted[0]!r} needs a target sentence, and task {untargetable[0]!r} has none; "
            "set target=SENTENCE"
        )


def check_access(crafter: Victim, attacks: Mapping[str, AttackChoice]) -> None:
    """Raise CodefendError naming the attacks that need more of ``crafter`` than it offers."""
    blind = [label for label, choice in attacks.items() if not _can_attack(crafter, choice.spec)]
    if not blind:
        for choice in attacks.values():
            check_capability(choice.spec, crafter)
        return
    for capability, part, other, able in (
        (HasFeatures, "features", "language-model loss", "feature"),
        (HasLoss, "a language-model loss", "features", "apgd"),
    ):
        if isinstance(crafter, capability):
            raise CodefendError(
                f"victim {crafter.name!r} has {part} and no {other}, which {', '.join(blind)} "
                f"need{'s' * (len(blind) == 1)}: use attacks={able}"
            )
    able = ", ".join(sorted(name for name, spec in EVERY_ATTACK.items() if _needs_answers_only(spec)))
    raise CodefendError(
        f"victim {crafter.name!r} only answers text, and {', '.join(blind)} need{'s' * (len(blind) == 1)} a white "
        f"box: set craft_victim=pocket to transfer from another victim, or use {able}"
    )


def _can_attack(victim: Victim, spec: AttackSpec | TextAttackSpec) -> bool:
    if _needs_answers_only(spec) or isinstance(victim, WhiteBox):
        return True
    if spec.goal in LOSS_ONLY:
        return isinstance(victim, HasLoss)
    return spec.goal in FEATURES_ONLY and isinstance(victim, HasFeatures)


def _needs_answers_only(spec: AttackSpec | TextAttackSpec) -> bool:
    return spec.goal in TEXT_ONLY or (isinstance(spec, TextAttackSpec) and spec.threat == "score")


def shortened(
    defenses: Mapping[str, EvaluatedDefense], attacks: Mapping[str, AttackChoice]
) -> dict[tuple[str, int], Purifier]:
    """The purifiers of defenses (bridge, diffpure) with fewer evaluations, for attacks with ``process``."""
    purifiers: dict[tuple[str, int], Purifier] = {}
    counts = {choice.adaptive.process for choice in attacks.values()} - {0}
    for label, evaluations in product(defenses, counts):
        purifier = defenses[label].defense.purifier
        if purifier is not None and purifier.evaluations > evaluations:
            with suppress(CodefendError):  # its number is fixed, or a gate would be left without its detector
                purifiers[label, evaluations] = purifier.replace(evaluations=evaluations)
    return purifiers


# --- defenses --------------------------------------------------------------------------------------------------------


def load_defense(label: str, loaders: Loaders) -> Defense:
    """The defense ``label`` as a config spells it: a purifier with options, ``+prompt=POLICY``, or both.

    Raises CodefendError for a malformed label, an unknown name or an option that it doesn't have.
    """
    choice = DefenseChoice.parse(label)
    policy = loaders.policy(choice.prompt) if choice.prompt else None
    purifier = None if choice.name == BARE else loaders.purifier(choice.name, **choice.options)
    return Defense(purifier, policy, label, choice.votes)


def evaluated_defense(label: str, loaders: Loaders, image: Tensor, seed: int = 0) -> EvaluatedDefense:
    """Load a defense and measure on ``image`` ``[1, 3, H, W]`` whether it is random and differentiable, and its cost.

    What a purifier declares (``stochastic``, ``differentiable``) counts only where it makes the attack stronger.
    """
    defense = load_defense(label, loaders)
    purifier = defense.purifier
    if purifier is None:
        gradient = "exact" if defense.policy else "none needed"
        return EvaluatedDefense(label, defense, False, gradient, _cost(None, image, seed))
    randomized = purifier.stochastic or is_random(purifier, image, seed)
    exact = purifier.differentiable and has_gradient(purifier, image, seed)
    gradient = "exact" if exact else "straight-through"
    cost = _cost(purifier, image, seed)
    for column in ("ms_per_image", "multiply_adds", "evaluations"):
        cost[column] *= defense.votes
    return EvaluatedDefense(label, defense, randomized, gradient, cost)


def is_random(purifier: Purifier, image: Tensor, seed: int) -> bool:
    """Whether two draws of noise give two images."""
    with torch.no_grad():
        first, second = (purifier(image, generator=make_generator(seed, "probe", i)) for i in range(2))
    return not torch.equal(first, second)


def has_gradient(purifier: Purifier, image: Tensor, seed: int) -> bool:
    """Whether a gradient reaches the input that isn't zero everywhere (rounding has one that is)."""
    image = image.clone().requires_grad_(True)
    with torch.enable_grad():
        purified = purifier(image, generator=make_generator(seed, "probe"))
        if not purified.requires_grad:
            return False
        weights = torch.rand(purified.shape, generator=make_generator(seed, "weights")).to(purified)
        (gradient,) = torch.autograd.grad((purified * weights).sum(), image, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def _cost(purifier: Purifier | None, image: Tensor, seed: int) -> dict[str, Any]:
    """Milliseconds (median of three after a warm-up) and multiply-adds for one image."""
    size = [int(image.shape[2]), int(image.shape[3])]
    if purifier is None:
        return {"ms_per_image": 0.0, "multiply_adds": 0, "evaluations": 0, "size": size}
    generator = make_generator(seed, "cost")
    with torch.no_grad():
        purifier(image, generator=generator)
        times = [_seconds(purifier, image, generator) for _ in range(3)]
    return {
        "ms_per_image": sorted(times)[1] * 1000,
        "multiply_adds": purifier.multiply_adds(*size),
        "evaluations": purifier.evaluations,
        "size": size,
        "threshold": None if purifier.detector is None else purifier.detector.limit,  # of `craft.detection_score`
    }


def _seconds(purifier: Purifier, image: Tensor, generator: Generator) -> float:
    start = time.perf_counter()
    purifier(image, generator=generator).cpu()  # waits for a GPU
    return time.perf_counter() - start


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprints(names: Iterable[str]) -> dict[str, str]:
    """The fingerprint of each purifier or victim, as a config spells it, whose weights are in a local folder."""
    folders = {name: _folder(name) for name in names}
    return {name: _fingerprint(folder) for name, folder in folders.items() if folder is not None}


def check_unchanged(run_dir: Path, before: Mapping[str, str], now: Mapping[str, str], *, what: str = "weights") -> None:
    """Raise CodefendError naming the first of ``now`` whose fingerprint differs from the run's."""
    changed = [name for name, key in now.items() if before.get(name, key) != key]
    if changed:
        raise CodefendError(f"the {what} of {changed[0]!r} changed since {run_dir} began; use another folder")


def _folder(name: str) -> Path | None:
    """Where the weights of ``FOLDER``, ``FOLDER:options``, ``hf:FOLDER`` or a shipped name lie; None for others."""
    while name:
        for text in filter(None, (name, name.partition(":")[2])):
            shipped = parse_spec(FORMER[text]).name if text in FORMER else text
            places = find_asset(f"weights/{shipped}"), None if text in PURIFIERS else Path(text)  # as `load` does
            for place in filter(None, places):
                if place.is_dir():
                    return place
        name = name.rpartition(":")[0]
    return None


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(FINGERPRINT_CHUNK))
            if size > FINGERPRINT_CHUNK:
                stream.seek(-FINGERPRINT_CHUNK, 2)
                digest.update(stream.read(FINGERPRINT_CHUNK))
    return digest.hexdigest()[:16]
