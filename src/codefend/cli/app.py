"""The ``codefend`` command: its front, ``list``, and the verbs of ``cli_pictures``, ``cli_runs`` and ``cli_prompts``.

Every verb is a thin shell that imports what it needs when it runs, so that ``--help`` stays fast.
Answers and results go to standard output, everything else to standard error. Exit codes: 0 done, 1 some pictures
failed, 2 a mistake of the user's (one line says which), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, Literal

import typer

from codefend import __version__
from codefend.cli import images as cli_pictures
from codefend.cli import prompts as cli_prompts
from codefend.cli import runs as cli_runs
from codefend.cli import serve as gateway
from codefend.types import CodefendError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

REGISTRIES = {
    "purifiers": ("codefend.purifiers", "PURIFIERS"),
    "attacks": ("codefend.attacks", "EVERY_ATTACK"),
    "victims": ("codefend.victims", "VICTIMS"),
    "tasks": ("codefend.tasks", "TASKS"),
    "prompts": ("codefend.prompts", "PROMPTS"),
    "presets": ("codefend.cli.presets", "PRESETS"),
}
EXTRAS = {  # module that may be missing -> the extra that brings it
    "transformers": "pocket",
    "gguf": "pocket",
    "matplotlib": "bench",
    "skimage": "train",
    "jinja2": "bench",
    "starlette": "gateway",
    "uvicorn": "gateway",
    "httpx2": "gateway",
    "prometheus_client": "gateway",
    "pydantic_settings": "gateway",
    "peft": "pocket",
    "sklearn": "train",
    "sacrebleu": "bench",
    "tokenizers": "pocket",
    "gepa": "prompts",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a mistake of the user's is one ``error:`` line, no traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="codefend", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except CodefendError as error:
        code = _complain(error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        code = _complain(f"this needs {error.name}, which is not installed: pip install 'codefend[{extra}]'")
    except Exception as error:
        if not hasattr(error, "format_message"):  # what Typer raises for a wrong option or argument has it
            raise
        code = _complain(error.format_message() or "see codefend --help")
    if code == 130:
        print("interrupted; run the same command again to go on", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _complain(error: object) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"codefend {__version__}")
        raise typer.Exit


@app.callback()
def codefend(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    device: Annotated[
        str, typer.Option(envvar="CODEFEND_DEVICE", help="Where networks run: cpu, cuda, cuda:1.", show_default="a GPU")
    ] = "",
    precision: Annotated[
        Literal["float32"] | None,
        typer.Option(
            envvar="CODEFEND_PRECISION", help="The same figures on any machine.", show_default="what is quick"
        ),
    ] = None,
) -> None:
    """Purify adversarial images before a multimodal LLM sees them, and measure honestly whether it helped."""
    for name, value in (("CODEFEND_DEVICE", device), ("CODEFEND_PRECISION", precision)):
        if value:
            os.environ[name] = value  # worker processes inherit it


@app.command("list")
def list_(kind: Annotated[str, typer.Argument(metavar="|".join(REGISTRIES), show_default=False)]) -> None:
    """Show what can be named on the command line."""
    table = _registry(kind)
    width = max(map(len, table), default=0)
    for name, entry in table.items():
        print(f"{name:{width}}  {summary(entry)}".rstrip())


def _registry(kind: str) -> Mapping[str, Any]:
    if kind not in REGISTRIES:
        near = get_close_matches(kind, REGISTRIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(REGISTRIES)}"
        raise CodefendError(f"unknown list {kind!r}; {hint}")
    module, name = REGISTRIES[kind]
    table: Mapping[str, Any] = getattr(import_module(module), name)
    return table


def summary(entry: Any) -> str:
    """One line about a registry entry: its ``summary``, the text of a tuple, or its docstring's first line."""
    if isinstance(entry, str):
        text = entry
    elif isinstance(entry, tuple) and not hasattr(entry, "summary"):
        text = next((part for part in reversed(entry) if isinstance(part, str)), "")
    else:
        text = getattr(entry, "summary", None) or getattr(entry, "__doc__", None) or ""
    return str(text).strip().partition("\n")[0]


app.add_typer(cli_pictures.app)  # nameless: their verbs stand beside this file's
app.add_typer(cli_runs.app)
app.add_typer(cli_prompts.app)
app.add_typer(gateway.app)

if __name__ == "__main__":
    sys.exit(main())
