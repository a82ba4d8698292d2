"""The public names of ``codefend``: each has a docstring, and its example runs by itself."""

from __future__ import annotations

import doctest

import pytest

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
