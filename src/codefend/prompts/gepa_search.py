"""Discrete search with GEPA (Agrawal et al. 2025, arXiv 2507.19457) over system text, prefix and suffix.

Works with any victim: only its answers are used. Every answer and every proposal is kept in the run folder, so the
same command plays a killed run back in seconds and goes on.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from codefend.prompts.asking import Asker
from codefend.prompts.items import Item, is_refusal
from codefend.prompts.policy import PromptPolicy, fingerprint
from codefend.prompts.proposers import Proposer

if TYPE_CHECKING:
    from codefend.core.runs import Run


@dataclass(frozen=True)
class GepaConfig:
    """``evaluations`` counts answers, kept ones too; ``minibatch`` items judge a proposal before the whole set does."""

    evaluations: int = 4000
    minibatch: int = 10
    components: tuple[str, ...] = ("prefix", "suffix")
    seed_policy: str = "look-closely"
    proposer: str = "operators"  # "operators", "local", or the address of an OpenAI-compatible endpoint
    model: str = ""  # the endpoint's


class Judge(Protocol):
    """Told of each policy that was judged on the whole selection set."""

    def __call__(self, policy: PromptPolicy) -> None: ...


def policy_of(candidate: Mapping[str, str]) -> PromptPolicy:
    """The policy of GEPA's candidate: prefix and suffix stand on lines of their own."""
    prefix, suffix = candidate.get("prefix", ""), candidate.get("suffix", "")
    words = {
        "system": candidate.get("system", ""),
        "prefix": f"{prefix}\n" if prefix else "",
        "suffix": f"\n{suffix}" if suffix else "",
    }
    return PromptPolicy(f"gepa-{fingerprint(repr(sorted(words.items())))[:6]}", **words)


class Adapter:
    """What GEPA sees of the victim: answers as scores, mistakes as feedback."""

    propose_new_texts = None

    def __init__(self, asker: Asker, proposer: Proposer, run: Run, selection: Sequence[Item], judged: Judge) -> None:
        self.asker, self.proposer, self.run, self.judged = asker, proposer, run, judged
        self.selection = {item.id for item in selection}
        self.turn = 0
        self._kept = {row["key"]: row["text"] for row in run.rows() if row.get("kind") == "proposal"}

    def evaluate(self, batch: list[Item], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """Scores in [0, 1], 0 for a refusal; one objective per item: clean, robust or benign."""
        from gepa.core.adapter import EvaluationBatch

        policy = policy_of(candidate)
        answers = self.asker.answers(policy, batch)
        if {item.id for item in batch} == self.selection:
            self.judged(policy)
        scores = [
            0.0 if is_refusal(answer) else item.judge(answer) for item, answer in zip(batch, answers, strict=True)
        ]
        objectives = [{_objective(item): score} for item, score in zip(batch, scores, strict=True)]
        traces = list(zip(batch, answers, scores, strict=True)) if capture_traces else None
        return EvaluationBatch(outputs=answers, scores=scores, trajectories=traces, objective_scores=objectives)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, str]]]:
        """The mistakes of a minibatch, for each component alike."""
        failures = [
            {"family": item.family, "question": item.prompt, "answer": answer, "right": item.answer}
            for item, answer, score in eval_batch.trajectories
            if score < 1
        ]
        return dict.fromkeys(components_to_update, failures[:6])

    def propose(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """New texts; one that an earlier sitting proposed at this point is taken from the run."""
        texts = {}
        for name in components_to_update:
            self.turn += 1
            key = f"proposal|{self.turn}|{fingerprint(repr((name, sorted(candidate.items()))))}"
            if key not in self._kept:
                text = self.proposer(name, candidate[name], reflective_dataset.get(name, ()), self.turn)
                self.run.append({"key": key, "kind": "proposal", "component": name, "text": text})
                self._kept[key] = text
            texts[name] = self._kept[key]
        return texts


def _objective(item: Item) -> str:
    return {"clean": "clean", "attacked": "robust", "benign": "benign"}[item.group]


class _Quiet:
    """GEPA's log, reduced to what a user needs: which candidates got in."""

    def log(self, message: str) -> None:
        if "Exception" in message:
            print(message, file=sys.stderr)


def hard_half(asker: Asker, policy: PromptPolicy, items: Sequence[Item], most: int) -> list[Item]:
    """Of the first ``most`` items those that ``policy`` answers wrongly, and as many others; all when none is wrong.

    GEPA compares a proposal with its parent on a minibatch: where both are right of everything it can tell nothing.
    """
    looked = list(items[:most])
    wrong: list[Item] = []
    right: list[Item] = []
    for item, answer in zip(looked, asker.answers(policy, looked), strict=True):
        (right if item.judge(answer) == 1 else wrong).append(item)
    return wrong + right[: len(wrong)] if wrong else list(items)


def search(
    asker: Asker,
    run: Run,
    search_items: Sequence[Item],
    selection_items: Sequence[Item],
    seed_policy: PromptPolicy,
    proposer: Proposer,
    config: GepaConfig,
    judged: Judge,
    *,
    seed: int = 0,
) -> None:
    """Run GEPA; ``judged`` hears of every policy that reached the whole selection set.

    Raises CodefendError when the victim keeps failing (kept answers stay) or ``gepa`` is not installed.
    """
    from gepa.api import optimize

    adapter = Adapter(asker, proposer, run, selection_items, judged)
    texts = {"system": seed_policy.system, "prefix": seed_policy.prefix.strip(), "suffix": seed_policy.suffix.strip()}
    order = list(search_items)
    random.Random(seed).shuffle(order)
    order = hard_half(
        asker, policy_of({name: texts[name] for name in config.components}), order, config.evaluations // 8
    )
    optimize(
        seed_candidate={name: texts[name] for name in config.components},
        trainset=order,
        valset=list(selection_items),
        adapter=adapter,  # type: ignore[arg-type]
        custom_candidate_proposer=adapter.propose,
        candidate_selection_strategy="pareto",
        frontier_type="hybrid",  # per item, and per side of the score
        reflection_minibatch_size=min(config.minibatch, len(order)),
        skip_perfect_score=True,
        max_metric_calls=config.evaluations,
        logger=_Quiet(),
        track_best_outputs=False,
        seed=seed,
        raise_on_exception=True,
    )
