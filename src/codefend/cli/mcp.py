"""``codefend mcp-proxy``: an MCP server whose images are purified before the client gets them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from codefend.types import CodefendError

app = typer.Typer(add_completion=False)


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
    flags = {"purifier": purifier, "policy": policy, "text": text, "workers": workers}
    settings = load_settings(config, upstream=NO_UPSTREAM, **flags)
    raise typer.Exit(serve(settings, url or list(command or ()), documents))
