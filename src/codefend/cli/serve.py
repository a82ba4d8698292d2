"""``codefend serve``. Heavy imports wait until it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False)

_MODEL, _IMAGES, _LIMITS, _LOAD = "Model", "Images", "Limits", "Load"
FLAGS: tuple[tuple[str, type, str, str | None], ...] = (  # name, type, help, panel; none is required
    ("upstream", str, "URL of the model's server; or, served here, pocket or hf:ID.", None),
    ("config", Path, "Settings as TOML or YAML; flags and CODEFEND_* come first.", None),
    ("host", str, "Address to listen on (127.0.0.1).", None),
    ("port", int, "Port to listen on (8800).", None),
    ("purifier", str, "Purifier by name or folder (bridge).", _IMAGES),
    ("device", str, "Where it runs: cpu, cuda, mps (cpu).", _IMAGES),
    ("policy", str, "purify, detect or block (purify).", _IMAGES),
    ("threshold", float, "Score from which detect and block act (calibrated).", _IMAGES),
    ("prompt", str, "Prompt policy by name or JSON file (none).", _MODEL),
    ("prompt_everywhere", bool, "Also for requests without images.", _MODEL),
    ("allow_override", bool, "Let requests choose their policy.", _IMAGES),
    ("encoding", str, "auto, png, jpeg or webp (auto).", _IMAGES),
    ("on_error", str, "block, fallback or pass (block).", _IMAGES),
    ("fallback", str, "Purifier for --on-error fallback (jpeg).", _IMAGES),
    ("max_in_flight_per_key", int, "Requests of one key at a time (any).", _LIMITS),
    ("max_body_bytes", int, "Bytes of a request (64 MiB).", _LIMITS),
    ("max_image_bytes", int, "Bytes of an image file (20 MiB).", _LIMITS),
    ("max_pixels", int, "Pixels of an image (64,000,000).", _LIMITS),
    ("max_ratio", float, "Longer side over shorter side (100).", _LIMITS),
    ("max_side", int, "Longer side that larger images are shrunk to (never).", _LIMITS),
    ("max_images", int, "Images of a request (20).", _LIMITS),
    ("first_frame", bool, "Take an animation's first frame.", _LIMITS),
    ("allow_remote_images", bool, "Fetch https image URLs.", _LIMITS),
    ("remote_hosts", str, "The only hosts to fetch from, with commas.", _LIMITS),
    ("fetch_timeout_s", float, "Seconds for a remote image (10).", _LIMITS),
    ("max_redirects", int, "Redirects of a remote image (3).", _LIMITS),
    ("allow_image_links", bool, "Pass on http(s) images in Markdown and HTML, as text.", _LIMITS),
    ("allow_uploads", bool, "Pass on files and batches unseen.", _LIMITS),
    ("queue_images", int, "Images that may wait (64).", _LOAD),
    ("batch_images", int, "Images per batch (8).", _LOAD),
    ("batch_pixels", int, "Pixels per batch (1,000,000).", _LOAD),
    ("workers", int, "Processes that decode, purify, encode (2).", _LOAD),
    ("isolate", bool, "Workers are processes, not threads (yes).", _LOAD),
    ("torch_threads", int, "Threads in a PyTorch operation.", _LOAD),
    ("purify_timeout_s", float, "Seconds for an image, queue included (30).", _LOAD),
    ("cache_mb", int, "Cache of purified images, MiB (256).", _LOAD),
    ("connect_timeout_s", float, "Seconds to reach the upstream (5).", _LOAD),
    ("upstream_timeout_s", float, "Seconds of upstream silence (600).", _LOAD),
    ("total_timeout_s", float, "Seconds for a whole exchange (3600).", _LOAD),
    ("drain_s", float, "Seconds for running requests at the end (30).", _LOAD),
    ("page", bool, "The page at /.", None),
    ("demo", bool, "The page may ask the undefended model.", None),
    ("log_level", str, "debug, info, warning or error (info).", None),
)


def _takes_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Let Typer see a parameter for each flag: two score of them are a table, not a signature."""

    def parameter(name: str, kind: type, help_: str, panel: str | None) -> inspect.Parameter:
        option = typer.Option(None, help=help_, show_default=False, rich_help_panel=panel)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)

    vars(function)["__signature__"] = inspect.Signature([parameter(*flag) for flag in FLAGS], return_annotation=None)
    return function


@app.command()
@_takes_flags
def serve(config: Path | None = None, **flags: Any) -> None:
    """Put CoDefend in front of a multimodal LLM server.

    Keys come from CODEFEND_API_KEYS (for clients, with commas) and CODEFEND_UPSTREAM_API_KEY, or from the file.
    """
    from codefend.gateway.config import load_settings
    from codefend.gateway.serve import serve as run

    given = {name: value for name, value in flags.items() if value is not None}
    raise typer.Exit(run(load_settings(config, **given)))
