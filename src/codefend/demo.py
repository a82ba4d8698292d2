"""`codefend demo`: attack a few frozen test pictures, defend them, and say in one sentence whether it works here."""

from __future__ import annotations

from pathlib import Path

from codefend.results import Entry

EXAMPLES = 4  # a task
STEPS = 12  # of APGD at 8/255, enough to break the bare pocket
BROKEN = 0.35  # the undefended attacked score must fall below this share of the clean one
RESTORED = 0.25  # and the bridge's must lie this much above it


def run_demo(folder: str | Path) -> int:
    """Evaluate, report, print; return 0 when attack and defense both work on this machine, else 1.

    Raises UserError when the folder holds another evaluation, or weights or packages are missing.
    """
    from rich.console import Console

    from codefend.evaluate import EvalConfig, evaluate
    from codefend.report import print_summary, read_report, write_report

    config = EvalConfig(
        defenses=("none", "jpeg", "diffpure:t=0.05,steps=5", "bridge"),
        attacks=("apgd",),
        steps=STEPS,
        limit=EXAMPLES,
        batch=EXAMPLES,
        adaptive=("bridge",),
        panels=EXAMPLES,
    )
    evaluate(config, folder)
    path = write_report(folder)
    console = Console()
    print_summary(folder, console)
    console.print(f"report: {path}", soft_wrap=True)
    works, sentence = verdict(read_report(folder).entries)
    console.print(sentence, soft_wrap=True)
    return 0 if works else 1


def verdict(entries: list[Entry]) -> tuple[bool, str]:
    """Whether the attack broke the bare victim and the bridge restored it against that same oblivious attack."""
    clean, bare, defended, adaptive = (
        _mean(entries, defense, threat, attack)
        for defense, threat, attack in (
            ("none", "clean", "none"),
            ("none", "T0", "apgd"),
            ("bridge", "T0", "apgd"),
            ("bridge", "T2", "apgd"),
        )
    )
    works = bare <= BROKEN * clean and defended >= bare + RESTORED
    word = "works" if works else "does NOT work as it should"
    return works, (
        f"CoDefend {word} on this machine: the pocket scores {clean:.2f} on clean pictures, {bare:.2f} under attack, "
        f"{defended:.2f} behind the bridge, and {adaptive:.2f} when the attacker attacks through the bridge."
    )


def _mean(entries: list[Entry], defense: str, threat: str, attack: str) -> float:
    """The headline score averaged over the tasks; 0 where there is none."""
    wanted = (defense, threat, attack)
    found = [e.score.mean for e in entries if (e.group.defense, e.group.threat, e.group.attack) == wanted]
    return sum(found) / len(found) if found else 0.0
