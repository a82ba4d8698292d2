"""Options and checks that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

import typer

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
EngineName = Literal["local", "ray"]
Engine = Annotated[EngineName, typer.Option("--engine", help="local, or ray for a cluster.")]
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


def choose_pool(engine: EngineName, flags: RayFlags) -> StartPool | None:
    """The worker processes of ``--engine``; None for this machine's. Raises CodefendError for a missing package."""
    if engine == "local":
        return None
    from codefend.integrations.ray import RayOptions, ray_pool

    return ray_pool(RayOptions(*flags))


def print_config(config: Any) -> NoReturn:
    """Print a config as JSON and exit, for ``--dry-run``."""
    from codefend.core.runs import plain

    print(json.dumps(plain(config), indent=2, ensure_ascii=False))
    raise typer.Exit


def check_output(out: Path, overwrite: bool) -> None:
    """Raise CodefendError when ``out`` exists and may not be replaced."""
    if out.exists() and not overwrite:
        raise CodefendError(f"{out} exists; use --overwrite to replace it")
