"""The gateway's settings, declared once: flags over ``CODEFEND_*`` environment variables over one TOML or YAML file.

The name, type, default, limits, help text and help section of every setting stand in `Settings`. The command line
(`cli/serve.py`), the environment, the file and the help are derived from it. Defaults of the parts (`Limits`,
`LaneOptions`, ...) stand in these parts, which also work without a server.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from codefend.gateway.documents import Documents
from codefend.gateway.options import (
    AccessOptions,
    BudgetOptions,
    ClientLog,
    Encoding,
    FetchOptions,
    GuardrailName,
    LaneOptions,
    Limits,
    Mode,
    OnError,
    PoolOptions,
    Scores,
    UpstreamOptions,
)
from codefend.gateway.routes import DEFAULT_ROUTES, Routes
from codefend.purifiers.text_policy import TextPolicyName
from codefend.types import CodefendError

PREFIX = "CODEFEND_"
# From the environment or a file, never from a flag.
SECRETS = ("api_keys", "upstream_api_key", "noise_secret", "cache_url")
PRESETS: dict[Any, dict[str, Any]] = {  # settings that nobody gave
    # Fidelity first: pages that look clean pass unchanged, and at a size at which clicks still meet.
    "screenshots": {"purifier": "bridge-detail:gate=true", "text": "quote", "max_side": 4096},
}
_VERSIONED = re.compile(r"/(v\d\w*|deployments)(/|$)")  # base paths that need no /v1: Gemini's and Azure's, for example

Part = TypeVar("Part")
Names = Annotated[tuple[str, ...], NoDecode]  # with commas between them


NO_UPSTREAM = "none"  # for what purifies images without passing requests on
EMBEDDED = ("pocket", "smolvlm-pocket")  # victims with shipped weights, for which the page has samples and attacks


def is_embedded(upstream: str) -> bool:
    """Whether the upstream is a victim in this process instead of the address of a server."""
    return upstream in EMBEDDED or upstream.startswith("hf:")


def model_name(upstream: str) -> str:
    """What clients call an embedded model: its name or id, without the folders of this machine."""
    name = upstream.removeprefix("hf:")
    return Path(name).name if Path(name).is_dir() else name


def _setting(default: Any, section: str, text: str, **limits: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"section": section}, **limits)


class Settings(BaseSettings):
    """Everything that ``codefend serve`` can be told. Sizes and times say their units in their names."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    upstream: str = _setting(
        ...,
        "Server",
        "URL of an OpenAI- or Anthropic-compatible server; pocket, smolvlm-pocket or hf:ID, in this process; or none",
    )
    host: str = _setting("127.0.0.1", "Server", "address to listen on")
    port: int = _setting(8800, "Server", "port to listen on", ge=0, le=65535)
    tls_cert: Path | None = _setting(None, "Server", "certificate chain to serve HTTPS with, as a PEM file")
    tls_key: Path | None = _setting(None, "Server", "private key of tls_cert, as a PEM file")
    allowed_hosts: Names = _setting((), "Server", "accepted Host headers; default: loopback names when bound to one")
    trusted_proxies: Names = _setting(
        (), "Server", "addresses or networks of reverse proxies whose X-Forwarded-For names the client; default: none"
    )
    cors_origins: Names = _setting((), "Server", "origins of web pages that may call the API")
    page: bool = _setting(True, "Server", "serve the page at /")
    demo: bool | None = _setting(None, "Server", "let the page ask the undefended model; default: embedded models only")
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Server", "least severe log line")
    log_client: ClientLog = _setting(
        AccessOptions.log_client, "Server", "client addresses in the logs: none, masked or full"
    )
    drain_s: float = _setting(30.0, "Server", "time for running requests at shutdown", ge=0)
    lame_duck_s: float = _setting(0.0, "Server", "time between not ready and shutdown, for load balancers", ge=0)

    preset: Literal["none", "screenshots"] = _setting(
        "none", "Images", "defaults for a kind of images; screenshots: for agents that look at pages"
    )
    purifier: str = _setting("bridge", "Images", "purifier by name or folder")
    device: str = _setting("cpu", "Images", "where the purifier runs: cpu, cuda, cuda:1, mps")
    policy: Mode = _setting("purify", "Images", "what happens to an image: purify, detect or block")
    threshold: float | None = _setting(
        None, "Images", "score from which detect and block act; default: calibrated", ge=0
    )
    allow_override: bool = _setting(False, "Images", "let a request choose policy and threshold by header")
    encoding: Encoding = _setting("auto", "Images", "format of purified images: auto, png, jpeg or webp")
    max_side: int = _setting(
        Limits.max_side, "Images", "shrink images by area averaging to this longer side, in pixels; 0: never", ge=0
    )
    first_frame: bool = _setting(
        Limits.first_frame, "Images", "use the first frame of an animation instead of refusing it"
    )
    all_frames: bool = _setting(
        Limits.all_frames, "Images", "purify every frame of an animation and send it on as an animated WebP"
    )
    documents: Documents = _setting(
        "refuse", "Images", "PDF files: refuse them, or send their pages on as purified images"
    )
    document_side: int = _setting(
        Limits.document_side, "Images", "longer side of a document's page, in pixels", ge=64, le=8192
    )
    on_error: OnError = _setting("block", "Images", "when the purifier itself fails: block, fallback or pass")
    fallback: str = _setting("jpeg", "Images", "purifier for on_error=fallback")
    noise_secret: SecretStr | None = _setting(
        None, "Images", "keys the purifier's noise; the same in all replicas; default: random"
    )
    noise_secret_file: Path | None = _setting(None, "Images", "file that holds noise_secret")
    votes: int = _setting(1, "Images", "answers per request with images, each under other noise; the vote counts", ge=1)
    scores: Scores = _setting("hide", "Images", "detection scores in answers to clients: hide, round or exact")
    text: TextPolicyName = _setting(
        "off", "Images", "text in images: off, report, quote, redact, redact-all or block; needs the ocr extra"
    )
    prompt: str = _setting("none", "Prompts", "prompt policy by name or JSON file")
    prompt_everywhere: bool = _setting(False, "Prompts", "apply the prompt policy to requests without images as well")

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = _setting(
        (), "Access", "keys that clients must present, each with its routes if not all"
    )
    api_keys_file: Path | None = _setting(None, "Access", "file that holds api_keys, one a line")
    routes: Names = _setting(DEFAULT_ROUTES, "Access", "groups of API routes that are served, or paths like /v1/x/*")
    allow_tools: Names = _setting((), "Access", "tools by which the upstream loads content itself, like mcp, web_fetch")
    guardrails: Annotated[tuple[GuardrailName, ...], NoDecode] = _setting(
        (), "Access", "guardrail webhooks to serve: litellm, portkey, aperture"
    )
    allow_remote_images: bool = _setting(FetchOptions.allowed, "Access", "fetch https image URLs from public addresses")
    remote_hosts: Names = _setting(FetchOptions.hosts, "Access", "the only hosts to fetch from")
    allow_image_links: bool = _setting(False, "Access", "pass on http(s) images in Markdown and HTML as text")
    allow_uploads: bool = _setting(
        False, "Access", "pass on files and batches: their images are purified, other files are not inspected"
    )
    requests_per_minute: int = _setting(
        AccessOptions.requests_per_minute, "Access", "requests per key and minute; 0: unlimited", ge=0
    )
    requests_per_day: int = _setting(
        AccessOptions.requests_per_day, "Access", "requests per key and day; 0: unlimited", ge=0
    )
    max_in_flight_per_key: int = _setting(0, "Access", "concurrent requests with images per key; 0: unlimited", ge=0)

    max_body_bytes: int = _setting(Limits.max_body_bytes, "Limits", "size of a request body", gt=0)
    max_image_bytes: int = _setting(Limits.max_image_bytes, "Limits", "size of an image file", gt=0)
    max_pixels: int = _setting(Limits.max_pixels, "Limits", "pixels of an image before it is shrunk", gt=0)
    max_ratio: float = _setting(Limits.max_ratio, "Limits", "longer side over shorter side", ge=1)
    max_images: int = _setting(Limits.max_images, "Limits", "images of a request", ge=0)
    max_buffer_bytes: int = _setting(BudgetOptions.total, "Limits", "request bodies in memory, all together", gt=0)
    body_timeout_s: float = _setting(120.0, "Limits", "time for a request body to arrive", gt=0)
    fetch_timeout_s: float = _setting(FetchOptions.timeout_s, "Limits", "time for a remote image", gt=0)
    max_redirects: int = _setting(FetchOptions.max_redirects, "Limits", "redirects of a remote image", ge=0, le=10)
    max_fetches: int = _setting(FetchOptions.concurrent, "Limits", "remote images fetched at a time", gt=0)

    workers: int = _setting(PoolOptions.workers, "Load", "processes that decode, purify and encode", gt=0, le=64)
    isolate: bool = _setting(True, "Load", "run workers as processes, instead of threads next to the event loop")
    torch_threads: int = _setting(
        PoolOptions.torch_threads, "Load", "threads in a PyTorch operation; 0: share the cores", ge=0
    )
    purify_timeout_s: float = _setting(LaneOptions.timeout_s, "Load", "time for an image, queue included", gt=0)
    guardrail_timeout_s: float | None = _setting(
        None, "Load", "time for a verdict of a guardrail; default: 30 LiteLLM, 2.5 Portkey, 4.5 Aperture", gt=0
    )
    queue_images: int = _setting(LaneOptions.queue_images, "Load", "images that may wait", gt=0)
    queue_pixels: int = _setting(
        LaneOptions.queue_pixels, "Load", "pixels that may wait; 0: as many as can be purified in time", ge=0
    )
    batch_images: int = _setting(LaneOptions.batch_images, "Load", "images sent to a worker at a time", gt=0)
    batch_pixels: int = _setting(
        LaneOptions.batch_pixels, "Load", "pixels sent to a worker at a time; one image may have more", gt=0
    )
    cache_mb: int = _setting(LaneOptions.cache_bytes >> 20, "Load", "cache of purified images, in MiB", ge=0)
    cache_url: SecretStr | None = _setting(
        None, "Load", "Redis whose cache the replicas share: redis://host:6379; needs noise_secret"
    )
    cache_url_file: Path | None = _setting(None, "Load", "file that holds cache_url")
    cache_ttl_s: int = _setting(3600, "Load", "time for which the shared cache holds an image", gt=0)

    upstream_api_key: SecretStr | None = _setting(None, "Upstream", "sent upstream in place of the client's key")
    upstream_api_key_file: Path | None = _setting(None, "Upstream", "file that holds upstream_api_key")
    upstream_ca: Path | None = _setting(None, "Upstream", "certificates to trust for the upstream, as a PEM file")
    upstream_proxy: str | None = _setting(None, "Upstream", "proxy for requests to the upstream: http://host:port")
    connect_timeout_s: float = _setting(UpstreamOptions.connect_timeout_s, "Upstream", "time to connect", gt=0)
    upstream_timeout_s: float = _setting(
        UpstreamOptions.upstream_timeout_s, "Upstream", "time between two pieces of an answer", gt=0
    )
    total_timeout_s: float = _setting(3600.0, "Upstream", "time for a whole exchange, streams included", gt=0)
    upstream_retries: int = _setting(
        UpstreamOptions.upstream_retries, "Upstream", "retries when no connection is made or a GET fails", ge=0, le=10
    )
    breaker_failures: int = _setting(
        UpstreamOptions.breaker_failures, "Upstream", "failures in a row that open the circuit breaker; 0: never", ge=0
    )
    breaker_s: float = _setting(
        UpstreamOptions.breaker_s, "Upstream", "time for which an open circuit breaker refuses", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, data: Any) -> Any:
        """Replace ``X_file`` of each secret by the file's content. Raises ValueError, also where no API key is left."""
        if not isinstance(data, dict):
            return data
        for name in SECRETS:
            file = data.get(f"{name}_file")
            if file is None:
                continue
            if data.get(name):
                raise ValueError(f"give {name} or {name}_file, not both")
            try:
                data = data | {name: Path(file).read_text(encoding="utf-8").strip()}
            except (OSError, ValueError) as error:
                raise ValueError(f"{name}_file: {getattr(error, 'strerror', None) or error}: {file}") from error
            if not data[name]:  # without keys every client would be let in
                raise ValueError(f"{name}_file: {file} is empty")
        if "api_keys" in data and not _split_names(data["api_keys"]):
            raise ValueError("api_keys: no key is given; name one, or leave the setting out to let everyone in")
        return data

    @model_validator(mode="before")
    @classmethod
    def _use_preset(cls, data: Any) -> Any:
        return PRESETS.get(data.get("preset"), {}) | data if isinstance(data, dict) else data

    @field_validator(
        *("api_keys", "remote_hosts", "allowed_hosts", "trusted_proxies", "cors_origins", "routes", "allow_tools"),
        "guardrails",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_names(value)

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in keys:
            name, *routes = key.get_secret_value().split() or [""]
            if len(name) < 8:
                raise ValueError("a key needs at least 8 characters")
            Routes(routes)
        return keys

    @field_validator("upstream_api_key", "noise_secret", "cache_url")
    @classmethod
    def _check_blank(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().strip():
            raise ValueError("the secret is blank: give one, or leave the setting out")
        return value

    @field_validator("noise_secret")
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 16:
            raise ValueError("the secret needs at least 16 characters")
        return value

    @field_validator("routes")
    @classmethod
    def _check_routes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        Routes(names)
        return names

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"{error}; expected addresses or networks like 10.0.0.0/8") from error
        return proxies

    @field_validator("upstream")
    @classmethod
    def _complete_upstream(cls, value: str) -> str:
        if is_embedded(value) or value == NO_UPSTREAM:
            return value
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.fragment or url.username:
            raise ValueError(f"expected http(s)://host[:port][/path][?query], {', '.join(EMBEDDED)} or hf:ID_OR_FOLDER")
        _ = url.port  # raises ValueError for an invalid one
        path = url.path.rstrip("/")
        return url._replace(path=path if _VERSIONED.search(path) else f"{path}/v1").geturl()

    @model_validator(mode="after")
    def _check_consistency(self) -> Settings:
        if self.remote_hosts and not self.allow_remote_images:
            raise ValueError("remote_hosts has no effect without allow_remote_images")
        if self.all_frames and (self.first_frame or is_embedded(self.upstream)):
            raise ValueError("all_frames excludes first_frame and embedded models, which read still images: give one")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key are given together or not at all")
        if self.cache_url is not None and self.noise_secret is None:
            raise ValueError("cache_url needs noise_secret, the same in all replicas: it authenticates the entries")
        return self

    @property
    def with_demo(self) -> bool:
        return self.demo if self.demo is not None else is_embedded(self.upstream)

    @property
    def allowed_routes(self) -> Routes:
        return Routes(self.routes, uploads=self.allow_uploads)

    def part(self, kind: type[Part], **renamed: Any) -> Part:
        """Build the dataclass ``kind`` from the settings of the same names and from ``renamed``."""
        names = {field.name for field in fields(kind)} & set(type(self).model_fields)  # type: ignore[arg-type]
        return kind(**{name: getattr(self, name) for name in names} | renamed)


def _split_names(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in re.split(r"[,\n]", value) if part.strip())
    return value


def load_settings(file: str | Path | None = None, **flags: Any) -> Settings:
    """Read the settings; flags that are None count as not given. Raises CodefendError with one line."""
    _check_environment()
    file = file or os.environ.get(f"{PREFIX}CONFIG")
    content = {} if file is None else _read(Path(file))

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
            return init_settings, env_settings, InitSettingsSource(settings_cls, content)

    try:
        return Layered(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise CodefendError("; ".join(_spell(problem) for problem in error.errors())) from None  # its text shows keys


def _spell(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "missing":
        return f"{name} is missing: give --{name.replace('_', '-')} or {PREFIX}{name.upper()}"
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(name, Settings.model_fields, n=1, cutoff=0.5)
        return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    text = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {text}" if name else text


def _check_environment() -> None:
    """Raise CodefendError for a misspelt variable: it would be ignored, and with it perhaps a limit."""
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
    except CodefendError:
        raise
    except (OSError, ValueError) as error:
        raise CodefendError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        raise CodefendError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise CodefendError(f'{file} holds no settings: expected lines like upstream = "http://..."')
    return {str(key).replace("-", "_"): value for key, value in (data or {}).items()}
