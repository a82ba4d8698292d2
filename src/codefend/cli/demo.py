"""The demo: attack and defend a few test images, by attackers who do not know the defense and by those who do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from codefend.bench import EvalConfig, evaluate
from codefend.bench.report import print_overview, write_report
from codefend.bench.results import BARE, CLEAN, WORST, Entry, eps_label, summarize
from codefend.core.runs import Row
from codefend.types import CodefendError

if TYPE_CHECKING:
    from rich.console import Console

    from codefend.bench.setup import Loaders

# Sized for two slow cores, where one white-box gradient of the pocket costs 0.3 s an image: 192 of them.
DEMO = EvalConfig(
    defenses=("none", "jpeg", "diffpure:t=0.05,steps=5", "bridge"),
    attacks=("apgd",),
    threats=("T0",),
    steps=12,
    limit=8,
    batch=8,
    panels=3,
)
# An attacker who knows the defense, at a radius where it holds and at one where it does not. `word-head` needs no
# language model: 0.07 s a gradient through the bridge, 640 of them.
ADAPTIVE = EvalConfig(
    tasks=("caption",),
    defenses=("bridge",),
    attacks=("word-head",),
    threats=("T2",),
    eps=(2.0, 8.0),
    steps=20,
    eot=2,  # the bridge draws noise
    limit=8,
    batch=8,
    panels=0,
)
PHOTOGRAPH = EvalConfig(
    tasks=("photo-caption",),
    defenses=("none", "bridge"),
    attacks=("apgd",),
    threats=("T0",),
    eps=(4.0,),
    steps=12,
    limit=1,
    batch=1,
    panels=1,
)
DEFENSE = "bridge"
CLEAN_AT_LEAST = 0.6  # score of the undefended model on clean images, mean over tasks
ATTACKED_AT_MOST = 0.4  # of it, undefended under attack; above, the attack is too weak to show anything
GAIN_AT_LEAST = 0.3  # of it, that the defense restores
HOLDS_AT = 0.5  # of the defense's own clean score, under an adaptive attack


def run_demo(
    run_dir: str | Path,
    *,
    config: EvalConfig = DEMO,
    adaptive: EvalConfig = ADAPTIVE,
    photograph: EvalConfig = PHOTOGRAPH,
    defense: str = DEFENSE,
    loaders: Loaders | None = None,
    console: Console | None = None,
) -> int:
    """Evaluate ``config`` in ``run_dir``, ``adaptive`` and ``photograph`` in its folders; print tables and a verdict.

    Returns 0 when it works, else 1. Rerun it to resume, or to show the verdict again. Raises CodefendError as
    ``evaluate`` does.
    """
    from rich.console import Console

    console = console or Console()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    say("1. An attacker who does not know the defense: the undefended model, and the same images behind each defense.")
    rows = _evaluate(config, Path(run_dir), loaders, console, say)
    say(f"2. An attacker who knows the defense and attacks through {defense}.")
    against = _evaluate(adaptive, Path(run_dir) / "adaptive", loaders, console, say)
    say("3. One photograph, under an attacker who does not know the defense: the model's captions.")
    for row in evaluate(photograph, Path(run_dir) / "photograph", loaders=loaders):
        state = "clean image" if row["threat"] == "clean" else f"attacked at {eps_label(row['eps'], 'linf')}"
        say(f"   {state}, {'undefended' if row['defense'] == BARE else 'with ' + row['defense']}: {row['answer']}")
    works, sentence = verdict(rows, defense)
    say(sentence)
    say(adaptive_verdict(against, defense))
    return 0 if works else 1


def _evaluate(
    config: EvalConfig, run_dir: Path, loaders: Loaders | None, console: Console, say: Callable[[str], None]
) -> Sequence[Row]:
    rows = evaluate(config, run_dir, loaders=loaders)
    print_overview(run_dir, console)
    try:
        say(f"Report: {write_report(run_dir)}")
    except CodefendError as error:  # plots need an extra, the verdict does not
        say(f"No report: {error}")
    return rows


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
        f"and with {defense} {defended:.0%} ({counts})"
    )
    if attacked > ATTACKED_AT_MOST:
        return False, f"Inconclusive, because the attack is too weak: {facts}."
    if defended - attacked < GAIN_AT_LEAST:
        return False, f"CoDefend does not work on this machine: {facts}."
    return True, f"CoDefend works on this machine: {facts}."


def adaptive_verdict(rows: Sequence[Row], defense: str = DEFENSE) -> str:
    """What ``defense`` keeps of its own clean score under the adaptive attack of each radius, and what that means."""
    entries = summarize(rows)
    clean = fmean(entry.score.mean for entry in _select(entries, defense, "clean", CLEAN))
    findings = []
    for entry in sorted(_select(entries, defense, "T2", WORST), key=lambda entry: entry.group.eps):
        share = entry.score.mean / clean if clean > 0 else float("nan")
        effect = "holds" if share >= HOLDS_AT else "is broken"
        findings.append(f"at {eps_label(entry.group.eps, 'linf')} it {effect} ({share:.0%} of its clean score is left)")
    return (
        f"An attacker who knows {defense}: {'; '.join(findings)}. These attacks are short; longer ones, and attacks on "
        "questions, leave less: docs/limitations.md."
    )


def _share(entries: Sequence[Entry], defense: str, threat: str) -> float:
    worst = _select(entries, defense, threat, WORST)
    return fmean(entry.retained for entry in worst) if worst else float("nan")


def _select(entries: Sequence[Entry], defense: str, threat: str, attack: str) -> list[Entry]:
    cell = (defense, threat, attack)
    return [e for e in entries if (e.group.defense, e.group.threat, e.group.attack) == cell]
