"""Typographic attack."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attacks_kit import QUESTIONS, sample_images, seeded
from codefend.attacks.typographic import FaintTextAttack, TypographicAttack, write_faint, write_text
from codefend.types import Budget, Objective


def test_text_covers_its_rows_only() -> None:
    images = sample_images(2, 64)
    top = write_text(images, "stop", size=0.2, place=0.0)
    assert torch.equal(top[:, :, 18:], images[:, :, 18:])
    assert set(top[:, :, :9].unique().tolist()) == {0.0, 1.0}
    inverse = write_text(images, "stop", size=0.2, place=0.0, ink=0.0)
    assert torch.equal(inverse[:, :, :9], 1 - top[:, :, :9])
    assert torch.equal(write_text(images, "stop", size=0.2)[:, :, :40], images[:, :, :40])


def test_long_text_is_cut_at_the_edge_of_a_tiny_image() -> None:
    assert write_text(sample_images(1, 9), "a very long sentence", size=1.0).shape == (1, 3, 9, 9)


def test_the_best_place_is_chosen_for_each_image() -> None:
    images = torch.full((2, 3, 32, 32), 0.5)

    def objective(prompts: Sequence[str]) -> Objective:
        # A light bottom lowers the first image's objective, a light top the second's.
        return lambda x: -torch.stack([x[0, :, 23:].mean(), x[1, :, :9].mean()])

    written, prompts = TypographicAttack(sentence="hi")(objective, images, QUESTIONS[:2], Budget(), generator=seeded())
    assert prompts == QUESTIONS[:2]
    assert (written[0] != images[0]).any(0)[23:].all()
    assert (written[1] != images[1]).any(0)[:9].all()
    assert torch.equal(written[0, :, :23], images[0, :, :23])


def test_faint_text_changes_letters_by_its_contrast_alone() -> None:
    images = torch.full((1, 3, 64, 64), 0.5)
    changes = (write_faint(images, "stop", contrast=0.25) - images).unique().tolist()
    assert changes == [0.0, 0.25]
    assert (write_faint(images, "stop", contrast=-0.25) - images).min() == -0.25


def test_the_faintest_text_that_works_best_is_chosen() -> None:
    images = torch.full((1, 3, 64, 64), 0.5)

    def objective(prompts: Sequence[str]) -> Objective:
        return lambda x: ((x - images).abs().amax((1, 2, 3)) - 0.1).abs()  # lowest at a contrast of .1

    written, _ = FaintTextAttack(sentence="hi")(objective, images, QUESTIONS[:1], Budget(steps=16), generator=seeded())
    torch.testing.assert_close((written - images).abs().max(), torch.tensor(0.1))
