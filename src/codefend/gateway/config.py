"""The gateway's settings: flags over ``CODEFEND_*`` environment variables over one TOML or YAML file."""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from codefend.types import CodefendError

PREFIX = "CODEFEND_"


def embedded(upstream: str) -> bool:
    """Whether the upstream is a victim in this process and no server's address."""
    return upstream == "pocket" or upstream.startswith("hf:")


class Settings(BaseSettings):
    """Everything that ``codefend serve`` can be told. Sizes and times say their units in their names."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    upstream: str = Field(description="URL of an OpenAI- or Anthropic-compatible server, 'pocket' or hf:ID_OR_FOLDER")
    upstream_api_key: SecretStr | None = Field(None, description="sent upstream in place of the client's key")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8800, ge=0, le=65535, description="port to listen on")

    purifier: str = Field("bridge", description="purifier by name or folder")
    device: str = Field("cpu", description="where the purifier runs: cpu, cuda, cuda:1, mps")
    policy: Literal["purify", "detect", "block"] = Field("purify", description="what becomes of an image")
    threshold: float | None = Field(None, ge=0, description="score that detect and block act from; default: calibrated")
    prompt: str = Field("none", description="prompt policy by name or JSON file")
    prompt_everywhere: bool = Field(False, description="apply the prompt policy to requests without images, too")
    allow_override: bool = Field(False, description="let a request choose policy and threshold by header")
    encoding: Literal["auto", "png", "jpeg", "webp"] = Field("auto", description="format of purified images")

    on_error: Literal["block", "fallback", "pass"] = Field("block", description="when the purifier fails")
    fallback: str = Field("jpeg", description="purifier that on_error=fallback uses")

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field((), description="keys that clients must present")
    max_in_flight_per_key: int = Field(0, ge=0, description="requests with images at a time for one key; 0: any")
    max_body_bytes: int = Field(64 << 20, gt=0)
    max_image_bytes: int = Field(20 << 20, gt=0)
    max_pixels: int = Field(64_000_000, gt=0)
    max_ratio: float = Field(100.0, ge=1)
    max_side: int = Field(0, ge=0, description="longer side that larger images are shrunk to, in pixels; 0: never")
    max_images: int = Field(20, ge=0)
    first_frame: bool = Field(False, description="take an animation's first frame instead of refusing it")
    allow_remote_images: bool = Field(False, description="fetch https image URLs from public addresses")
    remote_hosts: Annotated[tuple[str, ...], NoDecode] = Field((), description="the only hosts to fetch from")
    fetch_timeout_s: float = Field(10.0, gt=0)
    max_redirects: int = Field(3, ge=0, le=10)
    allow_image_links: bool = Field(False, description="pass on http(s) images in Markdown and HTML, as text")
    allow_uploads: bool = Field(False, description="pass on multipart bodies, files and batches unseen")

    queue_images: int = Field(64, gt=0)
    batch_images: int = Field(8, gt=0)
    batch_pixels: int = Field(1_000_000, gt=0, description="decoded at a time in one worker; one image may have more")
    workers: int = Field(2, gt=0, le=64, description="processes that decode, purify and encode")
    isolate: bool = Field(True, description="workers are processes; if false, threads beside the event loop")
    torch_threads: int = Field(0, ge=0, description="threads inside one PyTorch operation; 0: the cores, shared out")
    purify_timeout_s: float = Field(30.0, gt=0)
    cache_mb: int = Field(256, ge=0)
    connect_timeout_s: float = Field(5.0, gt=0)
    upstream_timeout_s: float = Field(600.0, gt=0, description="between two pieces of an upstream's answer")
    total_timeout_s: float = Field(3600.0, gt=0, description="for one whole exchange, streams included")
    drain_s: float = Field(30.0, ge=0, description="for running requests when asked to stop")

    page: bool = Field(True, description="serve the page at /")
    demo: bool | None = Field(None, description="let the page ask the undefended model, too; default: pocket only")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("api_keys", "remote_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _long_enough(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < 8 for key in keys):
            raise ValueError("a key needs at least 8 characters")
        return keys

    @field_validator("upstream")
    @classmethod
    def _base(cls, value: str) -> str:
        if embedded(value):
            return value
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment or url.username:
            raise ValueError("expected http(s)://host[:port][/path], 'pocket' or hf:ID_OR_FOLDER")
        _ = url.port  # raises ValueError for one that cannot be
        base = value.rstrip("/")
        return base if base.endswith("/v1") else f"{base}/v1"

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.remote_hosts and not self.allow_remote_images:
            raise ValueError("remote_hosts has no effect without allow_remote_images")
        return self

    @property
    def with_demo(self) -> bool:
        return self.demo if self.demo is not None else embedded(self.upstream)


def load_settings(file: str | Path | None = None, **flags: Any) -> Settings:
    """Read the settings; flags that are None count as not given. Raises CodefendError in one line for anything wrong."""
    _check_environment()
    file = file or os.environ.get(f"{PREFIX}CONFIG")
    written = {} if file is None else _read(Path(file))

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, written)

    try:
        return Layered(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise CodefendError("; ".join(_spell(problem) for problem in error.errors())) from None  # its text shows keys


def _spell(problem: Any) -> str:
    name = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "missing":
        return f"{name} is missing: give --{name.replace('_', '-')} or {PREFIX}{name.upper()}"
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
        return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    text = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {text}" if name else text


def _check_environment() -> None:
    """A misspelt variable would be ignored, and with it perhaps a limit."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {f"{PREFIX}CONFIG"}
    for name in os.environ:
        if name.startswith(PREFIX) and name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.85)
            if near:
                raise CodefendError(f"unknown environment variable {name}; did you mean {near[0]}?")


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix.lower() in (".yaml", ".yml"):
            try:
                yaml = import_module("yaml")
            except ModuleNotFoundError as error:
                raise CodefendError(f"{file}: YAML needs PyYAML (pip install pyyaml), or write it as TOML") from error
            data = yaml.safe_load(text)
        else:
            data = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise CodefendError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        raise CodefendError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise CodefendError(f'{file} holds no settings: expected lines like upstream = "http://..."')
    return {str(key).replace("-", "_"): value for key, value in (data or {}).items()}
