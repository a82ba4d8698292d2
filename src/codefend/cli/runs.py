"""The verbs that fill and read run folders: pairs, train, eval, report, demo."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from codefend.core.registry import lookup
from codefend.types import CodefendError

app = typer.Typer()

RunFolder = Annotated[Path, typer.Option("--run", help="Run folder; the same command goes on with it.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the preset.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the config and stop.")]


@app.command()
def pairs(
    preset: Annotated[str, typer.Argument(help="See codefend list presets.")] = "pairs",
    run: RunFolder = Path("runs/pairs"),
    settings: Settings = [],  # noqa: B006  (Typer copies it)
    parquet: Annotated[
        Path | None, typer.Option("--parquet", help="Also write them as a data set into this folder.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Make (adversarial, clean) pairs to train a purifier on."""
    from codefend.training.pairs import PairsConfig, make_pairs

    config = _config(preset, settings, PairsConfig)
    if _shown(config, dry_run):
        return
    print(make_pairs(config, run))
    if parquet is not None:
        from codefend.training.pair_tables import write_table

        print(write_table(run, parquet))


@app.command()
def train(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="See codefend list presets.", show_default=False)],
    run: RunFolder,
    settings: Settings = [],  # noqa: B006
    tracker: Annotated[
        str, typer.Option("--tracker", help="Also show the curve in tensorboard, wandb, mlflow, trackio, ...")
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Train what the preset describes; weights, curve and config end up in the run folder."""
    from codefend import training

    config = _config(preset, settings)
    if not _shown(config, dry_run):
        print(training.train(config, run, tracker=tracker))


@app.command()
def calibrate(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of purifier weights.", show_default=False)],
    settings: Settings = [],  # noqa: B006
    dry_run: DryRun = False,
) -> None:
    """Fit a purifier's detection score on held-out pairs and save it, with its threshold, in the weights' config.

    Give --set pairs=BANK, a bank of another seed than those of the training; rate is the wanted share of clean pictures
    above the threshold. What is printed was measured on pictures that neither the fit nor the threshold has seen.
    """
    from codefend.training.calibrate import CalibrateConfig
    from codefend.training.calibrate import calibrate as fit

    config = _config("calibrate", settings, CalibrateConfig)
    if _shown(config, dry_run):
        return
    detector = fit(weights, config)
    found = detector.calibration["found"]
    shares = ", ".join(f"{share['share']:.0%} at {eps} (n {share['n']:.0f})" for eps, share in found.items())
    print(f"threshold {detector.threshold:.4f}, false positives {detector.false_positive_rate:.2%}; found: {shares}")


@app.command()
def card(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of trained weights.", show_default=False)],
    run: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A run folder of codefend eval.", show_default=False)
    ] = None,
    defense: Annotated[str, typer.Option("--defense", help="The row's name in that run; the folder if left out.")] = "",
) -> None:
    """Write the model card of weights anew, with a defense's results from an evaluation if one is named."""
    from codefend.training.card import add_results, refresh, results_table

    if run is None:
        print(refresh(weights))
    else:
        print(add_results(weights, results_table(run, defense or str(weights)), str(run)))


@app.command("eval")
def eval_(
    run: RunFolder,
    preset: Annotated[str, typer.Argument(help="See codefend list presets.")] = "quick",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples per task.")] = None,
    settings: Settings = [],  # noqa: B006
    victim: Annotated[str, typer.Option("--victim", help="As --set victim=NAME; openai:URL#model, too.")] = "",
    max_asr: Annotated[
        float | None,
        typer.Option("--max-asr", min=0, max=1, help="Exit 1 when attacks succeed on a larger share of images."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Attack and judge every defense on every task; results are rows in the run folder.

    Attackers who see the purifier (T2), by --set: exact gradients threats=T2, averaged over its noise eot=20, through
    the identity attacks=apgd:bpda=true, through fewer evaluations attacks=apgd:process=1, under its detection score
    attacks=apgd:evade=10, on features attacks=feature, from a copy threats=T1 surrogate=FOLDER, knowing the seed
    threats=T2d. Options combine; see the class EvalConfig for all settings.

    --max-asr looks at every defense but the bare victim, on every task and eps, under the strongest threat that the run
    has for it (T2 where it was attacked through itself): the share of images answered right when nobody attacks on
    which any attack, in any submission, made the answer wrong or its target appear.
    """
    from codefend.bench import EvalConfig, evaluate

    changes = [*([f"limit={limit}"] if limit else []), *([f"victim={victim}"] if victim else [])]
    config = _config(preset, [*settings, *changes], EvalConfig)
    if max_asr is not None and hasattr(config, "crafters"):
        raise CodefendError("--max-asr is for one victim; a transfer matrix has several")
    if _shown(config, dry_run):
        return
    rows = evaluate(config, run)
    print(run)
    if max_asr is not None and _above(rows, max_asr):
        raise typer.Exit(1)


def _above(rows: Sequence[Any], limit: float) -> bool:
    """Print each defense's attack success rate to standard error; whether any is above the limit."""
    from codefend.bench.results import BARE, eps_label, strongest, success_rates

    rates = strongest(success_rates(rows))
    defended = {group: rate for group, rate in rates.items() if group.defense != BARE}
    if not rates:
        raise CodefendError("--max-asr: nothing was attacked")
    over = False
    for group, rate in (defended or rates).items():
        bad = not rate.share <= limit  # nan, too: a defense that answers nothing right has shown nothing
        over |= bad
        where = f"{group.task} {group.defense} {group.threat} {eps_label(group.eps, rows[0]['norm'])}".strip()
        verdict = f"above {limit:.0%}" if bad else "ok"
        share = f"{rate.share:.0%}" if rate.n else "no image is answered right when nobody attacks"
        print(f"attack success: {where}: {rate.hits}/{rate.n} ({share}) {verdict}", file=sys.stderr)
    return over


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder of codefend eval.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file; in the run folder if left out.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Also write every row as a table: a .csv or .parquet file.")
    ] = None,
) -> None:
    """Show a run's tables, and write plots and picture panels into one HTML file, with Markdown and CSV beside it."""
    from rich.console import Console

    from codefend.bench import report as reports

    reports.print_summary(run, Console())
    print(reports.write_report(run, out))
    if rows is not None:
        print(reports.export_rows(run, rows))


@app.command()
def leaderboard(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders of codefend eval.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("leaderboard.html"),
) -> None:
    """Rank the defenses of one or several runs by their worst case, with the rules, as one HTML page and Markdown."""
    from codefend.bench.report import write_leaderboard

    print(write_leaderboard(runs, out))


@app.command()
def demo(run: RunFolder = Path("runs/demo")) -> None:
    """Attack a few pictures, defend them, and say whether the system works on this machine."""
    from codefend.cli.demo import run_demo

    raise typer.Exit(run_demo(run))


def _config(name: str, items: Sequence[str], kind: type | None = None) -> Any:
    """Build a preset's config with ``key=value`` settings. Raises CodefendError for unknown names, nearest one named."""
    from codefend.cli.presets import PRESETS
    from codefend.core.settings import check_keys
    from codefend.core.specs import parse_options

    preset, settings = lookup("preset", name, PRESETS), parse_options(items)
    plain_config = preset.build({})
    if kind is not None and not isinstance(plain_config, kind):
        raise CodefendError(f"preset {name!r} is for another verb; `codefend list presets` says which")
    check_keys(plain_config, settings)
    return preset.build(settings)


def _shown(config: Any, dry_run: bool) -> bool:
    from codefend.core.runs import plain

    if dry_run:
        print(json.dumps(plain(config), indent=2, ensure_ascii=False))
    return dry_run
