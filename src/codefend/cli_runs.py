"""The verbs that fill and read run folders: pairs, train, eval, report, demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from codefend.registry import lookup
from codefend.types import UserError

app = typer.Typer()

RunFolder = Annotated[Path, typer.Option("--run", help="Run folder; the same command goes on with it.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the preset.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the config and stop.")]


@app.command()
def pairs(
    preset: Annotated[str, typer.Argument(help="See codefend list presets.")] = "pairs",
    run: RunFolder = Path("runs/pairs"),
    settings: Settings = [],  # noqa: B006  (Typer copies it)
    dry_run: DryRun = False,
) -> None:
    """Make (adversarial, clean) pairs to train a purifier on."""
    from codefend.pairs import PairsConfig, make_pairs

    config = _config(preset, settings, PairsConfig)
    if not _shown(config, dry_run):
        print(make_pairs(config, run))


@app.command()
def train(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="See codefend list presets.", show_default=False)],
    run: RunFolder,
    settings: Settings = [],  # noqa: B006
    dry_run: DryRun = False,
) -> None:
    """Train what the preset describes; weights, curve and config end up in the run folder."""
    from codefend import training

    config = _config(preset, settings)
    if not _shown(config, dry_run):
        print(training.train(config, run))


@app.command("eval")
def eval_(
    run: RunFolder,
    preset: Annotated[str, typer.Argument(help="See codefend list presets.")] = "quick",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples per task.")] = None,
    settings: Settings = [],  # noqa: B006
    dry_run: DryRun = False,
) -> None:
    """Attack and judge every defense on every task; results are rows in the run folder."""
    from codefend.evaluate import EvalConfig, evaluate

    config = _config(preset, [*settings, *([f"limit={limit}"] if limit else [])], EvalConfig)
    if not _shown(config, dry_run):
        evaluate(config, run)
        print(run)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder of codefend eval.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file; in the run folder if left out.")
    ] = None,
) -> None:
    """Show a run's tables, and write plots, picture panels and all rows into one HTML file."""
    from rich.console import Console

    from codefend.report import print_summary, write_report

    print_summary(run, Console())
    print(write_report(run, out))


@app.command()
def demo(run: RunFolder = Path("runs/demo")) -> None:
    """Attack a few pictures, defend them, and say whether the system works on this machine."""
    from codefend.demo import run_demo

    raise typer.Exit(run_demo(run))


def _config(name: str, items: Sequence[str], kind: type | None = None) -> Any:
    """Build a preset's config with ``key=value`` settings. Raises UserError for unknown names, nearest one named."""
    from codefend.presets import PRESETS
    from codefend.settings import check_keys, parse_settings

    preset, settings = lookup("preset", name, PRESETS), parse_settings(items)
    plain_config = preset.build({})
    if kind is not None and not isinstance(plain_config, kind):
        raise UserError(f"preset {name!r} is for another verb; `codefend list presets` says which")
    check_keys(plain_config, settings)
    return preset.build(settings)


def _shown(config: Any, dry_run: bool) -> bool:
    from codefend.runs import plain

    if dry_run:
        print(json.dumps(plain(config), indent=2, ensure_ascii=False))
    return dry_run
