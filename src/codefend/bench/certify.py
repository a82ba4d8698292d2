"""Certificates of whole tasks in a run folder: one row per example and defense; the same call resumes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from codefend.bench.attacking import clean_images
from codefend.bench.config import DefenseChoice
from codefend.bench.setup import Loaders, check_unchanged, fingerprints, load_defense
from codefend.bench.smoothing import Certificate, SmoothedVictim, certificates, check_draws, naming
from codefend.bench.tasks import EvaluatedTask, check_task, stratified
from codefend.core.progress import progress
from codefend.core.runs import Row, Run, check_run, open_run
from codefend.core.seeds import make_generator
from codefend.core.settings import recorded
from codefend.core.specs import split_specs
from codefend.tasks.metrics import normalize_answer
from codefend.types import CodefendError, Example, Victim


@dataclass(frozen=True)
class CertifyConfig:
    """Which answers to certify. Each defense must add noise: its ``sigma`` is the noise of the certificate.

    The first draws of an example choose the answer (``selection``), fresh ones bound its probability (``samples``). A
    certificate is wrong with probability ``alpha`` at most; of n of them n * alpha may be.
    """

    victim: str = "pocket"
    tasks: tuple[str, ...] = ("vqa",)
    defenses: tuple[str, ...] = ("bridge:sigma=0.15", "bridge:sigma=0.25")
    samples: int = 1000
    selection: int = 100
    alpha: float = 0.001
    split: str = "test"
    limit: int | None = 64  # examples per task
    sample: Literal["first", "strata"] = "strata"
    batch: int = 50  # noisy copies of one image that are answered together
    seed: int = 0
    mixed: bool = False  # the victim in mixed precision, as purifiers are: twice as fast on a CPU with bfloat16 units

    def __post_init__(self) -> None:
        for name in ("tasks", "defenses"):
            object.__setattr__(self, name, split_specs(getattr(self, name)))
            if not getattr(self, name):
                raise CodefendError(f"{name} is empty; name at least one")
        check_draws(self.samples, self.selection, self.alpha, self.batch)


@dataclass(frozen=True)
class CertifiedTask:
    """A task to certify: ``objects`` are the phrases that a caption is read for, none for questions."""

    task: EvaluatedTask
    objects: tuple[str, ...]


def run_certify(
    config: CertifyConfig, run_dir: str | Path, loaders: Loaders | None = None, *, estimate_only: bool = False
) -> list[Row]:
    """Certify the examples that the run folder lacks, and return all rows; the same call resumes.

    Before it starts, the cost is measured on two batches and printed to standard error; ``estimate_only`` ends there.
    Raises CodefendError where `SmoothedVictim` does, for unknown names, and for a folder made with another config.
    """
    loaders = loaders or Loaders()
    described = recorded(config, later="mixed")
    check_run(run_dir, described)
    victim = loaders.victim(config.victim)
    smoothed = {
        label: SmoothedVictim(victim, load_defense(label, loaders), mixed=config.mixed) for label in config.defenses
    }
    tasks = {label: load_certified_task(config, label, victim, loaders) for label in config.tasks}
    for certified in tasks.values():  # each of a caption's objects has a share of alpha
        share = config.alpha / max(1, len(certified.objects))
        check_draws(config.samples, config.selection, share, config.batch)
    work = [(d, t, e) for t, certified in tasks.items() for e in certified.task.task.examples for d in smoothed]
    if estimate_only:
        print_estimate(config, smoothed, work)
        return []
    with open_run(run_dir, described) as run:
        _describe(config, run, tasks)
        left = [item for item in work if not run.has(row_key(*item))]
        if left:
            print_estimate(config, smoothed, left)
        with progress("certify", len(work), done=len(work) - len(left)) as advance:
            for defense, label, example in left:
                run.append(certified_row(config, smoothed[defense], tasks[label], defense, label, example))
                advance(1, f"{defense} {label}")
        return run.rows()


def load_certified_task(config: CertifyConfig, label: str, victim: Victim, loaders: Loaders) -> CertifiedTask:
    """The examples, and the objects that all captions of the task name, those of other examples included.

    The objects are fixed before any draw, as the correction over their number requires.
    """
    task = loaders.task(label, config.split, None)
    objects = tuple(sorted({tag for example in task.examples for tag in example.tags}))
    chosen = stratified(task, config.limit) if config.sample == "strata" else task
    task = replace(chosen, examples=list(chosen.examples)[: config.limit])
    check_task(task)
    return CertifiedTask(EvaluatedTask.of(task, victim), objects)


def row_key(defense: str, task: str, example: Example) -> str:
    """The key of a row, unique in its run."""
    return " | ".join((task, defense, example.id))


def certified_row(
    config: CertifyConfig,
    smoothed: SmoothedVictim,
    certified: CertifiedTask,
    defense: str,
    label: str,
    example: Example,
) -> Row:
    """The certificate of one example; ``right`` says whether what it certifies is true of the image."""
    start, image = time.perf_counter(), clean_images([example])[0]
    generator = make_generator(config.seed, "certify", defense, label, example.id)
    selection, estimation = (
        smoothed.draw(image, example.prompt, count, batch=config.batch, generator=generator)
        for count in (config.selection, config.samples)
    )
    statements = naming(certified.objects) if certified.objects else {"answer": normalize_answer}
    found = certificates(selection, estimation, statements, config.alpha, smoothed.sigma)
    columns = _caption(found, example) if certified.objects else _question(found["answer"], certified.task, example)
    return {
        "key": row_key(defense, label, example),
        "task": label,
        "defense": defense,
        "sigma": smoothed.sigma,
        "example": example.id,
        "kind": example.kind,
        "prompt": example.prompt,
        "references": list(example.references),
        "draws": config.samples,
        **columns,
        "seconds": time.perf_counter() - start,
    }


def _question(certificate: Certificate, task: EvaluatedTask, example: Example) -> Row:
    right = bool(task.metrics[task.judge]([certificate.says], [example])[0] >= 0.5)
    return {"answer": certificate.says, "right": right, "radius": certificate.radius, "hits": certificate.hits}


def _caption(found: dict[str, Certificate], example: Example) -> Row:
    """``radius``: inside it every object of the image is named; ``exact_radius``: and no other one."""
    named = [name for name, certificate in found.items() if certificate.says == "yes"]
    own = [found[tag] for tag in example.tags]
    return {
        "answer": ", ".join(named),
        "right": set(example.tags) <= set(named),
        "radius": min((certificate.radius for certificate in own), default=0.0),
        "exact": set(example.tags) == set(named),
        "exact_radius": min(certificate.radius for certificate in found.values()),
        "objects": {name: [c.says, c.hits, round(c.radius, 6)] for name, c in found.items()},
    }


def print_estimate(
    config: CertifyConfig, smoothed: dict[str, SmoothedVictim], work: Sequence[tuple[str, str, Example]]
) -> None:
    """Print the time that ``work`` will take, from the second of two batches for each defense and task."""
    seconds, draws = 0.0, config.selection + config.samples
    for defense, label in dict.fromkeys((defense, label) for defense, label, _ in work):
        examples = [example for d, t, example in work if (d, t) == (defense, label)]
        image, generator = clean_images([examples[0]])[0], make_generator(config.seed, "estimate", defense, label)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            smoothed[defense].draw(image, examples[0].prompt, config.batch, batch=config.batch, generator=generator)
            times.append((time.perf_counter() - start) / config.batch)
        seconds += times[-1] * draws * len(examples)
        print(
            f"certify: {defense} {label}: {len(examples)} examples x {draws} answers, {1000 * times[-1]:.0f} ms each",
            file=sys.stderr,
        )
    print(
        f"certify: about {seconds / 60:.0f} minutes; stop it any time and rerun the command to resume", file=sys.stderr
    )


def _describe(config: CertifyConfig, run: Run, tasks: dict[str, CertifiedTask]) -> None:
    """Write ``certify.json`` once. Raises CodefendError for weights that changed since."""
    weights = fingerprints([*(DefenseChoice.parse(label).name for label in config.defenses), config.victim])
    path = run.dir / "certify.json"
    if path.exists():
        check_unchanged(run.dir, json.loads(path.read_text(encoding="utf-8")).get("weights", {}), weights)
        return
    objects = {label: list(certified.objects) for label, certified in tasks.items()}
    run.write("certify.json", json.dumps({"objects": objects, "weights": weights}, indent=2) + "\n")
