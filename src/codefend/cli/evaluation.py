"""Verbs that measure: eval, certify, report, leaderboard, demo, challenge write and challenge score."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from codefend.cli.options import (
    Address,
    ConfigFile,
    DryRun,
    Engine,
    RayFlags,
    RunFolder,
    Settings,
    WorkerCpus,
    WorkerGpus,
    Workers,
    choose_pool,
    print_config,
)
from codefend.types import CodefendError

app = typer.Typer()
challenge = typer.Typer(help="Frozen images and budgets to attack the shipped defenses, and the scorer of submissions.")
app.add_typer(challenge, name="challenge")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The challenge's folder.", show_default=False)]


@app.command("eval")
def eval_(
    run: RunFolder,
    preset: Annotated[str, typer.Argument(help="See `codefend list presets`.")] = "quick",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples per task.")] = None,
    settings: Settings = [],  # noqa: B006  (Typer copies it)
    file: ConfigFile = None,
    victim: Annotated[str, typer.Option("--victim", help="Short for --set victim=NAME.")] = "",
    max_asr: Annotated[
        float | None,
        typer.Option("--max-asr", min=0, max=1, help="Exit with 1 when an attack success rate is above this."),
    ] = None,
    workers: Workers = 1,
    engine: Engine = "local",
    worker_cpus: WorkerCpus = 1,
    worker_gpus: WorkerGpus = 0,
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """Attack and evaluate every defense on every task; results are rows in the run folder. Rerun to resume.

    Adaptive attackers (T2), set with --set: exact gradients threats=T2; averaged over the noise eot=20; identity
    gradient attacks=apgd:bpda=true; fewer evaluations attacks=apgd:process=1; below the detection threshold
    attacks=apgd:evade=10; on features attacks=feature; transfer from a copy threats=T1 surrogate=FOLDER; known seed
    threats=T2d. Options combine. All settings: class EvalConfig.

    --max-asr checks every defense except "none" under the strongest threat model that the run holds for it. The attack
    success rate is the share of images answered correctly without an attack for which any attack, in any submission,
    changed the answer to a wrong one or reached its target.

    Example: codefend eval quick --run runs/quick && codefend report runs/quick
    """
    from codefend.bench import EvalConfig, TransferConfig, evaluate
    from codefend.cli.presets import preset_config

    changes = [*([f"limit={limit}"] if limit else []), *([f"victim={victim}"] if victim else [])]
    config = preset_config(preset, [*settings, *changes], EvalConfig, file=file)
    if max_asr is not None and isinstance(config, TransferConfig):
        raise CodefendError("--max-asr is for one victim; a transfer matrix has several")
    if dry_run:
        print_config(config)
    pool = choose_pool(engine, RayFlags(workers, worker_cpus, worker_gpus, address))
    rows = evaluate(config, run, workers=workers, pool=pool)
    print(run)
    if max_asr is not None and _exceeds(rows, max_asr):
        raise typer.Exit(1)


def _exceeds(rows: Sequence[Any], limit: float) -> bool:
    """Print each defense's attack success rate to standard error; return whether any is above the limit."""
    from codefend.bench.results import BARE, eps_label, strongest, success_rates

    rates = strongest(success_rates(rows))
    defended = {group: rate for group, rate in rates.items() if group.defense != BARE}
    if not rates:
        raise CodefendError("--max-asr: the run holds no attack")
    exceeded = False
    for group, rate in (defended or rates).items():
        above = not rate.share <= limit  # also nan: without a correct clean answer nothing was measured
        exceeded |= above
        cell = f"{group.task} {group.defense} {group.threat} {eps_label(group.eps, rows[0]['norm'])}".strip()
        share = f"{rate.share:.0%}" if rate.n else "no clean image is answered correctly"
        verdict = f"above {limit:.0%}" if above else "ok"
        print(f"attack success: {cell}: {rate.hits}/{rate.n} ({share}) {verdict}", file=sys.stderr)
    return exceeded


@app.command()
def certify(
    run: RunFolder,
    preset: Annotated[str, typer.Argument(help="See `codefend list presets`.")] = "certify",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples per task.")] = None,
    settings: Settings = [],  # noqa: B006  (Typer copies it)
    file: ConfigFile = None,
    victim: Annotated[str, typer.Option("--victim", help="Short for --set victim=NAME.")] = "",
    estimate: Annotated[bool, typer.Option("--estimate", help="Measure and print the cost, and exit.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Certify answers by randomized smoothing, with an l2 radius for each. Rerun to resume.

    The purifier is the denoiser behind its own noise; the victim must answer greedily. Questions: the answer's text.
    Captions: the objects that they name, all together. All settings: class CertifyConfig.

    Example: codefend certify --run runs/certify --limit 8 && codefend report runs/certify
    """
    from codefend.bench.certify import CertifyConfig, run_certify
    from codefend.cli.presets import preset_config

    changes = [*([f"limit={limit}"] if limit else []), *([f"victim={victim}"] if victim else [])]
    config = preset_config(preset, [*settings, *changes], CertifyConfig, file=file)
    if dry_run:
        print_config(config)
    run_certify(config, run, estimate_only=estimate)
    print(run)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder of `codefend eval`.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file; default: in the run folder.")] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Also write all rows as a table, .csv or .parquet.")
    ] = None,
) -> None:
    """Print a run's tables and write them, with plots and example images, to one HTML file, Markdown and CSV.

    Example: codefend report runs/quick
    """
    from rich.console import Console

    from codefend.bench import report as reports

    reports.print_summary(run, Console())
    print(reports.write_report(run, out))
    if rows is not None:
        print(reports.export_rows(run, rows))


@app.command()
def leaderboard(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders of `codefend eval`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("leaderboard.html"),
) -> None:
    """Rank the defenses of one or more runs by their worst case, as HTML and Markdown, with the rules.

    Example: codefend leaderboard runs/quick runs/standard -o leaderboard.html
    """
    from codefend.bench.report import write_leaderboard

    print(write_leaderboard(runs, out))


@app.command()
def demo(run: RunFolder = Path("runs/demo")) -> None:
    """Attack a few images, defend them, and report whether the system works on this machine.

    Example: codefend demo
    """
    from codefend.cli.demo import run_demo

    raise typer.Exit(run_demo(run))


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
