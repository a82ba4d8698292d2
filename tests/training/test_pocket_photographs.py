"""The training of the pocket's tokens for photographs: samples, texts, the loss, and the gate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from codefend.training import pocket_photographs as module

pytest.importorskip("transformers")


def test_sampled_probabilities_are_sure_or_not_and_never_in_between() -> None:
    rng = np.random.default_rng(1)
    rows = torch.stack([module.sample_probabilities(rng) for _ in range(64)])
    assert torch.allclose(rows.sum(1), torch.ones(64))
    top = rows.amax(1)
    assert 0.5 < (top > 0.5).float().mean() < 0.95
    assert not ((top > 0.49) & (top < 0.52)).any()


def test_texts_follow_the_class_and_its_absence() -> None:
    rng = np.random.default_rng(2)
    sure, unsure = torch.full((1000,), 0.2 / 999), torch.full((1000,), 0.001)
    sure[967] = 0.8
    texts = module.photograph_texts(sure, rng)
    assert texts[0][1] == "a photo of an espresso"
    assert texts[1][1] == "espresso"
    for prompt, answer in texts[2:]:
        assert ("espresso" in prompt) == (answer == "yes")
    assert [answer for _, answer in module.photograph_texts(unsure, rng)] == ["a photo", "not sure"]


def test_a_batch_is_a_function_of_its_step() -> None:
    config = module.PhotographConfig(batch=2)
    first, second, other = (module.sample_batch(config, step) for step in (1, 1, 2))
    assert first.texts == second.texts
    assert torch.equal(first.probabilities, second.probabilities)
    assert not torch.equal(first.probabilities, other.probabilities)


@pytest.mark.weights
def test_the_loss_falls_and_leaves_the_language_model_alone(bare_pocket: Any) -> None:
    tokens = module.build(bare_pocket.encoder, ["a red apple"], bare_pocket.embed)
    module._initialize(tokens, bare_pocket)
    before = bare_pocket.llm.model.layers[0].mlp.up_proj.weight.clone()
    batch = module.sample_batch(module.PhotographConfig(batch=1), 3)
    parameters = [tokens.frame, tokens.confidence, tokens.place]
    optimizer = torch.optim.Adam(parameters, lr=3e-2)
    curve = []
    for _ in range(4):
        loss = module.photograph_loss(bare_pocket, tokens, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.9 * curve[0]
    assert torch.equal(before, bare_pocket.llm.model.layers[0].mlp.up_proj.weight)


def test_the_gate_is_closed_for_all_scenes_that_were_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(3)

    def draw(numbers: Any, level: float) -> list[torch.Tensor]:
        return [torch.full((3, 4, 4), level) + 0.1 * torch.rand(3, 4, 4, generator=generator) for _ in numbers]

    monkeypatch.setattr(module, "_scenes", lambda numbers: draw(numbers, 0.2))
    monkeypatch.setattr(module, "_shapes", lambda count: draw(range(count), 0.1))
    natural = SimpleNamespace(draw=lambda rng, count, side, number: torch.stack(draw(range(count), 0.8)))
    monkeypatch.setattr(module, "NaturalImages", lambda *_, **__: natural)
    tokens = module.PhotographTokens(3, torch.zeros(1000, 8, 5), torch.eye(5)[:2])
    connector = SimpleNamespace(words=lambda features: torch.ones(len(features), 16, 5))
    pocket: Any = SimpleNamespace(
        device="cpu", connector=connector, features=lambda x: x.mean((2, 3))[:, None].expand(-1, 16, 3)
    )
    module.fit_gate(module.PhotographConfig(scenes=64), pocket, tokens)
    scenes, photographs = (
        tokens.gate(pocket.features(x), connector.words(x))
        for x in map(torch.stack, (draw(range(64), 0.2), draw(range(64), 0.8)))
    )
    assert (scenes > 0).float().mean() < 0.1
    assert photographs.min() == 1
