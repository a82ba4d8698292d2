"""The demo: attack and defend a few test images and say whether the system works on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from codefend.bench import EvalConfig, evaluate
from codefend.bench.report import print_overview, write_report
from codefend.bench.results import BARE, CLEAN, WORST, Entry, summarize
from codefend.core.runs import Row
from codefend.types import CodefendError

if TYPE_CHECKING:
    from rich.console import Console

    from codefend.bench.loaders import Loaders

# Sized for two slow cores, where one white-box gradient of the pocket costs 0.3 s an image: 192 + 144 of them.
DEMO = EvalConfig(
    defenses=("none", "jpeg", "diffpure:t=0.05,steps=5", "bridge"),
    attacks=("apgd",),
    steps=12,
    limit=8,
    adaptive=("bridge",),
    adaptive_limit=3,
    eot=2,  # the bridge draws noise
    batch=8,
    panels=3,
)
DEFENSE = "bridge"
CLEAN_AT_LEAST = 0.6  # score of the undefended model on clean images, mean over tasks
ATTACKED_AT_MOST = 0.4  # of it, undefended under attack; above, the attack is too weak to show anything
GAIN_AT_LEAST = 0.3  # of it, that the defense restores


def run_demo(
    run_dir: str | Path,
    *,
    config: EvalConfig = DEMO,
    defense: str = DEFENSE,
    loaders: Loaders | None = None,
    console: Console | None = None,
) -> int:
    """Evaluate ``config`` in ``run_dir``, write the report, print the tables and a verdict. 0 when it works, else 1.

    Rerun it to resume, or to show the verdict again. Raises CodefendError as ``evaluate`` does.
    """
    from rich.console import Console

    console = console or Console()
    rows = evaluate(config, run_dir, loaders=loaders)
    print_overview(run_dir, console)
    try:
        console.print(f"Report: {write_report(run_dir)}", soft_wrap=True, markup=False, highlight=False)
    except CodefendError as error:  # plots need an extra, the verdict does not
        console.print(f"No report: {error}", soft_wrap=True, markup=False, highlight=False)
    works, sentence = verdict(rows, defense)
    console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    return 0 if works else 1


def verdict(rows: Sequence[Row], defense: str = DEFENSE) -> tuple[bool, str]:
    """Whether the rows show a working model, a successful attack and a defense that restores accuracy; and a sentence.

    Shares are of the undefended clean score, averaged over the tasks.
    """
    entries = summarize(rows)
    clean = fmean(entry.score.mean for entry in _select(entries, BARE, "clean", CLEAN))
    if not clean >= CLEAN_AT_LEAST:
        return False, f"CoDefend does not work on this machine: the model scores only {clean:.0%} on clean images."
    attacked, defended = _share(entries, BARE, "T0"), _share(entries, defense, "T0")
    counts = " and ".join(f"{e.score.n} of task {e.group.task}" for e in _select(entries, BARE, "clean", CLEAN))
    facts = (
        f"under an oblivious attack the undefended model keeps {attacked:.0%} of its clean score, "
        f"and with {defense} {defended:.0%}"
    )
    adaptive = _share(entries, defense, "T2")
    facts += f" ({counts}); under an adaptive attack {defense} keeps {adaptive:.0%} (fewer images)"
    if attacked > ATTACKED_AT_MOST:
        return False, f"Inconclusive, because the attack is too weak: {facts}."
    if defended - attacked < GAIN_AT_LEAST:
        return False, f"CoDefend does not work on this machine: {facts}."
    return True, f"CoDefend works on this machine: {facts}."


def _share(entries: Sequence[Entry], defense: str, threat: str) -> float:
    worst = _select(entries, defense, threat, WORST)
    return fmean(entry.retained for entry in worst) if worst else float("nan")


def _select(entries: Sequence[Entry], defense: str, threat: str, attack: str) -> list[Entry]:
    cell = (defense, threat, attack)
    return [e for e in entries if (e.group.defense, e.group.threat, e.group.attack) == cell]
