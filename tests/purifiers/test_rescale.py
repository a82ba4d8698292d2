"""Defenses against image-scaling attacks: the hidden image is gone, the image shown remains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from codefend.attacks.scaling import hide
from codefend.core.images import encode, quantize8
from codefend.core.kernels import SPARSE, Kernel, resize
from codefend.gateway.engine import Terms
from codefend.gateway.options import Limits
from codefend.gateway.worker import Job, Purified, Worker, WorkerOptions, suspicious
from codefend.purifiers import load
from codefend.purifiers.rescale import disagreement, read_pixels
from codefend.types import CodefendError

SIDE = 32


def smooth(seed: int, side: int, detail: int) -> Tensor:
    coarse = torch.rand(2, 3, detail, detail, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


COVER, SECRET = smooth(0, 192, 3), smooth(1, SIDE, 8)


def attacked(kernel: Kernel) -> Tensor:
    return quantize8(hide(COVER, SECRET, kernel))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return cosine_similarity((a - 0.5).flatten(1), (b - 0.5).flatten(1))


@pytest.mark.parametrize("name", [f"area:side={SIDE}", f"scaling-median:side={SIDE}"])
@pytest.mark.parametrize("kernel", SPARSE)
def test_the_model_sees_what_viewers_see(name: str, kernel: Kernel) -> None:
    def seen(images: Tensor) -> Tensor:
        return resize(images, (SIDE, SIDE), kernel)

    purified = load(name)(attacked(kernel))
    assert purified.shape == COVER.shape
    assert (cosine(seen(attacked(kernel)), SECRET) > 0.999).all()
    assert (cosine(seen(purified), seen(COVER)) > 0.97).all()
    assert (cosine(seen(load(name)(COVER)), seen(COVER)) > 0.99).all()


@pytest.mark.parametrize("kernel", SPARSE)
def test_kernels_disagree_on_attacks_alone(kernel: Kernel) -> None:
    area = load("area", side=SIDE)
    assert area.detector is not None
    assert (area.score(attacked(kernel)) > area.detector.threshold).all()
    assert (area.score(COVER) < area.detector.threshold).all()
    assert (disagreement(attacked(kernel), SIDE) > 3 * disagreement(COVER, SIDE)).all()


def test_the_gate_leaves_photographs_unchanged() -> None:
    gated = load("area", side=SIDE, gate=True)
    assert torch.equal(gated(COVER), COVER)
    assert torch.equal(gated(attacked("bilinear")), load("area", side=SIDE)(attacked("bilinear")))


def test_the_gateway_can_block_attacks_by_the_score() -> None:
    worker = Worker(load("area", side=SIDE), WorkerOptions(Limits(max_side=0)))
    terms = Terms.choose(worker, "block")
    jobs = [Job(encode(image), terms.mode, terms.threshold) for image in (COVER[0], attacked("bilinear")[0])]
    scores = [result.score for result in worker.run(jobs) if isinstance(result, Purified)]
    assert [suspicious(score, terms.threshold) for score in scores] == [False, True]


def test_only_pixels_that_a_kernel_reads_change() -> None:
    read = read_pixels(192, 192, SIDE)
    changed = (load("scaling-median", side=SIDE)(attacked("bicubic")) != attacked("bicubic")).any(1).any(0)
    assert 0 < read.float().mean() < 0.25
    assert not changed[~read].any()


@pytest.mark.parametrize("name", ["area", "scaling-median"])
def test_small_images_stay_as_they_are(name: str) -> None:
    small = smooth(2, SIDE, 8)
    assert torch.equal(load(name, side=SIDE)(small), small)


@pytest.mark.parametrize("options", [{"side": "4"}, {"side": "many"}, {"size": "32"}])
def test_wrong_options_are_one_line(options: dict[str, str]) -> None:
    build: Callable[..., object] = load
    with pytest.raises(CodefendError):
        build("area", **options)
