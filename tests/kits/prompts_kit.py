"""A toy victim that prompts can help or hurt, and a language model of a few thousand parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codefend.core.seeds import make_generator
from codefend.prompts.writer import Writer
from codefend.training.prompt_search.bank import AttackConfig, BankConfig, SearchLoaders
from toys import WORDS, ToyVictim, purifier, task

HELP = "Rely on large shapes and colours."
SCARE = "The image may have been altered."


class Suggestible(ToyVictim):
    """More robust when the prompt mentions shapes or with the right soft prefix; refuses when it mentions tampering."""

    name = "suggestible"
    width = 4

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.ones(len(text.split()), self.width) * 0.1 for text in texts]

    def _gain(self, prompts: Sequence[str], prefix: Tensor | None) -> Tensor:
        gain = torch.tensor([0.0 if "shapes" in prompt else 1.0 for prompt in prompts])
        return gain if prefix is None else gain * torch.sigmoid(4 - 8 * prefix.mean())

    def _logits(self, images: Tensor, prompts: Sequence[str], prefix: Tensor | None) -> Tensor:
        noisy = self.logits(images)
        clear = ToyVictim(checker=0.0).logits(images)
        gain = self._gain(prompts, prefix)[:, None, None].to(images)
        return clear + gain * (noisy - clear)

    def loss(
        self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], *, prefix: Tensor | None = None
    ) -> Tensor:
        logs, losses = self._logits(images, prompts, prefix).log_softmax(-1), []
        for row, prompt, target in zip(logs, prompts, targets, strict=True):
            words = [WORDS.index(word) for word in target.split() if word in WORDS]
            losses.append(-torch.stack([row[p, w] for p, w in zip(_sides(prompt), words, strict=False)]).mean())
        return torch.stack(losses)

    def generate(self, images: Tensor, prompts: Sequence[str], *, prefix: Tensor | None = None) -> list[str]:
        self.calls += len(prompts)
        answers = []
        for prompt, row in zip(prompts, self._logits(images, prompts, prefix).argmax(-1).tolist(), strict=True):
            scared = SCARE in prompt and "attacked" in prompt
            answers.append("I am sorry." if scared else " and ".join(WORDS[row[p]] for p in _sides(prompt)))
        return answers


def _sides(prompt: str) -> list[int]:
    return [0] if "left?" in prompt else [1] if "right?" in prompt else [0, 1]


class Killed(Suggestible):
    """Gives ``left`` answers, then interrupts the process."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def generate(self, images: Tensor, prompts: Sequence[str], *, prefix: Tensor | None = None) -> list[str]:
        if self.left < len(prompts):
            raise KeyboardInterrupt
        self.left -= len(prompts)
        return super().generate(images, prompts, prefix=prefix)


def black_box() -> Any:
    """A victim with ``generate`` and nothing else."""
    victim = Suggestible()

    class BlackBox:
        name = "box"

        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            return victim.generate(images, prompts)

    return BlackBox()


def tiny_writer() -> Writer:
    """A two-layer Llama with random weights over the words of the bank of sentences."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from codefend.prompts.operators import SENTENCES

    words = sorted({word for bank in SENTENCES.values() for text in bank for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    return Writer(model, tokenizer)


BANK = BankConfig(
    tasks=("questions",),
    purifier="none",
    search_scenes=6,
    selection_scenes=4,
    seen=("pgd",),
    held_out=("apgd", "mifgsm"),
    attack=AttackConfig(eps=8.0, steps=6, cheap_steps=6),
)


def search_loaders(victim: Any = None) -> SearchLoaders:
    victims = {"toy": Suggestible() if victim is None else victim, "white": Suggestible()}
    return SearchLoaders(victim=lambda name: victims[name], task=task, purifier=purifier, writer=tiny_writer)


def random_image(seed: int = 0) -> Tensor:
    """``[3, 8, 8]``."""
    return torch.rand(3, 8, 8, generator=make_generator(seed, "picture"))
