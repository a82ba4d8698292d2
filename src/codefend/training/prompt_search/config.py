"""The settings of ``codefend optimize-prompt``, and which of them no search can have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from codefend import prompts
from codefend.prompts.generator import GeneratorConfig
from codefend.prompts.gepa_search import GepaConfig
from codefend.prompts.proposers import Endpoint
from codefend.prompts.soft import MAX_TOKENS, SoftConfig
from codefend.training.prompt_search.bank import BankConfig, check_attack, check_families
from codefend.types import CodefendError


@dataclass(frozen=True)
class SearchConfig:
    """Everything that decides a search. ``clean_cost`` and ``more_refusals``: what the chosen policy may cost."""

    victim: str = "pocket"
    method: Literal["gepa", "soft", "generator"] = "gepa"
    surrogate: str = ""  # white box that makes the attacked pictures; empty: the victim
    seed: int = 0
    batch: int = 8  # answers at a time
    clean_cost: float = 0.01
    more_refusals: float = 0.01
    bank: BankConfig = field(default_factory=BankConfig)
    gepa: GepaConfig = field(default_factory=GepaConfig)
    soft: SoftConfig = field(default_factory=SoftConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


def check(config: SearchConfig) -> None:
    """Raise CodefendError for a setting that no search can have: all before the first picture is attacked."""
    for name, value, least in _whole_numbers(config):
        if value < least:
            raise CodefendError(f"{name} must be {least} or more, not {value}")
    bank = config.bank
    if not bank.tasks or not bank.seen or not bank.held_out:
        raise CodefendError("bank.tasks, bank.seen and bank.held_out must each name something")
    both = set(bank.seen) & set(bank.held_out)
    if both:
        raise CodefendError(f"{sorted(both)[0]!r} is in bank.seen and in bank.held_out; selection needs other attacks")
    check_families((*bank.seen, *bank.held_out))
    check_attack(bank.attack, "bank.attack")
    if config.method == "gepa":
        _check_gepa(config)
    if config.method == "soft" and config.soft.tokens > MAX_TOKENS:
        raise CodefendError(f"soft.tokens must be 1 to {MAX_TOKENS}, not {config.soft.tokens}")


def _whole_numbers(config: SearchConfig) -> list[tuple[str, int, int]]:
    """Names, values and the least value of each."""
    bank, gepa, soft, generator = config.bank, config.gepa, config.soft, config.generator
    return [
        ("batch", config.batch, 1),
        ("bank.search_scenes", bank.search_scenes, 1),
        ("bank.selection_scenes", bank.selection_scenes, 1),
        ("gepa.evaluations", gepa.evaluations, 1),
        ("gepa.minibatch", gepa.minibatch, 1),
        ("soft.tokens", soft.tokens, 1),
        ("soft.batch", soft.batch, 1),
        ("soft.steps", soft.steps, 1),
        ("soft.check_every", soft.check_every, 1),
        ("generator.rank", generator.rank, 1),
        ("generator.tokens", generator.tokens, 1),
        ("generator.steps", generator.steps, 1),
        ("generator.check_every", generator.check_every, 1),
        ("generator.samples", generator.samples, 0),
        ("generator.bank", generator.bank, 0),
        ("generator.pictures", generator.pictures, 1),
    ]


def _check_gepa(config: SearchConfig) -> None:
    gepa = config.gepa
    if set(gepa.components) - {"system", "prefix", "suffix"} or not gepa.components:
        raise CodefendError("gepa.components must name some of system, prefix, suffix")
    if gepa.proposer.startswith(("http://", "https://")):
        Endpoint(gepa.proposer, gepa.model)
    elif gepa.proposer not in ("operators", "local"):
        raise CodefendError(f"gepa.proposer is {gepa.proposer!r}: operators, local, or an address (http...)")
    seed_policy(config)


def seed_policy(config: SearchConfig) -> prompts.PromptPolicy:
    """Where GEPA starts. Raises CodefendError for an unknown or a learned policy."""
    policy = prompts.load_any(config.gepa.seed_policy)
    if not isinstance(policy, prompts.PromptPolicy):
        raise CodefendError(f"gepa.seed_policy must be words, and {config.gepa.seed_policy!r} was learned")
    return policy
