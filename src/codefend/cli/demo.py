"""A few test images, attacked and defended, and one sentence: does the system work on this machine?"""

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
OURS = "bridge"
CLEAN_AT_LEAST = 0.6  # score of the undefended model on clean images, mean over tasks
ATTACKED_AT_MOST = 0.4  # of it, left by the attack where nothing defends: else the attack is too weak to show anything
GAIN_AT_LEAST = 0.3  # of it, that the defense brings back


def run_demo(
    run_dir: str | Path,
    *,
    config: EvalConfig = DEMO,
    ours: str = OURS,
    loaders: Loaders | None = None,
    console: Console | None = None,
) -> int:
    """Evaluate ``config`` in ``run_dir``, write the report, print the tables and a verdict. 0 when it works, else 1.

    Run again it goes on, or shows the same verdict at once. Raises CodefendError as ``evaluate`` does.
    """
    from rich.console import Console

    console = console or Console()
    rows = evaluate(config, run_dir, loaders=loaders)
    print_overview(run_dir, console)
    try:
        console.print(f"Report: {write_report(run_dir)}", soft_wrap=True, markup=False, highlight=False)
    except CodefendError as error:  # plots are an extra; the verdict isn't
        console.print(f"No report: {error}", soft_wrap=True, markup=False, highlight=False)
    works, sentence = verdict(rows, ours)
    console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    return 0 if works else 1


def verdict(rows: Sequence[Row], ours: str = OURS) -> tuple[bool, str]:
    """Whether the rows show a model that works, falls to the attack and is brought back by ``ours``; in one sentence.

    Shares are of the undefended clean score, means over the tasks.
    """
    entries = summarize(rows)
    clean = fmean(entry.score.mean for entry in _chosen(entries, BARE, "clean", CLEAN))
    if not clean >= CLEAN_AT_LEAST:
        return False, f"CoDefend does not work on this machine: even on clean images the model scores {clean:.0%} only."
    attacked, defended = _kept(entries, BARE, "T0"), _kept(entries, ours, "T0")
    counts = " and ".join(f"{e.score.n} of task {e.group.task}" for e in _chosen(entries, BARE, "clean", CLEAN))
    facts = (
        f"the attack leaves the undefended model {attacked:.0%} of its clean score, "
        f"and {ours} brings it back to {defended:.0%}"
    )
    seen = _kept(entries, ours, "T2")
    facts += f" ({counts}; an attacker who sees through {ours} leaves {seen:.0%} on fewer images)"
    if attacked > ATTACKED_AT_MOST:
        return False, f"CoDefend could not be shown to work on this machine, as the attack is too weak: {facts}."
    if defended - attacked < GAIN_AT_LEAST:
        return False, f"CoDefend does not work on this machine: {facts}."
    return True, f"CoDefend works on this machine: {facts}."


def _kept(entries: Sequence[Entry], defense: str, threat: str) -> float:
    found = _chosen(entries, defense, threat, WORST)
    return fmean(entry.kept for entry in found) if found else float("nan")


def _chosen(entries: Sequence[Entry], defense: str, threat: str, attack: str) -> list[Entry]:
    wanted = (defense, threat, attack)
    return [e for e in entries if (e.group.defense, e.group.threat, e.group.attack) == wanted]
