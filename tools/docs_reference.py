"""Generate the reference pages of the command line, the configuration and the gateway in docs/reference.

Usage: python tools/docs_reference.py [FOLDER]
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from codefend.bench import EvalConfig
from codefend.cli import app
from codefend.gateway.app import create_app
from codefend.gateway.config import SECRETS, Settings
from codefend.gateway.headers import HEADERS
from codefend.gateway.routes import DEFAULT_ROUTES, GROUPS

OUT = Path(__file__).parent.parent / "docs" / "reference"


def write(folder: Path) -> None:
    """Write ``cli.md``, ``configuration.md`` and ``gateway.md``."""
    pages = {"cli": command_line(), "configuration": configuration(), "gateway": gateway()}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def command_line() -> str:
    command = typer.main.get_command(app)
    parts = ["# Command line\n\nGenerated from the commands. `codefend VERB --help` prints the same.\n"]
    parts += [section(f"codefend {name}", verb) for name, verb in sorted(leaves(command).items())]
    return "\n".join(parts)


def leaves(command: Any, prefix: str = "") -> dict[str, Any]:
    verbs: dict[str, Any] = {}
    for name, verb in command.commands.items():
        verbs |= leaves(verb, f"{prefix}{name} ") if hasattr(verb, "commands") else {f"{prefix}{name}": verb}
    return verbs


def section(title: str, verb: Any) -> str:
    lines = [f"## {title}", "", (verb.help or "").replace("\n\nExample: ", "\n\nExample: `").strip()]
    if "Example: `" in lines[-1]:
        lines[-1] += "`"
    if title == "codefend serve":
        lines += ["", "Options: every setting of the [gateway](configuration.md), such as `--max-side` for `max_side`."]
    if verb.params:
        lines += ["", "| option | meaning |", "|---|---|"]
    for parameter in verb.params:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        names = names if parameter.param_type_name == "option" else f"`{parameter.metavar or parameter.name.upper()}`"
        lines.append(f"| {names} | {(getattr(parameter, 'help', None) or '').replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def configuration() -> str:
    """The gateway's settings by section, and the settings of an evaluation."""
    parts = [
        "# Configuration",
        "Generated from the code. Settings of the gateway are flags (`--max-side`), environment variables "
        "(`CODEFEND_MAX_SIDE`) or lines of a TOML or YAML file (`max_side`), in this order. Secrets are never flags.",
    ]
    sections: dict[str, list[tuple[str, ...]]] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        default = "required" if field.is_required() else f"`{spell(field.default)}`"
        cells = f"`{name}`", default, (field.description or "") + "; never a flag" * (name in SECRETS)
        sections.setdefault(str(extra["section"]), []).append(cells)
    for section, rows in sections.items():
        parts += [f"## Gateway: {section.lower()}", table(("setting", "default", "meaning"), rows)]
    meanings = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(EvalConfig), re.MULTILINE))
    rows = [
        (f"`{field.name}`", f"`{spell(getattr(EvalConfig(), field.name))}`", meanings[field.name])
        for field in fields(EvalConfig)
    ]
    about = "`codefend eval --set NAME=VALUE`; `--dry-run` prints the settings of a preset."
    parts += ["## Evaluation", about, table(("setting", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def gateway() -> str:
    """Routes, headers and metrics of the gateway."""
    routes = [
        (f"`{group}`", "yes" if group in DEFAULT_ROUTES else "no", "<br>".join(f"`{route}`" for route in paths))
        for group, paths in GROUPS.items()
    ]
    headers = [(f"`{name}`", *about) for name, about in HEADERS.items()]
    meters = create_app(Settings(upstream="http://127.0.0.1:1", purifier="jpeg")).state.meters
    metrics = [
        (f"`{metric.name}{'_total' if metric.type == 'counter' else ''}`", metric.type, metric.documentation)
        for metric in sorted(meters.registry.collect(), key=lambda metric: str(metric.name))
        if metric.name.startswith("codefend_")
    ]
    parts = [
        "# Gateway: routes, headers, metrics",
        "Generated from the code of the gateway.",
        "## Routes",
        "`--routes` names the groups that are served; anything else is answered with 404.",
        table(("group", "served by default", "routes"), routes),
        "## Headers",
        table(("header", "in", "meaning"), headers),
        "## Metrics",
        "`/metrics`, in the text format of Prometheus.",
        table(("metric", "type", "meaning"), metrics),
    ]
    return "\n\n".join(parts) + "\n"


def spell(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "empty"
    if value == "":
        return "empty"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
