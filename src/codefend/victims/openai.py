"""Any OpenAI-compatible endpoint as a black-box victim, ``openai:URL#model``: it answers text only.

Options follow the model as in an address: ``openai:http://localhost:8000/v1#llava?rpm=60&concurrency=2``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from codefend.core.assets import needs
from codefend.core.images import encode_data_url
from codefend.core.settings import override
from codefend.core.specs import parse_endpoint
from codefend.types import CodefendError
from codefend.victims.answers import ResponseCache, content_key, default_cache

PREFIX = "openai:"


@dataclass(frozen=True)
class Options:
    """The options behind the model's name. ``rpm``: requests per minute, retries included; 0: no limit."""

    rpm: float = 0.0
    concurrency: int = 4
    retries: int = 6  # with exponential backoff, or as long as the endpoint asks (Retry-After)
    timeout: float = 120.0  # seconds, of one request
    max_tokens: int = 128
    key: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    cache: str = ""  # a file; default: the user's cache folder


def parse(name: str) -> tuple[str, str, Options]:
    """URL, model and options of ``openai:URL#model?...``. Raises CodefendError for anything else."""
    endpoint = parse_endpoint(name)
    options = override(Options(), endpoint.options)
    for field in fields(options):
        value = getattr(options, field.name)
        if not isinstance(value, str) and value < (0 if field.name in ("rpm", "retries") else 1):
            raise CodefendError(f"{field.name}={value:g} is too small")
    return endpoint.url, endpoint.model, options


class Pace:
    """Spaces requests so that no more than ``rpm`` start in a minute, over all threads."""

    def __init__(self, rpm: float) -> None:
        self._gap = 60 / rpm if rpm else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self, _: object = None) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._gap
        if start > now:
            time.sleep(start - now)


class OpenAIVictim:
    """A black box behind an OpenAI-compatible endpoint; images are sent as PNG, without loss.

    Repeated questions are answered from a cache on disk. Temperature 0 unless the model refuses it.
    ``generate`` raises CodefendError when the endpoint cannot be reached, refuses the key, lacks the model or gives up.
    """

    def __init__(self, name: str) -> None:
        self.url, self.model, self.options = parse(name)
        self.name = f"{PREFIX}{self.url}#{self.model}"
        _library()
        self._pace = Pace(self.options.rpm)
        self._cache = ResponseCache(Path(self.options.cache) if self.options.cache else default_cache())
        self._limits: dict[str, Any] = {"max_tokens": self.options.max_tokens, "temperature": 0}

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        """Answers ``[B]`` to ``images`` ``[B, 3, H, W]``; those before an error stay in the cache."""
        urls = [encode_data_url(image, "PNG") for image in images.detach().cpu()]
        failed = threading.Event()

        def answer(url: str, prompt: str) -> str:
            if failed.is_set():  # pending requests are not sent
                return ""
            try:
                return self._answer(client, url, prompt)
            except CodefendError:
                failed.set()
                raise

        with self._connect() as client, ThreadPoolExecutor(self.options.concurrency) as pool:
            jobs = [pool.submit(answer, url, prompt) for url, prompt in zip(urls, prompts, strict=True)]
            try:
                return [job.result() for job in jobs]
            finally:
                failed.set()

    def _connect(self) -> Any:
        openai = _library()
        return openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get(self.options.key) or "none",  # local servers mostly need none
            max_retries=self.options.retries,
            timeout=self.options.timeout,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._pace.wait]}),
        )

    def _answer(self, client: Any, url: str, prompt: str) -> str:
        key = content_key(self.url, self.model, self.options.max_tokens, prompt, url)
        known = self._cache.get(key)
        if known is not None:
            return known
        answer = self._ask(client, url, prompt)
        self._cache.put(key, answer)
        return answer

    def _ask(self, client: Any, url: str, prompt: str) -> str:
        import openai

        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        message: Any = {"role": "user", "content": content}
        for _ in range(3):
            limits = dict(self._limits)
            try:
                reply = client.chat.completions.create(model=self.model, messages=[message], **limits)
                return self._text(reply)
            except openai.BadRequestError as error:
                if not self._adapt(limits, str(error)):
                    raise self._user_error(error) from error
            except openai.OpenAIError as error:
                raise self._user_error(error) from error
        raise CodefendError(f"{self.url} refuses every way to limit the answer's length")

    def _adapt(self, limits: dict[str, Any], message: str) -> bool:
        """Adapt to a model with another name for the limit, or without a temperature; returns whether to try again."""
        adapted = dict(limits)
        if "max_completion_tokens" in message and "max_tokens" in adapted:
            adapted["max_completion_tokens"] = adapted.pop("max_tokens")
        elif "temperature" in message:
            adapted.pop("temperature", None)
        self._limits = adapted
        return adapted != limits

    def _text(self, reply: Any) -> str:
        try:
            message = reply.choices[0].message
            return str(message.content or getattr(message, "refusal", None) or "").strip()
        except (AttributeError, IndexError, TypeError) as error:
            raise CodefendError(
                f"{self.url} did not answer with a chat completion; does the address end in /v1?"
            ) from error

    def _user_error(self, error: Exception) -> CodefendError:
        """The error for the user: one line, cause then remedy."""
        import openai

        resume = "answers so far are saved: rerun the command to resume"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return CodefendError(
                f"{self.url} refused the key; set {self.options.key} to one that may use {self.model!r}"
            )
        if isinstance(error, openai.NotFoundError):
            return CodefendError(
                f"{self.url} knows no model {self.model!r}, or isn't the API's address (most end in /v1)"
            )
        if isinstance(error, openai.RateLimitError):
            return CodefendError(f"{self.url} still refuses: too many requests, or no quota; lower ?rpm=; {resume}")
        if isinstance(error, openai.APITimeoutError):
            return CodefendError(
                f"{self.url} did not answer within {self.options.timeout:g} s; raise ?timeout=; {resume}"
            )
        if isinstance(error, openai.APIConnectionError):
            return CodefendError(f"cannot reach {self.url} ({error.__cause__ or error}); is it running? {resume}")
        return CodefendError(f"{self.url} failed: {str(error)[:300]}; {resume}")


def _library() -> Any:
    with needs("an openai: victim", "api"):
        import openai
    return openai
