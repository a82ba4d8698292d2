"""The settings of ``codefend optimize-prompt``, and their validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from codefend import prompts
from codefend.prompts.gepa_search import GepaConfig
from codefend.prompts.proposers import ChatEndpoint
from codefend.prompts.soft import MAX_TOKENS
from codefend.training.prompt_search.bank import BankConfig, check_attacks
from codefend.training.prompt_search.generator import GeneratorConfig
from codefend.training.prompt_search.soft import SoftConfig
from codefend.types import CodefendError


@dataclass(frozen=True)
class SearchConfig:
    """Settings of a search.

    The chosen policy may lose ``clean_cost`` of the clean score, and refuse ``more_refusals`` more often.
    """

    victim: str = "pocket"
    method: Literal["gepa", "soft", "generator"] = "gepa"
    surrogate: str = ""  # the white box that attacks are made on; empty: the victim
    seed: int = 0
    batch: int = 8  # questions per call of the victim
    clean_cost: float = 0.01
    more_refusals: float = 0.01
    bank: BankConfig = field(default_factory=BankConfig)
    gepa: GepaConfig = field(default_factory=GepaConfig)
    soft: SoftConfig = field(default_factory=SoftConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


COUNTS = (  # 1 or more
    *("batch", "bank.search_scenes", "bank.selection_scenes", "gepa.evaluations", "gepa.minibatch"),
    *("soft.tokens", "soft.batch", "soft.steps", "soft.check_every"),
    *("generator.rank", "generator.tokens", "generator.steps", "generator.check_every", "generator.pictures"),
)
OPTIONAL_COUNTS = ("generator.samples", "generator.bank")  # 0 or more


def check(config: SearchConfig) -> None:
    """Raise CodefendError for a setting out of range."""
    for name in (*COUNTS, *OPTIONAL_COUNTS):
        value, least = attrgetter(name)(config), int(name in COUNTS)
        if value < least:
            raise CodefendError(f"{name} must be {least} or more, not {value}")
    bank = config.bank
    if not bank.tasks or not bank.seen or not bank.held_out:
        raise CodefendError("bank.tasks, bank.seen and bank.held_out must each name something")
    both = set(bank.seen) & set(bank.held_out)
    if both:
        raise CodefendError(f"{sorted(both)[0]!r} is in bank.seen and in bank.held_out; selection needs other attacks")
    check_attacks((*bank.seen, *bank.held_out), bank.attack, "bank.attack")
    if config.method == "gepa":
        _check_gepa(config)
    if config.method == "soft" and config.soft.tokens > MAX_TOKENS:
        raise CodefendError(f"soft.tokens must be 1 to {MAX_TOKENS}, not {config.soft.tokens}")


def _check_gepa(config: SearchConfig) -> None:
    gepa = config.gepa
    if set(gepa.components) - {"system", "prefix", "suffix"} or not gepa.components:
        raise CodefendError("gepa.components must name some of system, prefix, suffix")
    if gepa.proposer.startswith(("http://", "https://")):
        ChatEndpoint(gepa.proposer, gepa.model)
    elif gepa.proposer not in ("operators", "local"):
        raise CodefendError(f"gepa.proposer is {gepa.proposer!r}: operators, local, or an address (http...)")
    seed_policy(config)


def seed_policy(config: SearchConfig) -> prompts.PromptPolicy:
    """The policy that GEPA starts from. Raises CodefendError for an unknown or a learned one."""
    policy = prompts.load_any(config.gepa.seed_policy)
    if not isinstance(policy, prompts.PromptPolicy):
        raise CodefendError(f"gepa.seed_policy must be fixed text, and {config.gepa.seed_policy!r} was learned")
    return policy
