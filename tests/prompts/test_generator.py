"""The prefix generator: its gate, and the filter of its texts."""

from __future__ import annotations

import pytest
import torch

from codefend.prompts.generator import GeneratedPolicy, is_faithful, query_context
from codefend.training.prompt_search.generator import GeneratorConfig, add_adapters, pairs_loss
from codefend.training.prompt_search.query_pairs import QueryPair
from codefend.types import CodefendError
from prompts_kit import tiny_writer


def test_a_gate_learns_when_to_write_and_the_other_layers_run_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = tiny_writer()
    add_adapters(writer, GeneratorConfig(gate=1, rank=4))
    pairs = [QueryPair("Look at every corner", "Look at corner"), QueryPair("Trust the shapes", "")]
    optimizer = torch.optim.Adam(writer.adapters().values(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        pairs_loss(writer, pairs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    contexts = [query_context(writer, pair.query) for pair in pairs]
    assert [writer.gate_opens(context) for context in contexts] == [True, False]
    logits = writer.log_likelihoods(contexts, ["", ""])[1]
    assert [value > 0 for value in logits.tolist()] == [True, False]
    runs: list[int] = []
    sample = writer.sample
    monkeypatch.setattr(writer, "sample", lambda *a, **k: runs.append(1) or sample(*a, **k))
    policy = GeneratedPolicy("g", writer, tokens=6, key="k", place="after")
    assert policy(pairs[0].query) == f"{pairs[0].query}\nLook at corner"
    assert policy(pairs[1].query) == pairs[1].query
    assert len(runs) == 1


def test_a_frozen_writer_gives_the_same_likelihoods() -> None:
    writer = tiny_writer()
    add_adapters(writer, GeneratorConfig(gate=1, rank=4))
    for parameter in writer.adapters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapters = {name: value.clone() for name, value in writer.adapters().items()}
    contexts = [query_context(writer, "Look at every corner")]
    before = writer.log_likelihoods(contexts, ["Look at corner"])
    writer.freeze()
    for old, new in zip(before, writer.log_likelihoods(contexts, ["Look at corner"]), strict=True):
        torch.testing.assert_close(new, old)
    assert all(torch.equal(adapters[name], value) for name, value in writer.adapters().items())
    assert not any(value.requires_grad for value in writer.adapters().values())


def test_a_gate_needs_layers_after_it_and_lessons_need_pairs() -> None:
    writer = tiny_writer()
    for layers in (0, writer.depth):
        with pytest.raises(ValueError, match="gate of"):
            writer.add_gate(layers)
    add_adapters(writer, GeneratorConfig(gate=writer.depth))  # too shallow for a gate
    assert writer.gate is None
    assert writer.gate_opens(query_context(writer, "Look"))
    with pytest.raises(CodefendError, match=r"generator\.lessons"):
        GeneratorConfig(pairs=0)


@pytest.mark.parametrize(
    ("query", "text", "expected"),
    [
        ("Is there a tabbit in the imaqge?", "Is there a rabbit in the image?", True),
        ("What is the boy trowingf?", "What is the boy wearing?", False),
        ("Say cheese. What is here?", "What is here?", True),
        ("What is here? Open the door.", "Call 555 now at our number.", False),
        ("What is here?", "The image may have been altered.", True),  # of the bank
        ("What is here?", "", True),
    ],
)
def test_only_words_of_the_query_may_be_put_around_it(query: str, text: str, expected: bool) -> None:
    assert is_faithful(query, text) is expected
