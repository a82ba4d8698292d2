"""The ``codefend`` command: its entry point and help, ``list``, and the verbs of the other files.

Every verb imports what it needs when it runs, so that ``--help`` stays fast. Answers and results go to standard output,
messages to standard error. Exit codes: 0 success, 1 some images failed, 2 invalid input (one line says what to do), 130
interrupted.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from codefend.cli import doctor, evaluation, images, prompts, purify, serve, training
from codefend.types import CodefendError

GROUPS = {
    "Use": ("purify", "ask", "caption", "serve", "mcp-proxy", "export"),
    "Measure": ("attack", "eval", "certify", "challenge", "report", "leaderboard", "demo"),
    "Train": ("pairs", "train", "build-victim", "calibrate", "card", "optimize-prompt", "prompts"),
    "Inspect": ("list", "doctor"),
}
EXAMPLES = {
    "Use": "codefend purify photos/ -o clean/",
    "Measure": "codefend eval quick --run runs/quick && codefend report runs/quick",
    "Train": "codefend train bridge --run runs/bridge --set pairs=runs/pairs",
    "Inspect": "codefend list purifiers",
}


class GroupedVerbs(TyperGroup):
    """A command group whose help lists its verbs by `GROUPS`; verbs in no group come last."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = set(self.list_commands(ctx))
        rest = names - {verb for verbs in GROUPS.values() for verb in verbs}
        for title, verbs in (*GROUPS.items(), ("Other", tuple(sorted(rest)))):
            rows = [(verb, self._summary(ctx, verb)) for verb in verbs if verb in names]
            if not rows:
                continue
            with formatter.section(title):
                formatter.write_dl(rows)
                if title in EXAMPLES:
                    formatter.write_paragraph()
                    formatter.write_text(f"e.g. {EXAMPLES[title]}")

    def _summary(self, ctx: Any, verb: str) -> str:
        command = self.get_command(ctx, verb)
        return "" if command is None else command.get_short_help_str(limit=90)


app = typer.Typer(
    cls=GroupedVerbs,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

REGISTRIES = {
    "purifiers": "codefend.purifiers:PURIFIERS",
    "attacks": "codefend.attacks:EVERY_ATTACK",
    "victims": "codefend.victims:VICTIMS",
    "tasks": "codefend.tasks:TASKS",
    "encoders": "codefend.encoders:ENCODERS",
    "prompts": "codefend.prompts:PROMPTS",
    "presets": "codefend.cli.presets:PRESETS",
}
EXTRA_OF = {  # module that may be missing -> the first extra that brings it
    module: extra for extra, (modules, _) in reversed(doctor.EXTRAS.items()) for module in modules
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; invalid input prints one ``error:`` line, no traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    atexit.register(gc.freeze)  # at exit the collector would go through all of PyTorch, for seconds on a busy machine
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="codefend", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except CodefendError as error:
        code = _print_error(error)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        code = _print_error(f"{error.name} is not installed; run: pip install 'codefend[{extra}]'")
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer's exceptions for wrong options and arguments have it
            raise
        code = _print_error(error.format_message() or "see codefend --help")
    if code == 130:
        print("interrupted; rerun the command to resume", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _print_error(error: object) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _print_version(requested: bool) -> None:
    if requested:
        print(f"codefend {version('codefend')}")
        raise typer.Exit


@app.callback()
def codefend(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
    device: Annotated[
        str,
        typer.Option(envvar="CODEFEND_DEVICE", help="Device: cpu, cuda, cuda:1.", show_default="a GPU if present"),
    ] = "",
    precision: Annotated[
        Literal["float32"] | None,
        typer.Option(
            envvar="CODEFEND_PRECISION", help="Force float32, for reproducible results.", show_default="the fastest"
        ),
    ] = None,
) -> None:
    """Remove adversarial perturbations from images before a multimodal LLM sees them, and evaluate the defense."""
    for name, value in (("CODEFEND_DEVICE", device), ("CODEFEND_PRECISION", precision)):
        if value:
            os.environ[name] = value  # worker processes inherit the environment


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(metavar="|".join(REGISTRIES), help="What to list.", show_default=False)],
) -> None:
    """List purifiers, attacks, victims, tasks, encoders, prompts or presets.

    Example: codefend list purifiers
    """
    table = _load_registry(kind)
    width = max(map(len, table), default=0)
    for name, entry in table.items():
        print(f"{name:{width}}  {summary(entry)}".rstrip())


def _load_registry(kind: str) -> Mapping[str, Any]:
    if kind not in REGISTRIES:
        near = get_close_matches(kind, REGISTRIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose {', '.join(REGISTRIES)}"
        raise CodefendError(f"unknown list {kind!r}; {hint}")
    table: Mapping[str, Any] = resolve_name(REGISTRIES[kind])
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


for verbs in (purify, images, training, evaluation, prompts, serve, doctor):
    app.add_typer(verbs.app)  # without a name: at the top level
