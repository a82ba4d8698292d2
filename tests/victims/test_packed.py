"""The packed decoder is the Transformers model: states and gradients, uneven rows, one shared start, and LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

SHARED, LENGTHS = 3, (9, 5, 14)
READS = (range(4, 9), range(4, 5), range(10, 14))


@pytest.fixture(scope="module")
def llm() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # small weights would hide a wrong mask
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).double().requires_grad_(False).eval()


@pytest.fixture
def rows() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(n, 32, generator=rng, dtype=torch.float64).requires_grad_() for n in (SHARED, *LENGTHS)]


def plainly(llm: Any, rows: list[Tensor]) -> Tensor:
    """Row by row through Transformers."""
    logits = []
    for row, read in zip(rows[1:], READS, strict=True):
        states = llm.model(inputs_embeds=torch.cat([rows[0], row])[None]).last_hidden_state[0]
        logits.append(llm.lm_head(states[SHARED:][list(read)]))
    return torch.cat(logits)


def packed(llm: Any, rows: list[Tensor]) -> Tensor:
    from codefend.victims.packed import answer_logits

    return answer_logits(llm, rows, [range(0), *READS])


def gradients(logits: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.autograd.grad((logits.log_softmax(-1) * weights).sum(), inputs)


def test_logits_and_gradients_equal_transformers(llm: Any, rows: list[Tensor]) -> None:
    expected, got = plainly(llm, rows), packed(llm, rows)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for there, here in zip(gradients(expected, rows), gradients(got, rows), strict=True):
        assert there.abs().max() > 1e-3
        torch.testing.assert_close(here, there, rtol=1e-4, atol=2e-5)  # norms compute in float32


def test_a_row_does_not_see_the_others(llm: Any, rows: list[Tensor]) -> None:
    before = packed(llm, rows)
    changed = [rows[0], rows[1], rows[2] + 1, rows[3]]
    after = packed(llm, changed)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[6:], after[6:])
    assert not torch.allclose(before[5], after[5])


def test_gradients_reach_adapters(llm: Any, rows: list[Tensor]) -> None:
    from copy import deepcopy

    import peft

    adapted = deepcopy(llm)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, adapted)
    adapted.double()
    weights = [p.requires_grad_() for name, p in adapted.named_parameters() if "lora_" in name]
    expected, got = plainly(adapted, rows), packed(adapted, rows)
    for there, here in zip(gradients(expected, weights), gradients(got, weights), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=2e-5)  # norms compute in float32
