"""Everything an evaluation works with, loaded and checked once: victims, tasks, defenses and attacks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from codefend.attacks import EVERY_ATTACK, NEEDS_SENTENCE, AttackSpec, TextAttackSpec
from codefend.bench.attacking import clean_images
from codefend.bench.config import AttackChoice, Case, DefenseChoice, EvalConfig, check
from codefend.bench.defenses import EvaluatedDefense, evaluated_defense
from codefend.bench.fingerprints import fingerprints
from codefend.bench.loaders import Loaders
from codefend.bench.tasks import EvaluatedTask, check_task, stratified
from codefend.core.devices import default_device
from codefend.prompts.policy import Policy, attach
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError, HasFeatures, Task, Victim, WhiteBox

TEXT_ONLY = ("answer", "answer-target")  # goals that need nothing but answers
FEATURES_ONLY = ("feature", "feature-target")  # goals that need no language-model loss


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
        return
    if isinstance(crafter, HasFeatures):
        raise CodefendError(
            f"victim {crafter.name!r} has features and no language-model loss, which {', '.join(blind)} "
            f"need{'s' * (len(blind) == 1)}: use attacks=feature"
        )
    able = ", ".join(sorted(name for name, spec in EVERY_ATTACK.items() if _needs_answers_only(spec)))
    raise CodefendError(
        f"victim {crafter.name!r} only answers text, and {', '.join(blind)} need{'s' * (len(blind) == 1)} a white "
        f"box: set craft_victim=pocket to transfer from another victim, or use {able}"
    )


def _can_attack(victim: Victim, spec: AttackSpec | TextAttackSpec) -> bool:
    if _needs_answers_only(spec) or isinstance(victim, WhiteBox):
        return True
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
