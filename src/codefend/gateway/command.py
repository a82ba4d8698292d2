"""``codefend serve``. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)

_MODEL, _IMAGES, _LIMITS, _LOAD = "Model", "Images", "Limits", "Load"


def _option(help_: str, panel: str | None = None, name: str | None = None, **more: Any) -> Any:
    names = () if name is None else (name,)
    return typer.Option(*names, help=help_, show_default=False, rich_help_panel=panel, **more)


@app.command()
def serve(
    upstream: Annotated[str | None, _option("URL of the model's server; or, served here, pocket or hf:ID.")] = None,
    config: Annotated[Path | None, _option("Settings as TOML or YAML; flags and CODEFEND_* come first.")] = None,
    host: Annotated[str | None, _option("Address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, _option("Port to listen on (8800).")] = None,
    purifier: Annotated[str | None, _option("Purifier by name or folder (bridge).", _IMAGES)] = None,
    device: Annotated[str | None, _option("Where it runs: cpu, cuda, mps (cpu).", _IMAGES)] = None,
    policy: Annotated[str | None, _option("purify, detect or block (purify).", _IMAGES)] = None,
    threshold: Annotated[float | None, _option("Score from which detect and block act (calibrated).", _IMAGES)] = None,
    prompt: Annotated[str | None, _option("Prompt policy by name or JSON file (none).", _MODEL)] = None,
    prompt_everywhere: Annotated[bool | None, _option("Also for requests without images.", _MODEL)] = None,
    allow_override: Annotated[bool | None, _option("Let requests choose their policy.", _IMAGES)] = None,
    encoding: Annotated[str | None, _option("auto, png, jpeg or webp (auto).", _IMAGES)] = None,
    on_error: Annotated[str | None, _option("block, fallback or pass (block).", _IMAGES)] = None,
    fallback: Annotated[str | None, _option("Purifier for --on-error fallback (jpeg).", _IMAGES)] = None,
    max_in_flight_per_key: Annotated[int | None, _option("Requests of one key at a time (any).", _LIMITS)] = None,
    max_body_bytes: Annotated[int | None, _option("Bytes of a request (64 MiB).", _LIMITS)] = None,
    max_image_bytes: Annotated[int | None, _option("Bytes of an image file (20 MiB).", _LIMITS)] = None,
    max_pixels: Annotated[int | None, _option("Pixels of an image (64,000,000).", _LIMITS)] = None,
    max_ratio: Annotated[float | None, _option("Longer side over shorter side (100).", _LIMITS)] = None,
    max_side: Annotated[int | None, _option("Longer side that larger images are shrunk to (never).", _LIMITS)] = None,
    max_images: Annotated[int | None, _option("Images of a request (20).", _LIMITS)] = None,
    first_frame: Annotated[bool | None, _option("Take an animation's first frame.", _LIMITS)] = None,
    allow_remote_images: Annotated[bool | None, _option("Fetch https image URLs.", _LIMITS)] = None,
    remote_hosts: Annotated[str | None, _option("The only hosts to fetch from, with commas.", _LIMITS)] = None,
    fetch_timeout_s: Annotated[float | None, _option("Seconds for a remote image (10).", _LIMITS)] = None,
    max_redirects: Annotated[int | None, _option("Redirects of a remote image (3).", _LIMITS)] = None,
    allow_uploads: Annotated[bool | None, _option("Pass on files and batches unseen.", _LIMITS)] = None,
    queue_images: Annotated[int | None, _option("Images that may wait (64).", _LOAD)] = None,
    batch_images: Annotated[int | None, _option("Images per batch (8).", _LOAD)] = None,
    batch_pixels: Annotated[int | None, _option("Pixels per batch (1,000,000).", _LOAD)] = None,
    workers: Annotated[int | None, _option("Processes that decode, purify, encode (2).", _LOAD)] = None,
    isolate: Annotated[bool | None, _option("Workers are processes, not threads (yes).", _LOAD)] = None,
    torch_threads: Annotated[int | None, _option("Threads in a PyTorch operation.", _LOAD)] = None,
    purify_timeout_s: Annotated[float | None, _option("Seconds for an image, queue included (30).", _LOAD)] = None,
    cache_mb: Annotated[int | None, _option("Cache of purified images, MiB (256).", _LOAD)] = None,
    connect_timeout_s: Annotated[float | None, _option("Seconds to reach the upstream (5).", _LOAD)] = None,
    upstream_timeout_s: Annotated[float | None, _option("Seconds of upstream silence (600).", _LOAD)] = None,
    total_timeout_s: Annotated[float | None, _option("Seconds for a whole exchange (3600).", _LOAD)] = None,
    drain_s: Annotated[float | None, _option("Seconds for running requests at the end (30).", _LOAD)] = None,
    page: Annotated[bool | None, _option("The page at /.", None, "--page/--no-page")] = None,
    demo: Annotated[bool | None, _option("The page may ask the undefended model.", None, "--demo/--no-demo")] = None,
    log_level: Annotated[str | None, _option("debug, info, warning or error (info).")] = None,
) -> None:
    """Put CoDefend in front of a multimodal LLM server.

    Keys come from CODEFEND_API_KEYS (for clients, with commas) and CODEFEND_UPSTREAM_API_KEY, or from the file.
    """
    flags = {name: value for name, value in locals().items() if name != "config" and value is not None}
    from codefend.gateway.config import load_settings
    from codefend.gateway.serve import serve as run

    raise typer.Exit(run(load_settings(config, **flags)))
