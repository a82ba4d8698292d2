"""Verbs for attackers of the shipped defenses: challenge write, challenge score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from codefend.cli.options import DryRun, Settings, print_config

app = typer.Typer()
challenge = typer.Typer(help="Frozen images and budgets to attack the shipped defenses, and the scorer of submissions.")
app.add_typer(challenge, name="challenge")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The challenge's folder.", show_default=False)]


@challenge.command()
def write(
    folder: Folder,
    settings: Settings = [],  # noqa: B006  (Typer copies it)
    dry_run: DryRun = False,
) -> None:
    """Write the images, the budgets and the form of a submission into a new folder. Settings: class ChallengeConfig.

    Example: codefend challenge write challenge --set limit=16
    """
    from codefend.bench.challenge import ChallengeConfig, write_challenge
    from codefend.core.settings import override
    from codefend.core.specs import parse_options

    config = override(ChallengeConfig(), parse_options(settings))
    if dry_run:
        print_config(config)
        return
    print(write_challenge(config, folder))


@challenge.command()
def score(
    folder: Folder,
    submission: Annotated[
        Path, typer.Argument(metavar="SUBMISSION", help="A submission's folder.", show_default=False)
    ],
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the noise.", show_default="fresh")] = None,
) -> None:
    """Check a submission's images against the budget, answer them behind the defense, and write score.json.

    Example: codefend challenge score challenge my-submission
    """
    from codefend.bench.challenge import score_submission

    for row in score_submission(folder, submission, seed=seed)["rows"]:
        low, high = row["interval"]
        print(f"{row['id']}  {row['value']:.3f} [{low:.3f}, {high:.3f}]  n={row['n']}, {row['changed']} changed")
