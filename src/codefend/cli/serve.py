"""Verbs that serve: serve, whose flags are derived from the gateway's settings when it runs, and mcp-proxy."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand

from codefend.types import CodefendError

app = typer.Typer(add_completion=False)
_HELP = """Put CoDefend in front of a multimodal LLM server.

Secrets (CODEFEND_API_KEYS, CODEFEND_UPSTREAM_API_KEY, CODEFEND_NOISE_SECRET) come from the environment or from files,
because every process of a machine can read command lines.

Example: codefend serve --upstream http://localhost:8000/v1"""


class _LazyCommand(TyperCommand):
    """Builds the command with all its flags when it is called: `codefend --help` needs none of them."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return build_command().make_context(info_name, args, parent, **extra)


class _SectionedCommand(TyperCommand):
    """Lists its flags by section."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def build_command() -> Any:
    """Make a flag of every setting that isn't a secret, and ``--config``."""
    from codefend.gateway.config import SECRETS, Settings

    parameters = [_parameter("config", Path, "settings as TOML or YAML; flags and CODEFEND_* come first", "Options")]
    for name, field in Settings.model_fields.items():
        if name not in SECRETS:
            extra = field.json_schema_extra
            section = str(extra["section"]) if isinstance(extra, dict) else "Options"
            text = f"{field.description}{_default_text(field.default)}"
            parameters.append(_parameter(name, _flag_type(field.annotation), text, section))
    inner = typer.Typer(add_completion=False, rich_markup_mode=None)

    def serve(config: Path | None = None, **flags: Any) -> None:
        from codefend.cli.showcase import showcase
        from codefend.gateway.config import load_settings
        from codefend.gateway.serve import serve as run

        raise typer.Exit(run(lambda: load_settings(config, **flags), showcase=showcase))

    vars(serve)["__signature__"] = inspect.Signature(parameters, return_annotation=None)
    inner.command("serve", cls=_SectionedCommand, help=_HELP)(serve)
    return typer.main.get_command(inner)


def _parameter(name: str, kind: Any, text: str, section: str) -> inspect.Parameter:
    option = typer.Option(None, help=text[:1].upper() + text[1:], show_default=False, rich_help_panel=section)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)


def _flag_type(annotation: Any) -> type:
    """The type that the command line parses; the settings check choices, ranges and lists."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kind = next(kind for kind in kinds if kind is not type(None))
    return kind if get_origin(kind) is None and kind in (bool, int, float, Path) else str


def _default_text(default: Any) -> str:
    from pydantic_core import PydanticUndefined

    if default is None or default == () or default is PydanticUndefined:
        return ""
    if isinstance(default, bool):
        return f" ({'on' if default else 'off'})"
    if isinstance(default, (int, float)):
        return f" ({default:,})" if default != int(default) or default >= 10_000 else f" ({int(default)})"
    return f" ({','.join(default) if isinstance(default, tuple) else default})"


@app.command(cls=_LazyCommand, help=_HELP)
def serve() -> None:
    """A placeholder: `_LazyCommand` builds the real command."""


@app.command("mcp-proxy", context_settings={"allow_interspersed_args": False})
def mcp_proxy(
    command: Annotated[list[str] | None, typer.Argument(help="Command of the server; put -- before it.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Streamable HTTP address of the server, instead of a command.")
    ] = None,
    purifier: Annotated[str | None, typer.Option(help="Purifier by name or folder (bridge).")] = None,
    policy: Annotated[str | None, typer.Option(help="What happens to an image: purify, detect or block.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Text in images: off, report, quote, redact, redact-all or block; needs ocr.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode, purify and encode.")] = 1,
    documents: Annotated[
        Literal["refuse", "pass"], typer.Option(help="PDFs, which may hold any image: refuse, or pass unchanged.")
    ] = "refuse",
    config: Annotated[Path | None, typer.Option(help="Settings of the gateway as TOML or YAML.")] = None,
) -> None:
    """Purify every image that an MCP server sends to its client.

    The client starts this command in place of the server's. Limits, workers and keys are the gateway's settings, as
    CODEFEND_* variables or in --config; CODEFEND_UPSTREAM_API_KEY is sent to a --url.

    Example: codefend mcp-proxy -- npx -y @playwright/mcp@latest
    """
    import_module("mcp")
    from codefend.gateway.config import NO_UPSTREAM, load_settings
    from codefend.integrations.mcp import serve

    if (url is None) == (not command):
        raise CodefendError("give the server's command after --, or --url")
    if url is not None and not url.startswith(("http://", "https://")):
        raise CodefendError(f"--url is the http(s) address of an MCP server, not {url!r}")
    flags = {"purifier": purifier, "policy": policy, "text": text, "workers": workers}
    settings = load_settings(config, upstream=NO_UPSTREAM, **flags)
    raise typer.Exit(serve(settings, url or list(command or ()), documents))
