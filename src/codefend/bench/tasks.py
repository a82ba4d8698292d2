"""Tasks under evaluation: their examples in a fixed order, all metrics per example, and the victim that is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.bench.attacking import clean_images
from codefend.core.images import quantize8
from codefend.core.seeds import make_generator
from codefend.tasks.metrics import attack_success, cider_d, document_frequencies
from codefend.types import CodefendError, Example, HasFeatures, Metric, Task, Victim

# Metrics in [0, 1] that say whether an answer is right. AGREEMENT marks tasks without reference answers: right is what
# the undefended victim answers on the clean image, and victims with features are judged by how far these are restored.
AGREEMENT = "agreement"
BINARY_METRICS = ("all_tags", "vqa_accuracy", "exact_match", AGREEMENT)
COSINE = "cosine"  # of the vision tokens to those of the clean image, mean over tokens
CONTROL = "agreement_noise"  # agreement under white noise as large as the change of the image


@dataclass(frozen=True)
class EvaluatedTask:
    """A task with what judging needs. Attacks are made on ``crafter``; ``victim`` answers, mostly the same object."""

    task: Task
    victim: Victim
    crafter: Victim
    metrics: dict[str, Metric]
    headline: str

    @classmethod
    def of(cls, task: Task, victim: Victim, crafter: Victim | None = None) -> EvaluatedTask:
        """Prepare a task that `check_task` accepts."""
        headline = task.headline
        if AGREEMENT in task.metrics:
            task = answered_by(task, victim)
            headline = COSINE if isinstance(victim, HasFeatures) else headline
        # By itself, CIDEr-D would take its document frequencies from each batch.
        frequencies = document_frequencies([example.references for example in task.examples])
        bound = partial(cider_d, frequencies=frequencies)
        metrics = {name: bound if metric is cider_d else metric for name, metric in task.metrics.items()}
        return cls(task, victim, crafter or victim, metrics, headline)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(example.id for example in self.task.examples)

    @cached_property
    def judge(self) -> str:
        """The metric that says whether an answer is right."""
        return next((name for name in BINARY_METRICS if name in self.metrics), self.headline)

    def describe(self) -> dict[str, Any]:
        """The task's entry in ``bench.json``."""
        return {
            "headline": self.headline,
            "judge": self.judge,
            "target": self.task.target,
            "description": self.task.description,
            "licence": self.task.licence,
            "examples": len(self.ids),
            "ids": list(self.ids),
        }

    @property
    def by_agreement(self) -> bool:
        return AGREEMENT in self.metrics

    def examples(self, indices: Sequence[int]) -> list[Example]:
        return [self.task.examples[index] for index in indices]

    def batches(self, size: int, limit: int | None = None) -> list[list[int]]:
        """Indices of the first ``limit`` examples, see `same_size_batches`."""
        return list(same_size_batches(self.task.examples[:limit], size))

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
        """Every metric of each answer, ``[B]``."""
        return {name: metric(answers, examples) for name, metric in self.metrics.items()}

    def score_images(self, images: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Metrics of the victim's input ``[B, 3, H, W]``, ``[B]`` each; none for tasks with reference answers."""
        if not (self.by_agreement and isinstance(self.victim, HasFeatures)):
            return {}
        clean = clean_images(examples)
        with torch.no_grad():
            cosine = F.cosine_similarity(self.victim.features(images), self.victim.features(clean), dim=-1).mean(1)
        answers = self.victim.generate(with_equal_noise(clean, images), [example.prompt for example in examples])
        return {COSINE: cosine, CONTROL: self.metrics[AGREEMENT](answers, examples)}

    def untargeted_success(self, clean: Tensor, attacked: Tensor) -> Tensor:
        """1 where a correct answer became wrong, 0 where it stayed correct, nan where it was wrong before; ``[B]``.

        Without a binary metric, a caption counts as correct from CIDEr-D 0.1 (papers print 10), and as wrong when half
        of its score is lost.
        """
        if self.judge in BINARY_METRICS:
            return attack_success(clean, attacked)
        outside = ~(clean >= 0.1) | attacked.isnan()
        return (attacked < clean / 2).float().masked_fill(outside, float("nan"))


def check_task(task: Task) -> None:
    """Raise CodefendError for no examples, a repeated id or a missing reference answer."""
    if not task.examples:
        raise CodefendError(f"task {task.name!r} has no examples")
    unanswered = [example.id for example in task.examples if not example.references]
    if unanswered and AGREEMENT not in task.metrics:
        raise CodefendError(f"task {task.name!r}: example {unanswered[0]!r} has no reference answer")
    repeated = [name for name, n in Counter(example.id for example in task.examples).items() if n > 1]
    if repeated:
        raise CodefendError(f"task {task.name!r} has two examples called {repeated[0]!r}")


def answered_by(task: Task, victim: Victim) -> Task:
    """The task with the victim's answers to its clean images as references."""
    examples: list[Example] = []
    for indices in same_size_batches(task.examples, 8):
        batch = [task.examples[index] for index in indices]
        answers = victim.generate(clean_images(batch), [example.prompt for example in batch])
        examples += [replace(e, references=(answer,)) for e, answer in zip(batch, answers, strict=True)]
    return replace(task, examples=examples)


def with_equal_noise(clean: Tensor, changed: Tensor) -> Tensor:
    """White noise on ``clean`` as large, image by image, as its change; ``[B, 3, H, W]``, 8 bits.

    The control for a change: what any change of that size costs.
    """
    sizes = (changed - clean).square().mean((1, 2, 3), keepdim=True).sqrt()
    generator = make_generator(0, "equal noise")
    noise = torch.randn(clean.shape[1:], generator=generator).to(clean)
    return quantize8((clean + sizes * noise).clamp(0, 1))


def same_size_batches(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Indices in order, at most ``size`` at a time, images of one size in each batch."""
    batch: list[int] = []
    for index, example in enumerate(examples):
        if batch and (len(batch) == size or example.image.shape != examples[batch[0]].image.shape):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def stratified(task: Task, limit: int | None) -> Task:
    """The task's examples in an order whose every prefix holds each stratum in proportion; the first ``limit`` of it.

    A stratum is a kind of question and a number of objects in the image. The order depends on the task alone, so that
    smaller subsets are part of larger ones and all runs share them.
    """
    strata: dict[tuple[str, int], list[int]] = {}
    for index, example in enumerate(task.examples):
        strata.setdefault((example.kind, len(example.tags)), []).append(index)
    places: list[tuple[float, int]] = []
    for stratum, members in strata.items():
        generator = make_generator(0, "strata", *stratum)
        offset = float(torch.rand(1, generator=generator))
        shuffled = torch.randperm(len(members), generator=generator).tolist()
        places += [((place + offset) / len(members), members[member]) for place, member in enumerate(shuffled)]
    return replace(task, examples=[task.examples[index] for _, index in sorted(places)[:limit]])
