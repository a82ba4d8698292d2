"""Generate docs/reference/cli.md from the commands. Usage: python tools/docs_reference.py [OUT.md]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from codefend.cli import app

OUT = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"


def write(out: Path) -> None:
    command = typer.main.get_command(app)
    parts = ["# Command line\n\nGenerated from the commands. `codefend VERB --help` prints the same.\n"]
    parts += [section(f"codefend {name}", verb) for name, verb in sorted(leaves(command).items())]
    text = "\n".join(parts)
    out.write_text(text, encoding="utf-8")


def leaves(command: Any, prefix: str = "") -> dict[str, Any]:
    verbs: dict[str, Any] = {}
    for name, verb in command.commands.items():
        verbs |= leaves(verb, f"{prefix}{name} ") if hasattr(verb, "commands") else {f"{prefix}{name}": verb}
    return verbs


def section(title: str, verb: Any) -> str:
    lines = [f"## {title}", "", (verb.help or "").replace("\n\nExample: ", "\n\nExample: `").strip()]
    if "Example: `" in lines[-1]:
        lines[-1] += "`"
    lines += ["", "| option | meaning |", "|---|---|"]
    for parameter in verb.params:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        names = names if parameter.param_type_name == "option" else f"`{parameter.metavar or parameter.name.upper()}`"
        lines.append(f"| {names} | {(getattr(parameter, 'help', None) or '').replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
