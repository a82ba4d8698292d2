"""Verbs that make weights: pairs, train, build-victim, calibrate, card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

app = typer.Typer()

Preset = Annotated[str, typer.Argument(metavar="PRESET", help="See `codefend list presets`.", show_default=False)]


@app.command()
def pairs(
    preset: Preset = "pairs",
    run: RunFolder = Path("runs/pairs"),
    settings: Settings = [],  # noqa: B006  (Typer copies it)
    file: ConfigFile = None,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", help="Also write the pairs as a Parquet data set into this folder.")
    ] = None,
    workers: Workers = 1,
    engine: Engine = "local",
    worker_cpus: WorkerCpus = 1,
    worker_gpus: WorkerGpus = 0,
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """Generate pairs of adversarial and clean images, to train a purifier on.

    Example: codefend pairs --run runs/pairs
    """
    from codefend.cli.presets import preset_config
    from codefend.training.pairs import PairsConfig, make_pairs

    config = preset_config(preset, settings, PairsConfig, file=file)
    if dry_run:
        print_config(config)
    pool = choose_pool(engine, RayFlags(workers, worker_cpus, worker_gpus, address))
    print(make_pairs(config, run, workers=workers, pool=pool))
    if parquet is not None:
        from codefend.training.pair_tables import write_table

        print(write_table(run, parquet))


@app.command()
def train(
    preset: Preset,
    run: RunFolder,
    settings: Settings = [],  # noqa: B006
    file: ConfigFile = None,
    tracker: Annotated[
        str, typer.Option("--tracker", help="Also log to tensorboard, wandb, mlflow, trackio, ...")
    ] = "",
    dry_run: DryRun = False,
) -> None:
    """Train the model of a preset; weights, curve and config are written into the run folder.

    Example: codefend train bridge --run runs/bridge --set pairs=runs/pairs
    """
    from codefend import training
    from codefend.cli.presets import preset_config

    config = preset_config(preset, settings, file=file)
    if dry_run:
        print_config(config)
    print(training.train(config, run, tracker=tracker))


@app.command("build-victim")
def build_victim(
    name: Annotated[str, typer.Argument(help="smolvlm-pocket.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the checkpoint; new or empty.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights of a training of yours; default: the shipped ones.")
    ] = None,
) -> None:
    """Write a trained victim as a complete Transformers checkpoint, which loads without CoDefend.

    Example: codefend build-victim smolvlm-pocket -o runs/checkpoint
    """
    from codefend.core.assets import asset
    from codefend.types import CodefendError
    from codefend.victims import smolvlm_pocket

    if name != smolvlm_pocket.NAME:
        raise CodefendError(f"victim {name!r} has no checkpoint to build; give {smolvlm_pocket.NAME}")
    print(smolvlm_pocket.build_checkpoint(weights or asset(f"weights/{name}"), out))


@app.command()
def calibrate(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of purifier weights.", show_default=False)],
    settings: Settings = [],  # noqa: B006
    dry_run: DryRun = False,
) -> None:
    """Fit a purifier's detection score on held-out pairs; score and threshold are saved in the weights' config.

    Requires --set pairs=BANK, a bank with another seed than the training's. ``rate`` is the false-positive rate on
    clean images at the threshold. The printed rates are measured on images that neither fit nor threshold used.

    Example: codefend calibrate runs/bridge/weights --set pairs=runs/pairs-held-out
    """
    from codefend.cli.presets import preset_config
    from codefend.training.calibrate import CalibrateConfig
    from codefend.training.calibrate import calibrate as fit

    config = preset_config("calibrate", settings, CalibrateConfig)
    if dry_run:
        print_config(config)
    detector = fit(weights, config)
    rates = detector.calibration["found"]
    shares = ", ".join(f"{rate['share']:.0%} at {eps} (n {rate['n']:.0f})" for eps, rate in rates.items())
    print(
        f"threshold {detector.threshold:.4f}, false positives {detector.false_positive_rate:.2%}; "
        f"attacks detected: {shares}"
    )


@app.command()
def card(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="Folder of trained weights.", show_default=False)],
    run: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A run folder of `codefend eval`.", show_default=False)
    ] = None,
    defense: Annotated[
        str, typer.Option("--defense", help="The defense's name in that run; default: the weights folder.")
    ] = "",
) -> None:
    """Rewrite the model card of weights, optionally with a defense's results from an evaluation.

    Example: codefend card runs/bridge/weights runs/full --defense bridge
    """
    from codefend.training.card import add_results, refresh, results_table

    if run is None:
        print(refresh(weights))
    else:
        print(add_results(weights, results_table(run, defense or str(weights)), str(run)))
