"""The worker, the lane and the checks before decoding."""

from __future__ import annotations

import asyncio
import base64
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codefend import purifiers
from codefend.core import images
from codefend.gateway.errors import Refused
from codefend.gateway.lane import Lane, digest_of
from codefend.gateway.limits import inspect, payload
from codefend.gateway.options import LaneOptions, Limits
from codefend.gateway.worker import Job, Purified, PurifyFailed, Worker, WorkerOptions
from gateway_kit import Invert, b64, image, png, run, url


def pixels(result: Any) -> torch.Tensor:
    assert isinstance(result, Purified), result
    return images.load(base64.b64decode(result.image.data)).pixels


def test_equal_sizes_share_a_batch_and_results_stay_in_order() -> None:
    purifier = Invert()
    datas = [png(1), png(2, width=20), png(3), b"junk", png(4)]
    results = Worker(purifier).run([Job(data) for data in datas])
    assert sorted(purifier.batches) == [1, 3]
    assert isinstance(results[3], Refused)
    for i, seed, size in ((0, 1, {}), (1, 2, {"width": 20}), (2, 3, {}), (4, 4, {})):
        torch.testing.assert_close(pixels(results[i]), 1 - image(seed, **size))


def test_batches_are_bounded_in_pixels() -> None:
    purifier = Invert()
    Worker(purifier, WorkerOptions(batch_pixels=2 * 12 * 16)).run([Job(png(i)) for i in range(5)])
    assert purifier.batches == [2, 2, 1], "and no more than that is decoded at a time"


def test_one_bad_image_does_not_fail_its_batch() -> None:
    class Picky(Invert):
        def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
            if bool((images.mean((1, 2, 3)) > 0.7).any()):
                raise RuntimeError
            return super().forward(images)

    results = Worker(Picky()).run([Job(png(1)), Job(png(2, shade=0.8)), Job(png(3))])
    assert [type(result) for result in results] == [Purified, PurifyFailed, Purified]


@pytest.mark.parametrize(
    ("source", "encoding", "media"),
    [
        ("PNG", "auto", "image/png"),
        ("JPEG", "auto", "image/jpeg"),
        ("WEBP", "auto", "image/png"),
        ("PNG", "jpeg", "image/jpeg"),
        ("JPEG", "png", "image/png"),
        ("PNG", "webp", "image/webp"),
    ],
)
def test_formats(source: str, encoding: Any, media: str) -> None:
    data = images.encode(image(1), source)
    result = Worker(Invert(), WorkerOptions(encoding=encoding)).run([Job(data)])[0]
    assert isinstance(result, Purified)
    assert result.image.media_type == media
    assert images.probe(base64.b64decode(result.image.data)).format == media[6:].upper()


def test_the_score_comes_without_purifying_twice() -> None:
    purifier = purifiers.load("blur")
    result = Worker(purifier).run([Job(png(1))])[0]
    assert isinstance(result, Purified)
    assert result.score == pytest.approx(float(purifier.score(image(1)[None])[0]), rel=1e-4)


def test_a_score_of_nan_counts_as_suspicious() -> None:
    class Nan(Invert):
        def judge(self, images: torch.Tensor, purified: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images),), torch.nan)

    result = Worker(Nan()).run([Job(png(1), "detect", 0.5)])[0]
    torch.testing.assert_close(pixels(result), 1 - image(1))


def test_alpha_is_flattened() -> None:
    rgba = torch.cat([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)])  # invisible black over white
    result = Worker(Invert()).run([Job(images.encode(rgba))])[0]
    assert float(pixels(result).max()) == 0.0


# --- the lane --------------------------------------------------------------------------------------------------------


class Held(Invert):
    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        assert self.open.wait(10)
        return super().forward(images)


def test_waiting_images_are_batched_and_abandoned_ones_skipped() -> None:
    async def work() -> None:
        purifier = Held()
        lane = Lane(Worker(purifier), LaneOptions(workers=1))
        tasks = []
        for i in range(6):
            tasks.append(asyncio.create_task(lane(Job(png(i)), str(i))))
            await asyncio.sleep(0.05 if i == 0 else 0)
        await asyncio.sleep(0.05)
        tasks[3].cancel()
        await asyncio.sleep(0.05)
        assert lane.depth == 4, "nobody wants it any more"
        purifier.open.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await lane.close()
        assert purifier.batches == [1, 4]
        assert isinstance(results[3], asyncio.CancelledError)
        assert all(isinstance(results[i], Purified) for i in (0, 1, 2, 4, 5))

    run(work())


def test_a_image_sent_again_joins_the_one_in_the_purifier() -> None:
    async def work() -> None:
        purifier = Held()
        lane = Lane(Worker(purifier))
        for i in range(3):
            purifier.open.clear()
            first = asyncio.create_task(lane(Job(png(i)), str(i)))
            await asyncio.sleep(0.05)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            again = asyncio.create_task(lane(Job(png(i)), str(i)))
            await asyncio.sleep(0.05)
            purifier.open.set()
            assert isinstance(await again, Purified)
        assert purifier.batches == [1, 1, 1]
        assert lane._pending == {}
        assert lane.cached_bytes == sum(len(entry.image.data) for entry in lane._cache.values()) > 0
        await lane.close()

    run(work())


def test_a_result_is_counted_once() -> None:
    async def work() -> None:
        lane = Lane(Worker(Invert()))
        result = await lane(Job(png(1)), "1")
        lane._remember(("", "1", "purify", None, "off"), result)
        assert lane.cached_bytes == len(result.image.data)
        await lane.close()

    run(work())


def test_closing_finishes_what_waits_and_refuses_the_rest() -> None:
    async def work() -> None:
        lane = Lane(Worker(Invert()))
        first = asyncio.create_task(lane(Job(png(1)), "1"))
        await asyncio.sleep(0)
        await lane.close()
        assert isinstance(await first, Purified)
        with pytest.raises(Refused, match="shutting down"):
            await lane(Job(png(2)), "2")

    run(work())


def test_the_cache_is_bounded_and_keeps_what_was_used_last() -> None:
    async def work() -> None:
        purifier = Invert()
        size = len(b64(png(0)))
        lane = Lane(Worker(purifier), LaneOptions(cache_bytes=5 * size))
        for i in (0, 1, 2, 3, 0, 4, 5):
            await lane(Job(png(i)), str(i))
        assert lane.cached_bytes <= 5 * size
        before = len(purifier.batches)
        assert (await lane(Job(png(0)), "0")).cached
        assert not (await lane(Job(png(1)), "1")).cached
        assert not (await lane(Job(png(0), "detect", 0.9), "0")).cached, "another policy is another result"
        assert len(purifier.batches) == before + 2
        await lane.close()

    run(work())


# --- before decoding -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_payloads_come_back(data: bytes) -> None:
    assert payload(url(data), Limits()) == data
    assert payload(b64(data), Limits()) == data
    spaced = "\n".join(b64(data)[i : i + 20] for i in range(0, len(b64(data)), 20))
    assert payload(spaced, Limits()) == data


def test_large_payloads_are_decoded_in_chunks() -> None:
    data = bytes(range(256)) * 12_000
    assert payload(b64(data), Limits()) == data


def test_payloads_are_measured_before_they_are_decoded() -> None:
    with pytest.raises(Refused, match="the limit is 1,000") as refusal:
        payload("*" * 2000, Limits(max_image_bytes=1000))
    assert refusal.value.status == 413


HEADS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"RIFF\0\0\0\0WEBP", b""]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(HEADS), st.binary(max_size=120))
def test_no_header_crashes_the_probe_or_the_worker(head: bytes, tail: bytes) -> None:
    try:
        header = inspect(head + tail, Limits(max_pixels=10_000))
    except Refused as refusal:
        assert refusal.status in (400, 413)  # noqa: PT017
        return
    assert header.width * header.height <= 10_000
    assert isinstance(Worker(Invert()).run([Job(head + tail)])[0], (Purified, Refused))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF"]))
def test_a_damaged_file_is_purified_or_refused(place: int, value: int, kind: str) -> None:
    data = bytearray(images.encode(image(1), kind))
    data[place % len(data)] = value
    result = Worker(Invert(), WorkerOptions(Limits(max_pixels=100_000))).run([Job(bytes(data))])[0]
    assert isinstance(result, (Purified, Refused))


def test_animations() -> None:
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    import io

    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    (refusal,) = Worker(Invert()).run([Job(buffer.getvalue())])
    assert isinstance(refusal, Refused)
    assert refusal.code == "animated_image"
    limits = Limits(first_frame=True)
    frame = pixels(Worker(Invert(), WorkerOptions(limits)).run([Job(buffer.getvalue())])[0])
    torch.testing.assert_close(frame[:, 0, 0], torch.tensor([0.0, 1.0, 1.0]), atol=0.01, rtol=0)


# --- noise ------------------------------------------------------------------------------------------------------------


class Noisy(Invert):
    stochastic = True

    def forward(self, images: torch.Tensor, *, generator: Any = None) -> torch.Tensor:
        super().forward(images)
        return torch.rand(images.shape, generator=generator)


def test_noise_is_a_function_of_the_pixels_and_the_secret() -> None:
    """Sending an image again, in whatever file, is no new draw: not even in another worker."""
    pixels_of_one = image(1)
    files = [png(1), png(1) + b"x", images.encode(pixels_of_one, "BMP"), images.encode(pixels_of_one, "WEBP")]
    secret = WorkerOptions(secret=b"s" * 32, encoding="png")
    first, *others = Worker(Noisy(), secret).run([Job(data) for data in files])
    (alone,) = Worker(Noisy(), secret).run([Job(png(1))])
    assert isinstance(first, Purified)
    for other in (*others, alone):
        assert isinstance(other, Purified)
        assert (other.image, other.digest) == (first.image, first.digest)
    unlike = [Worker(Noisy(), secret).run([Job(png(2))])[0], Worker(Noisy()).run([Job(png(1))])[0]]
    assert all(isinstance(other, Purified) and other.image != first.image for other in unlike)
    assert "ssss" not in repr(secret)


def test_neighbours_in_a_batch_do_not_change_the_noise() -> None:
    options = WorkerOptions(secret=b"s" * 32)
    together = Worker(Noisy(), options).run([Job(png(i)) for i in range(3)])
    alone = [Worker(Noisy(), options).run([Job(png(i))])[0] for i in range(3)]
    torch.testing.assert_close([pixels(a) for a in together], [pixels(a) for a in alone], rtol=0, atol=0)


def test_photographs_are_shrunk_by_default() -> None:
    (result,) = Worker(Invert()).run([Job(images.encode(torch.zeros(3, 576, 2304)))])
    assert pixels(result).shape == (3, 512, 2048)


def test_digests_name_content() -> None:
    assert digest_of(b"a") != digest_of(b"b")
    assert len(digest_of(b"")) == 64


def test_large_images_are_shrunk_where_that_is_asked_for() -> None:
    worker = Worker(Invert(), WorkerOptions(Limits(max_side=8)))
    large, small = worker.run([Job(png(1, height=12, width=16)), Job(png(2, height=4, width=8))])
    assert pixels(large).shape == (3, 6, 8)
    torch.testing.assert_close(pixels(small), 1 - image(2, height=4, width=8))
