"""Options and checks that several verbs share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from codefend.core.compat import OLD_ABLATION
from codefend.core.specs import lookup
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.core.processes import StartPool

MAX_PIXELS = 64_000_000  # equals images.MAX_PIXELS, whose import would load torch

RunFolder = Annotated[Path, typer.Option("--run", help="Run folder; rerun the command to resume.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; repeat.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="TOML or JSON file of settings; --set overrides it.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the config and exit.")]
VictimName = Annotated[str, typer.Option("--victim", help="The model: a name, hf:ID_OR_FOLDER or openai:URL#MODEL.")]
DefenseName = Annotated[
    str, typer.Option("--defense", help="none, a purifier or a weights folder; append +prompt=POLICY for a policy.")
]
PurifierName = Annotated[str, typer.Option("--purifier", help="A purifier's name or its weights folder.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the purifier's and the attack's noise.")]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="Refuse images with more pixels.")]
FirstFrame = Annotated[bool, typer.Option("--first-frame", help="Use the first frame of an animation.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")]

Workers = Annotated[
    int, typer.Option("--workers", min=1, help="Processes, each with models of its own; the rows are the same.")
]
Engine = Annotated[str, typer.Option("--engine", help="local, or ray for a cluster.")]
WorkerCpus = Annotated[float, typer.Option("--worker-cpus", help="Ray: cores of each worker.")]
WorkerGpus = Annotated[float, typer.Option("--worker-gpus", help="Ray: GPUs of each worker, such as 0.5.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray: the cluster; default: RAY_ADDRESS, else one on this machine.")
]


class RayFlags(NamedTuple):
    """The flags of a Ray cluster, in the order of `integrations.ray.RayOptions`."""

    workers: int
    cpus: float
    gpus: float
    address: str | None


ONE_PROCESS = RayFlags(1, 1, 0, None)


def check_engine(name: str) -> None:
    """Raise CodefendError for an unknown engine."""
    if name not in ("local", "ray"):
        raise CodefendError(f"unknown engine {name!r}; known: local, ray")


def choose_pool(engine: str, flags: RayFlags) -> StartPool | None:
    """The worker processes of ``--engine``; None for this machine's. Raises CodefendError for an unknown engine."""
    check_engine(engine)
    if engine == "local":
        return None
    from codefend.integrations.ray import RayOptions, ray_pool

    return ray_pool(RayOptions(*flags))


def preset_config(name: str, items: Sequence[str], kind: type | None = None, *, file: Path | None = None) -> Any:
    """Build the config of preset ``name`` with the settings of ``file`` and ``key=value`` overrides.

    Raises CodefendError for an unknown preset or key (the nearest is named), for a preset of another verb, and for a
    file that cannot be read.
    """
    from codefend.cli.presets import PRESETS
    from codefend.core.settings import check_keys, read_settings
    from codefend.core.specs import parse_options

    if name.startswith(OLD_ABLATION):
        raise CodefendError(
            f"write bridge --config recipes/ablations/{name.removeprefix(OLD_ABLATION)}.toml for {name}"
        )
    preset = lookup("preset", name, PRESETS)
    settings = {**(read_settings(file) if file else {}), **parse_options(items)}
    defaults = preset.build({})
    if kind is not None and not isinstance(defaults, kind):
        raise CodefendError(f"preset {name!r} belongs to another verb; see `codefend list presets`")
    check_keys(defaults, settings)
    return preset.build(settings)


def print_config(config: Any) -> None:
    """Print a config as JSON, for ``--dry-run``."""
    from codefend.core.runs import plain

    print(json.dumps(plain(config), indent=2, ensure_ascii=False))


def check_output(out: Path, overwrite: bool) -> None:
    """Raise CodefendError when ``out`` exists and may not be replaced."""
    if out.exists() and not overwrite:
        raise CodefendError(f"{out} exists; use --overwrite to replace it")
