"""Answers of a victim under prompt policies, one for each policy and item, cached in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from codefend.prompts.items import Item, Score, score_answers
from codefend.prompts.policy import Policy, attach
from codefend.types import CodefendError, Victim

if TYPE_CHECKING:
    from codefend.core.runs import Run

# Mistakes in code or settings, which a retry would only hide.
NO_RETRY = (CodefendError, TypeError, AttributeError, NameError, AssertionError, NotImplementedError)


class AnswerCache:
    """Answers of one victim, read from ``run`` and appended to it. ``on_answers`` receives the number of new ones."""

    def __init__(self, victim: Victim, run: Run, *, batch: int = 8, waits: Sequence[float] = (1.0, 5.0)) -> None:
        """``waits``: seconds before each retry of a victim that fails."""
        self.victim, self.run, self.batch, self.waits = victim, run, batch, waits
        self.on_answers: Callable[[int], None] = lambda count: None
        self._answers: dict[str, str] = {
            row["key"]: row["answer"] for row in run.rows() if row.get("kind") == "answer" and "key" in row
        }

    def answers(self, policy: Policy, items: Sequence[Item]) -> list[str]:
        """One answer per item. Raises CodefendError when the victim keeps failing; earlier answers are saved."""
        keys = [f"{policy.key}|{item.id}" for item in items]
        unique = dict(zip(keys, items, strict=True))
        missing = {key: item for key, item in unique.items() if key not in self._answers}
        self.on_answers(len(unique) - len(missing))
        victim = attach(self.victim, policy) if missing else self.victim
        for batch in self._batches(missing):
            self._answer(victim, policy, batch)
        return [self._answers[key] for key in keys]

    def score(self, policy: Policy, items: Sequence[Item]) -> Score:
        return score_answers(items, self.answers(policy, items))

    def _batches(self, items: dict[str, Item]) -> list[dict[str, Item]]:
        """At most ``batch`` items each, with images of one size."""
        batches: list[dict[str, Item]] = []
        for key, item in items.items():
            shapes = {other.image.shape for other in batches[-1].values()} if batches else set()
            if shapes == {item.image.shape} and len(batches[-1]) < self.batch:
                batches[-1][key] = item
            else:
                batches.append({key: item})
        return batches

    def _answer(self, victim: Victim, policy: Policy, items: dict[str, Item]) -> None:
        """Generate, append and cache the answers to one batch."""
        images = torch.stack([item.image for item in items.values()])
        prompts = [policy(item.prompt) for item in items.values()]
        start = time.perf_counter()
        answers = self._generate(victim, images, prompts)
        if len(answers) != len(items):
            raise CodefendError(f"victim {victim.name!r} gave {len(answers)} answers to {len(items)} questions")
        seconds = (time.perf_counter() - start) / len(items)
        for key, answer in zip(items, answers, strict=True):
            self.run.append({"key": key, "kind": "answer", "answer": answer, "seconds": seconds})
            self._answers[key] = answer
        self.on_answers(len(items))

    def _generate(self, victim: Victim, images: torch.Tensor, prompts: Sequence[str]) -> list[str]:
        """The victim's answers, with retries. Raises CodefendError after the last one."""
        from tenacity import RetryError, Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, NO_RETRY)),
            stop=stop_after_attempt(len(self.waits) + 1),
            wait=wait_chain(*map(wait_fixed, self.waits)),
        )
        try:
            return retrying(victim.generate, images, prompts)
        except RetryError as error:
            problem = error.last_attempt.exception()
            raise CodefendError(
                f"victim {victim.name!r} failed {len(self.waits) + 1} times ({problem}); "
                "answers so far are saved, rerun the command to resume"
            ) from problem
