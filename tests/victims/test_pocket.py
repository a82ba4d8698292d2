"""The pocket victim: pretrained parts are read correctly, losses are per example, gradients reach the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from codefend import encoders
from codefend.encoders.views import SIDE, fit_square
from codefend.types import CodefendError, WhiteBox
from codefend.victims.pocket import TOKENS, load_pocket, read_trained

if TYPE_CHECKING:
    from codefend.victims.pocket import Pocket

PROMPTS = ["Describe the picture.", "Is there a dog here?", "What is in the top left?"]
TARGETS = ["a red car and a dog", "yes", "umbrella"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.weights
def test_the_language_model_is_the_instruct_model(bare_pocket: Pocket) -> None:
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    out = bare_pocket.llm(input_ids=torch.tensor(bare_pocket.encode([text])), use_cache=True)
    tokens = []
    for _ in range(8):
        token = out.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        out = bare_pocket.llm(input_ids=token, past_key_values=out.past_key_values)
    assert "Paris" in bare_pocket.tokenizer.decode(tokens)


@pytest.mark.weights
@pytest.mark.parametrize("name", ["lite0", "lite1", "lite2"])
def test_image_encoders_recognize_a_photograph(name: str) -> None:
    from skimage import data

    photograph = torch.from_numpy(data.coffee()[:400, 100:500].copy()).permute(2, 0, 1)[None].float() / 255
    scores = encoders.load(name).logits(fit_square(photograph, 224)).softmax(-1)
    assert scores.argmax() == 967  # espresso
    assert scores.max() > 0.8


@pytest.mark.weights
def test_contract(bare_pocket: Pocket, images: torch.Tensor) -> None:
    assert isinstance(bare_pocket, WhiteBox)
    assert bare_pocket.features(images).shape == (3, TOKENS, 768)
    assert bare_pocket.loss(images, PROMPTS, TARGETS).shape == (3,)
    assert len(bare_pocket.generate(images, PROMPTS, max_new_tokens=2)) == 3


@pytest.mark.weights
def test_loss_does_not_depend_on_the_batch(bare_pocket: Pocket, images: torch.Tensor) -> None:
    together = bare_pocket.loss(images, PROMPTS, TARGETS)
    alone = [bare_pocket.loss(images[i : i + 1], PROMPTS[i : i + 1], TARGETS[i : i + 1])[0] for i in (2, 0, 1)]
    assert torch.allclose(together[[2, 0, 1]], torch.stack(alone), atol=1e-4)


@pytest.mark.weights
def test_margins_are_positive_for_the_models_own_answer(bare_pocket: Pocket, images: torch.Tensor) -> None:
    own_answers = bare_pocket.generate(images, PROMPTS, max_new_tokens=3)
    for answers, own in ((own_answers, True), (TARGETS, False)):
        margins = bare_pocket.margins(images, PROMPTS, answers)
        lengths = [len(ids) + 1 for ids in bare_pocket.encode(answers)]  # and the end mark
        assert [len(m) for m in margins] == lengths
        # The model went on after three tokens, so the end mark's margin says nothing here.
        assert [bool((m[:-1] > 0).all()) for m in margins] == [own] * 3


@pytest.mark.weights
def test_gradients_reach_every_image_and_agree_with_differences(bare_pocket: Pocket, images: torch.Tensor) -> None:
    x = images.clone().requires_grad_(True)
    grad = torch.autograd.grad(bare_pocket.loss(x, PROMPTS, TARGETS).sum(), x)[0]
    assert (grad.flatten(1).norm(dim=1) > 1e-4).all()
    step = 1e-3 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        slope = bare_pocket.loss(images + step, PROMPTS, TARGETS) - bare_pocket.loss(images - step, PROMPTS, TARGETS)
    assert torch.allclose(slope / 2e-3, grad.flatten(1).norm(dim=1), rtol=0.1)


@pytest.mark.weights
def test_cached_batched_generation_equals_plain_greedy_decoding(
    bare_pocket: Pocket, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare_pocket, "_decode", lambda ids: ids)
    answers: list[list[int]] = bare_pocket.generate(images, PROMPTS, max_new_tokens=5)  # type: ignore[assignment]
    table = bare_pocket.llm.get_input_embeddings().weight
    for image, prompt, ids in zip(images, PROMPTS, answers, strict=True):
        before, after = bare_pocket._context(image[None], [prompt])
        # One pass without cache over all of it: each token must be the best one after those before it.
        row = torch.cat([before, *after, table[ids[:-1]]])
        hidden = bare_pocket.llm.model(inputs_embeds=row[None]).last_hidden_state[0, -5:]
        assert bare_pocket.llm.lm_head(hidden).argmax(-1).tolist() == ids


@pytest.mark.weights
def test_packed_training_loss_equals_the_victims_loss(bare_pocket: Pocket, images: torch.Tensor) -> None:
    from codefend.training.pocket import packed_loss

    texts = [list(zip(PROMPTS, TARGETS, strict=True)), [(PROMPTS[0], "a cat")]]
    total, _, _ = packed_loss(bare_pocket, images[:2], texts)
    flat = [(b, prompt, target) for b, pairs in enumerate(texts) for prompt, target in pairs]
    single = bare_pocket.loss(images[[b for b, _, _ in flat]], [p for _, p, _ in flat], [t for _, _, t in flat])
    assert torch.allclose(total, single.mean(), atol=1e-4)


@pytest.mark.weights
def test_weights_round_trip_and_merging_changes_nothing(
    bare_pocket: Pocket, images: torch.Tensor, tmp_path: Path
) -> None:
    from codefend.training.pocket import export_parameters

    rng = torch.Generator().manual_seed(2)
    for name, parameter in bare_pocket.trainable.items():
        if "lora_B" in name:  # zero at the start: adapters that do nothing would hide a wrong merge
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=rng))
    export_parameters(tmp_path, bare_pocket.trainable, bare_pocket.config)
    loaded = load_pocket(tmp_path)
    expected, got = (v.loss(images, PROMPTS, TARGETS) for v in (bare_pocket, loaded))
    for name, parameter in bare_pocket.trainable.items():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not torch.allclose(expected, bare_pocket.loss(images, PROMPTS, TARGETS), atol=0.05)
    assert torch.allclose(expected, got, atol=0.02)  # 16-bit weights


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="codefend train pocket"):
        load_pocket(tmp_path)


@pytest.mark.weights
def test_weights_that_are_not_finite_are_refused(bare_pocket: Pocket, tmp_path: Path) -> None:
    from codefend.training.pocket import export_parameters

    broken = {name: torch.full_like(value, torch.inf) for name, value in bare_pocket.trainable.items()}
    export_parameters(tmp_path, broken, bare_pocket.config)
    with pytest.raises(CodefendError, match="holds NaN or infinity"):
        read_trained(bare_pocket, tmp_path)
    assert all(value.isfinite().all() for value in bare_pocket.trainable.values())


@pytest.mark.parametrize("shape", [(64, 64), (40, 90), (90, 40), (128, 128)])
def test_any_shape_is_padded_not_stretched(shape: tuple[int, int]) -> None:
    squared = fit_square(torch.ones(1, 3, *shape))
    assert squared.shape == (1, 3, SIDE, SIDE)
    share = (squared > 0.75).float().mean()
    assert np.isclose(share, min(shape) / max(shape), atol=0.03)
