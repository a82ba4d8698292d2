"""A media connector for vLLM: images are purified where vLLM loads them, with no proxy in front.

Start vLLM with ``VLLM_MEDIA_CONNECTOR=codefend``; the purifier is ``CODEFEND_PURIFIER`` (``bridge`` when not set).
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

from codefend.gateway.engine import Engine
from codefend.gateway.errors import Refused
from codefend.gateway.fetch import Fetcher
from codefend.gateway.limits import payload
from codefend.gateway.local import local_engine
from codefend.gateway.options import FetchOptions, Limits
from codefend.purifiers.base import Purifier

NAME = "codefend"
_WHY = "codefend cannot inspect this medium for images, so it is not loaded"


def register(purifier: str | Purifier | None = None) -> Any:
    """Register the connector with vLLM and return its class; vLLM calls this as a ``general_plugins`` entry point.

    Remote images are fetched only with ``CODEFEND_ALLOW_REMOTE_IMAGES=1``, then by CoDefend's own guarded fetcher.
    """
    media = import_module("vllm.multimodal.media")
    engine = local_engine(purifier or os.environ.get("CODEFEND_PURIFIER", "bridge"))
    remote = os.environ.get("CODEFEND_ALLOW_REMOTE_IMAGES", "").lower() in ("1", "true", "yes")
    threads = ThreadPoolExecutor(2, thread_name_prefix="codefend")

    class CodefendMediaConnector(media.MediaConnector):  # type: ignore[misc,name-defined]
        """Every image is replaced by a purified data URL before vLLM decodes it; videos and embeddings are refused."""

        def fetch_image(self, image_url: str, *args: Any, **kwargs: Any) -> Any:
            return super().fetch_image(threads.submit(self._purified, image_url).result(), *args, **kwargs)

        async def fetch_image_async(self, image_url: str, *args: Any, **kwargs: Any) -> Any:
            loop = asyncio.get_running_loop()
            url = await loop.run_in_executor(threads, self._purified, image_url)
            return await super().fetch_image_async(url, *args, **kwargs)

        def _purified(self, url: str) -> str:
            hosts = tuple(getattr(self, "allowed_media_domains", None) or ())
            return purified_url(url, engine, FetchOptions(remote, hosts))

        def _refused(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError(_WHY)

        async def _refused_async(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError(_WHY)

        fetch_video = fetch_video_and_audio = fetch_image_embedding = fetch_video_embedding = _refused
        fetch_video_async = fetch_video_and_audio_async = _refused_async
        fetch_image_embedding_async = fetch_video_embedding_async = _refused_async

    media.MEDIA_CONNECTOR_REGISTRY.register(NAME)(CodefendMediaConnector)
    return CodefendMediaConnector


def purified_url(url: str, engine: Engine, options: FetchOptions) -> str:
    """Turn an image URL into the data URL of the purified image, in a thread without an event loop.

    Raises ValueError, which vLLM answers with a 400, for whatever cannot be purified.
    """
    try:
        limits = engine.limits
        local = url[:5].lower() == "data:"
        data = payload(url, limits) if local else asyncio.run(_fetch(url, options, limits))
        image = engine.purify_now(data)
    except Refused as refusal:
        raise ValueError(refusal.message) from refusal
    return f"data:{image.media_type};base64,{image.data}"


async def _fetch(url: str, options: FetchOptions, limits: Limits) -> bytes:
    fetcher = Fetcher(options, max_bytes=limits.max_image_bytes)
    try:
        return await fetcher(url)
    finally:
        await fetcher.aclose()
