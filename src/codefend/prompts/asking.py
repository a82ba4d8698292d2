"""Ask a victim under a prompt policy, once per (policy, item): answers are kept in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from codefend.prompts.items import Item, Score, score_answers
from codefend.types import CodefendError, Victim

if TYPE_CHECKING:
    from codefend.core.runs import Run

# These are mistakes in code or settings: asking again would not help, and hiding them would hurt.
_OURS = (CodefendError, TypeError, AttributeError, NameError, AssertionError, NotImplementedError)


@runtime_checkable
class Policy(Protocol):
    """What every kind of policy has: text in, text out, and a fingerprint. Soft ones also ``attach`` to a victim."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    def __call__(self, prompt: str) -> str: ...


def prompted(victim: Victim, policy: object) -> Victim:
    """The victim as ``policy`` needs it: itself, or behind a soft prefix. Raises CodefendError when it cannot take one."""
    attach = getattr(policy, "attach", None)
    attached: Victim = victim if attach is None else attach(victim)
    return attached


class Asker:
    """Answers of one victim, from the run where it holds them. ``asked`` counts items, ``fresh`` the ones generated."""

    def __init__(self, victim: Victim, run: Run, *, batch: int = 8, waits: Sequence[float] = (1.0, 5.0)) -> None:
        self.victim, self.run, self.batch, self.waits = victim, run, batch, waits
        self.asked = self.fresh = 0
        self.watch: Callable[[int], None] = lambda count: None
        self._known: dict[str, str] = {
            row["key"]: row["answer"] for row in run.rows() if row.get("kind") == "answer" and "key" in row
        }

    def answers(self, policy: Policy, items: Sequence[Item]) -> list[str]:
        """One answer per item. Raises CodefendError when the victim keeps failing; what it answered before is kept."""
        keys = [f"{policy.key}|{item.id}" for item in items]
        todo = [i for i, key in enumerate(dict.fromkeys(keys)) if key not in self._known]
        unique = list(dict(zip(keys, items, strict=True)).values())
        self.watch(len(unique) - len(todo))
        victim = prompted(self.victim, policy) if todo else self.victim
        for part in self._batches([unique[i] for i in todo]):
            self._ask(victim, policy, part)
        self.asked += len(items)
        return [self._known[key] for key in keys]

    def score(self, policy: Policy, items: Sequence[Item]) -> Score:
        return score_answers(items, self.answers(policy, items))

    def _batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """``batch`` at a time, pictures of one size in each."""
        batches: list[list[Item]] = []
        for item in items:
            if batches and len(batches[-1]) < self.batch and batches[-1][0].image.shape == item.image.shape:
                batches[-1].append(item)
            else:
                batches.append([item])
        return batches

    def _ask(self, victim: Victim, policy: Policy, items: Sequence[Item]) -> None:
        import torch

        images, prompts = torch.stack([item.image for item in items]), [policy(item.prompt) for item in items]
        start = time.perf_counter()
        answers = self._patiently(lambda: victim.generate(images, prompts))
        if len(answers) != len(items):
            raise CodefendError(f"victim {victim.name!r} gave {len(answers)} answers to {len(items)} questions")
        seconds = (time.perf_counter() - start) / len(items)
        for item, answer in zip(items, answers, strict=True):
            key = f"{policy.key}|{item.id}"
            self.run.append({"key": key, "kind": "answer", "answer": answer, "seconds": seconds})
            self._known[key] = answer
        self.fresh += len(items)
        self.watch(len(items))

    def _patiently(self, ask: Callable[[], list[str]]) -> list[str]:
        problem: Any = None
        for wait in (*self.waits, None):
            try:
                return ask()
            except _OURS:
                raise
            except Exception as error:  # an endpoint may raise anything
                problem = error
            if wait is not None:
                time.sleep(wait)
        raise CodefendError(
            f"victim {self.victim.name!r} failed {len(self.waits) + 1} times ({problem}); "
            "answers so far are kept, run the same command again to go on"
        ) from problem
