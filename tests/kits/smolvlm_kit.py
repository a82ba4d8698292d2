"""A tiny `smolvlm-pocket`: a random language model with adapters, a byte-level tokenizer, one layer of vision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from codefend.training.smolvlm_pocket import TrainableSmolVLM
from codefend.victims import smolvlm_pocket as victims

WIDTH = 24
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = [("what is it?", "a red car"), ("where?", "in the top left")]


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    initial = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=initial, show_progress=False)
    tokenizer.train_from_iterator(["what is it? a red car in the top left", "user assistant"], trainer)
    return tokenizer


def tiny_llm() -> Any:
    config = LlamaConfig(
        vocab_size=tiny_tokenizer().get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    llm = LlamaForCausalLM(config)
    randomize(llm)
    return llm.requires_grad_(False).eval()


def randomize(module: nn.Module) -> None:
    """Larger weights than at initialization, so that every part changes the answers."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)


class TinyPocket(nn.Module):
    """The parts of a pocket that stage 2 uses: a language model with adapters and its tokenizer."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        self.llm, self.tokenizer = tiny_llm(), tiny_tokenizer()
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"]), self.llm)
        for name, parameter in self.llm.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def embed(self, texts: list[str]) -> list[Tensor]:
        table = self.llm.get_input_embeddings().weight
        return [table[torch.tensor(ids)] for ids in self.encode(texts)]


def tiny_tower() -> victims.VisionTower:
    return victims.VisionTower(victims.architecture(tiny_llm().config, VISION))


def trainable() -> TrainableSmolVLM:
    torch.manual_seed(1)
    pocket: Any = TinyPocket()
    model = TrainableSmolVLM(tiny_tower(), pocket)
    model.special.data.normal_(std=0.2)
    randomize(model.tower)
    return model


def write_weights(model: TrainableSmolVLM, folder: Path) -> Path:
    """As `training.pocket.export_parameters`, in 32 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().clone() for name, p in model.trainable.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": victims.NAME, "vision": VISION}))
    return folder


def use_tiny_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are built around the tiny language model."""
    monkeypatch.setattr("codefend.victims.smollm.load_smollm", lambda: (tiny_llm(), tiny_tokenizer()))
