"""The card of a searched policy: origin, scores and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from codefend.prompts.items import Score

if TYPE_CHECKING:
    from codefend.training.prompt_search.config import SearchConfig

HEADER = "| policy | clean | robust | refusals | look-alikes |"
RULE = "|---|---|---|---|---|"
METHODS = {
    "gepa": "GEPA (arXiv 2507.19457) over prefix and suffix",
    "soft": "a soft prefix, prompt tuning (arXiv 2104.08691)",
    "generator": "a prefix generator: SmolLM2-135M-Instruct, LoRA, rewards and pairs (after arXiv 2510.11096)",
}


def line(name: str, score: Score) -> str:
    """A row of the table of scores."""
    numbers = (score.clean, score.robust, score.refusal, score.benign)
    return f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |"


def card(
    config: SearchConfig,
    settings: dict[str, Any],
    score: Score,
    baseline: Score,
    helps: bool,
    front: Sequence[tuple[str, Score]],
) -> str:
    """Markdown; ``codefend list prompts`` shows its first line. ``settings`` is the policy's JSON."""
    verdict = "more robust than no prompt at the allowed cost" if helps else "no better than no prompt"
    families = [
        f"- {name}: {value:.3f} (no prompt {baseline.families[name]:.3f})" for name, value in score.families.items()
    ]
    return "\n".join(
        [
            f"# {config.method} policy for {config.victim}: {verdict}",
            "",
            *_origin(config, settings, score.count),
            "",
            *_table([("none", baseline), ("this", score)]),
            "",
            "Per held-out attack:",
            *families,
            "",
            "Pareto front of the search:",
            "",
            *_table(front),
            "",
            "Chosen as the best of many on this set, so these scores are optimistic; evaluate on the test set. "
            "The attacks were oblivious of the policy (T0).",
            "",
        ]
    )


def _origin(config: SearchConfig, settings: dict[str, Any], count: int) -> list[str]:
    """How the policy was made, its text, and the ``count`` items that it was selected on."""
    bank = config.bank
    return [
        f"Made by {METHODS[config.method]}; seed {config.seed}. Frozen: fingerprint in policy.json or its tensors.",
        *(f"- {key}: {settings[key]!r}" for key in ("system", "prefix", "suffix") if settings.get(key)),
        "",
        f"Selected on {count} items of the val split behind purifier {bank.purifier!r}, at "
        f"{bank.attack.eps:g}/255, attacks through the bare victim. Attacks of the search: {', '.join(bank.seen)}; "
        f"held out for selection: {', '.join(bank.held_out)}.",
    ]


def _table(scores: Sequence[tuple[str, Score]]) -> list[str]:
    return [HEADER, RULE, *(line(name, score) for name, score in scores)]
