"""The page at ``/`` in headless Chromium: drop, purify, ask, attack, errors, a narrow screen. Skips without Chromium.

Screenshots go to the folder that ``CODEFEND_SCREENSHOTS`` names, for a look.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chromium_kit import CHROMIUM, Browser
from codefend.cli.showcase import BenchShowcase
from codefend.gateway.app import create_app
from codefend.gateway.pocket import pocket_transport
from gateway_kit import Invert, b64, image, png, served, settings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
BRIGHT = png(1, shade=0.8, height=40, width=60)
BARE, INVERTED = (
    f"{float(p.mean()):.2f}"
    for p in (
        image(1, shade=0.8, height=40, width=60),
        1 - image(1, shade=0.8, height=40, width=60),
    )
)
IDLE = "!document.getElementById('ask').disabled"


class Painter:
    """A white box that tells the brightness that it saw; to attack it is to darken the image."""

    name = "painter"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        return -images.flatten(1).mean(1)

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return [f"{float(image.mean()):.2f}" for image in images]


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    transport = pocket_transport(Painter(), showcase=BenchShowcase())
    app = create_app(settings(upstream="pocket"), purifier=Invert(), transport=transport, showcase=BenchShowcase())
    with served(app) as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, base: str) -> Browser:
    browser.size(1100, 900)
    browser.open(base)
    browser.until("info.purifier")
    browser.events.clear()
    return browser


def text(page: Browser, name: str) -> str:
    return str(page.run(f"document.getElementById('{name}').innerText")).strip()


def is_visible(page: Browser, name: str) -> bool:
    return bool(page.run(f"document.getElementById('{name}').checkVisibility()"))


def save_screenshot(page: Browser, name: str) -> None:
    folder = os.environ.get("CODEFEND_SCREENSHOTS")
    if folder:
        page.screenshot(Path(folder) / f"{name}.png")


def drop(page: Browser, data: bytes, name: str) -> None:
    """Let go of a file over the page, as a mouse does."""
    page.run(
        f"""(() => {{
            const bytes = Uint8Array.from(atob("{b64(data)}"), (c) => c.charCodeAt(0)), held = new DataTransfer();
            held.items.add(new File([bytes], "{name}"));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: held, bubbles: true}}));
        }})()"""
    )


def pixel(page: Browser, canvas: str, x: int = 30, y: int = 20) -> Tensor:
    values = page.run(f"[...document.getElementById('{canvas}').getContext('2d').getImageData({x}, {y}, 1, 1).data]")
    return torch.tensor(values[:3])


def test_a_dropped_image_is_purified_and_both_models_answer(page: Browser) -> None:
    save_screenshot(page, "empty")
    assert page.run("document.getElementById('ask').disabled")
    assert not is_visible(page, "images")
    drop(page, BRIGHT, "bright.png")
    page.until(IDLE)
    assert (text(page, "came"), text(page, "hint")) == ("As uploaded", "bright.png")
    original, purified = pixel(page, "original"), pixel(page, "purified")
    assert (original - (image(1, shade=0.8, height=40, width=60)[:, 20, 30] * 255)).abs().max() <= 1
    assert (original + purified - 255).abs().max() <= 1
    assert torch.equal(pixel(page, "difference"), (128 + 8 * (purified - original)).clamp(0, 255))
    assert text(page, "score") == f"{float(image(1, shade=0.8, height=40, width=60).mean()):.4f}"
    assert text(page, "ms").endswith(" ms")
    page.run("document.getElementById('ask').click()")
    page.until(IDLE)
    assert (text(page, "bare"), text(page, "defended")) == (BARE, INVERTED)
    assert page.problems() == []
    save_screenshot(page, "answers")


def test_an_attack_is_shown_and_asked_about(page: Browser) -> None:
    drop(page, BRIGHT, "bright.png")
    page.until(IDLE)
    page.run("document.getElementById('attack').click()")
    page.until(f"document.getElementById('came').textContent == 'Attacked' && {IDLE}")
    save_screenshot(page, "attacked")
    step = pixel(page, "original") - image(1, shade=0.8, height=40, width=60)[:, 20, 30] * 255
    assert 6 < step.abs().max() < 8.5, "attacked inside its budget"
    assert text(page, "bare") != BARE
    assert float(text(page, "bare")) + float(text(page, "defended")) == pytest.approx(1, abs=0.011)
    assert page.problems() == []


def test_a_sample_comes_with_its_question_and_answer(page: Browser) -> None:
    page.run("samples = 1; document.getElementById('sample').click()")
    page.until(f"document.getElementById('right').checkVisibility() && {IDLE}")
    assert text(page, "right").startswith("Correct answer: ")
    assert page.run("document.getElementById('question').value").endswith("?")
    assert text(page, "bare")


def test_errors_are_shown_and_nothing_old_stays(page: Browser, tmp_path: Path) -> None:
    drop(page, BRIGHT, "bright.png")
    page.until(IDLE)
    (tmp_path / "a.txt").write_text("not an image")
    page.choose("#file", tmp_path / "a.txt")
    page.until("document.getElementById('problem').innerText")
    assert "not an image" in text(page, "problem")
    assert not is_visible(page, "images")
    assert page.run("document.getElementById('ask').disabled")
    save_screenshot(page, "error")
    drop(page, png(1, height=4, width=1000), "needle.png")
    page.until("document.getElementById('problem').innerText.includes('longer than')")
    drop(page, BRIGHT, "bright.png")
    page.until(IDLE)
    assert text(page, "problem") == ""


def test_a_narrow_screen_needs_no_scrolling_sideways(page: Browser) -> None:
    page.size(360, 800)
    drop(page, BRIGHT, "bright.png")
    page.until(IDLE)
    save_screenshot(page, "narrow")
    assert page.run("document.documentElement.scrollWidth") <= 360
    left, right = (page.run(f"document.getElementById('{n}').getBoundingClientRect().top") for n in PAIR)
    assert abs(left - right) < 40, "what is to be compared stands side by side"


PAIR = ("original", "purified")


def test_a_key_is_asked_for_and_used(browser: Browser) -> None:
    app = create_app(
        settings(upstream="pocket", api_keys="sesame-open"), purifier=Invert(), transport=pocket_transport(Painter())
    )
    with served(app) as url:
        browser.open(url)
        browser.until("document.getElementById('problem').innerText.includes('needs a key')")
        assert browser.run("document.getElementById('more').open"), "the field for it is in sight"
        save_screenshot(browser, "key")
        script = "(() => { const k = document.getElementById('key'); k.value = 'sesame-open'; "
        browser.run(script + "k.dispatchEvent(new Event('change')); })()")
        browser.until("info.purifier && !document.getElementById('problem').innerText")
        drop(browser, BRIGHT, "bright.png")
        browser.until(IDLE)
        browser.run("document.getElementById('ask').click()")
        browser.until(IDLE)
        assert text(browser, "defended") == INVERTED


def test_without_a_pocket_only_the_defended_model_is_asked(browser: Browser) -> None:
    from gateway_kit import Upstream

    answer: dict[str, Any] = {
        "choices": [{"message": {"content": "defended"}}],
        "data": [{"id": "m"}],
    }
    upstream = Upstream(reply=answer)
    with served(create_app(settings(), purifier=Invert(), transport=upstream.transport)) as url:
        browser.open(url)
        browser.until("info.purifier")
        assert not is_visible(browser, "attack")
        assert not is_visible(browser, "sample")
        drop(browser, BRIGHT, "bright.png")
        browser.until(IDLE)
        browser.run("document.getElementById('ask').click()")
        browser.until(IDLE)
        assert text(browser, "defended") == "defended"
        assert not is_visible(browser, "without")
    assert not upstream.received(BRIGHT)
