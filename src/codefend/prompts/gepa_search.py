"""Discrete search with GEPA (Agrawal et al. 2025, arXiv 2507.19457) over system text, prefix and suffix.

Works with any victim, since only answers are used. The run folder has every answer and every proposal, so that a rerun
repeats the finished part of a search in seconds.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from codefend.prompts.answers import AnswerCache
from codefend.prompts.items import Item, is_refusal
from codefend.prompts.policy import PromptPolicy, fingerprint
from codefend.prompts.proposers import Proposer

if TYPE_CHECKING:
    from codefend.core.runs import Run


OBJECTIVES = {"clean": "clean", "attacked": "robust", "benign": "benign"}  # of an item's group


@dataclass(frozen=True)
class GepaConfig:
    """``evaluations`` counts answers, cached ones also; a proposal is tried on ``minibatch`` items first."""

    evaluations: int = 4000
    minibatch: int = 10
    components: tuple[str, ...] = ("prefix", "suffix")
    seed_policy: str = "look-closely"
    proposer: str = "operators"  # "operators", "local", or the address of an OpenAI-compatible endpoint
    model: str = ""  # of the endpoint


def policy_of(candidate: Mapping[str, str]) -> PromptPolicy:
    """GEPA's candidate as a policy, with prefix and suffix on separate lines."""
    prefix, suffix = candidate.get("prefix", ""), candidate.get("suffix", "")
    texts = {
        "system": candidate.get("system", ""),
        "prefix": f"{prefix}\n" if prefix else "",
        "suffix": f"\n{suffix}" if suffix else "",
    }
    return PromptPolicy(f"gepa-{fingerprint(repr(sorted(texts.items())))[:6]}", **texts)


class GepaAdapter:
    """The victim as GEPA's ``GEPAAdapter``: answers as scores, mistakes as feedback."""

    propose_new_texts = None

    def __init__(
        self,
        answers: AnswerCache,
        proposer: Proposer,
        run: Run,
        selection: Sequence[Item],
        on_candidate: Callable[[PromptPolicy], None],
    ) -> None:
        self.answers, self.proposer, self.run, self.on_candidate = answers, proposer, run, on_candidate
        self.selection = {item.id for item in selection}
        self.turn = 0
        self._proposals = {row["key"]: row["text"] for row in run.rows() if row.get("kind") == "proposal"}

    def evaluate(self, batch: list[Item], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """Scores in [0, 1], 0 for a refusal; one objective per item: clean, robust or benign."""
        from gepa.core.adapter import EvaluationBatch

        policy = policy_of(candidate)
        answers = self.answers.answers(policy, batch)
        if {item.id for item in batch} == self.selection:
            self.on_candidate(policy)
        scores = [
            0.0 if is_refusal(answer) else item.judge(answer) for item, answer in zip(batch, answers, strict=True)
        ]
        objectives = [{OBJECTIVES[item.group]: score} for item, score in zip(batch, scores, strict=True)]
        traces = list(zip(batch, answers, scores, strict=True)) if capture_traces else None
        return EvaluationBatch(outputs=answers, scores=scores, trajectories=traces, objective_scores=objectives)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, str]]]:
        """The mistakes of a minibatch, the same for every component."""
        failures = [
            {"family": item.family, "question": item.prompt, "answer": answer, "expected": item.answer}
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
        """New texts; proposals that the run already holds for this point are reused."""
        texts = {}
        for name in components_to_update:
            self.turn += 1
            key = f"proposal|{self.turn}|{fingerprint(repr((name, sorted(candidate.items()))))}"
            if key not in self._proposals:
                text = self.proposer(name, candidate[name], reflective_dataset.get(name, ()), self.turn)
                self.run.append({"key": key, "kind": "proposal", "component": name, "text": text})
                self._proposals[key] = text
            texts[name] = self._proposals[key]
        return texts


class _ErrorLogger:
    """Prints only the errors of GEPA's log."""

    def log(self, message: str) -> None:
        if "Exception" in message:
            print(message, file=sys.stderr)


def balanced_items(answers: AnswerCache, policy: PromptPolicy, items: Sequence[Item], limit: int) -> list[Item]:
    """Of the first ``limit`` items those that ``policy`` gets wrong, and as many others; all items if there are none.

    GEPA compares a proposal with its parent on a minibatch, which shows nothing where both answer everything correctly.
    """
    wrong: list[Item] = []
    right: list[Item] = []
    for item, answer in zip(items[:limit], answers.answers(policy, items[:limit]), strict=True):
        (right if item.judge(answer) == 1 else wrong).append(item)
    return wrong + right[: len(wrong)] if wrong else list(items)


def search(
    answers: AnswerCache,
    run: Run,
    search_items: Sequence[Item],
    selection_items: Sequence[Item],
    seed_policy: PromptPolicy,
    proposer: Proposer,
    config: GepaConfig,
    on_candidate: Callable[[PromptPolicy], None],
    *,
    seed: int = 0,
) -> None:
    """Run GEPA; ``on_candidate`` receives every policy that was answered on the whole selection set.

    Raises CodefendError when the victim keeps failing; its answers are saved.
    """
    from gepa.api import optimize

    texts = {"system": seed_policy.system, "prefix": seed_policy.prefix.strip(), "suffix": seed_policy.suffix.strip()}
    candidate = {name: texts[name] for name in config.components}
    adapter = GepaAdapter(answers, proposer, run, selection_items, on_candidate)
    items = list(search_items)
    random.Random(seed).shuffle(items)
    items = balanced_items(answers, policy_of(candidate), items, config.evaluations // 8)
    optimize(
        seed_candidate=candidate,
        trainset=items,
        valset=list(selection_items),
        adapter=adapter,  # type: ignore[arg-type]
        custom_candidate_proposer=adapter.propose,
        candidate_selection_strategy="pareto",
        frontier_type="hybrid",  # per item and per objective
        reflection_minibatch_size=min(config.minibatch, len(items)),
        skip_perfect_score=True,
        max_metric_calls=config.evaluations,
        logger=_ErrorLogger(),
        track_best_outputs=False,
        seed=seed,
        raise_on_exception=True,
    )
