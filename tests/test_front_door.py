"""The public names of ``codefend``: each has a docstring, and its example runs by itself."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

import codefend

NAMES = sorted(set(codefend.__all__) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_each_public_name_runs_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    documented = getattr(codefend, name)
    tests = doctest.DocTestFinder(recurse=False).find(documented, name, globs={})
    examples = [example for test in tests for example in test.examples]
    assert examples, f"the docstring of {name} has no example"
    assert not [example.source for example in examples if doctest.SKIP in example.options]
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def test_the_docstring_of_the_package_names_every_function_and_the_main_classes() -> None:
    assert codefend.__doc__ is not None
    names = [name for name in NAMES if name.islower()] + ["Defense", "DefendedVictim", "EvalConfig", "CodefendError"]
    assert [name for name in names if f"`{name}`" not in codefend.__doc__] == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((8, 8, 3), 200.0, np.float32), "got 200 to 200; scale 0-255"),
        (torch.rand(3, 8, 8) - 1.5, "undo a normalization"),
        (torch.full((3, 8, 8), torch.nan), "got nan to nan"),
        (np.zeros((0, 8, 3), np.uint8), "the image is empty"),
        (np.zeros((8, 8, 3), np.int64), "uint8 or float in"),
    ],
)
def test_purify_refuses_values_that_are_no_image(image: object, words: str) -> None:
    with pytest.raises(codefend.CodefendError, match=words):
        codefend.purify(image, "bitdepth")


def test_purify_takes_the_overshoot_of_resampling() -> None:
    assert codefend.purify(torch.full((3, 8, 8), 1.05), "bitdepth").max() <= 1
