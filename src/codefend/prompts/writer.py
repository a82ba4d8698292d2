"""A small causal language model that writes: defensive prefixes for queries, and proposals for prompt texts.

Shape legend: B texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

CHAT = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Writer:
    """``model`` is a frozen Transformers causal language model, ``tokenizer`` a ``tokenizers.Tokenizer``."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.end: int = tokenizer.token_to_id(END)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def complete(self, prompt: str, *, max_new_tokens: int = 60, generator: Generator | None = None) -> str:
        """The model's reply to one message; sampled when ``generator`` is given, else greedy."""
        context = self.encode(CHAT.format(text=prompt))[-1500:]
        return self.sample([context], max_new_tokens, temperature=0.9 if generator else 0.0, generator=generator)[0]

    @torch.no_grad()
    def sample(
        self,
        contexts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: Generator | None = None,
    ) -> list[str]:
        """One text per context, batched with a key-value cache; greedy at temperature 0."""
        from transformers import DynamicCache

        lengths = torch.tensor([len(c) for c in contexts])
        longest = int(lengths.max())
        ids = torch.tensor([[self.end] * (longest - len(c)) + list(c) for c in contexts])  # left padding
        mask = (torch.arange(longest) >= (longest - lengths)[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, written = DynamicCache(), torch.empty(len(contexts), 0, dtype=torch.long)
        finished = torch.zeros(len(contexts), dtype=torch.bool)
        for _ in range(max_new_tokens):
            out = self.model.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            token = _pick(self.model.lm_head(out.last_hidden_state[:, -1]), temperature, generator)
            written = torch.cat([written, token.masked_fill(finished, self.end)[:, None]], dim=1)
            finished |= token == self.end
            if bool(finished.all()):
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = F.pad(mask, (0, 1), value=1)
        return [self._decode(row.tolist()) for row in written]

    def log_likelihood(self, contexts: Sequence[Sequence[int]], texts: Sequence[str]) -> Tensor:
        """Log-probability of each text and its end mark after its context, ``[B]``, differentiable.

        The sum over tokens: a mean would make the first token of a long text count less than that of an empty one, and
        the first token is where a writer decides whether to write at all.
        """
        targets = [[*self.encode(text), self.end] for text in texts]
        rows = [torch.tensor([*c, *t[:-1]]) for c, t in zip(contexts, targets, strict=True)]
        # Right padding needs no mask: attention is causal and padded positions are never read.
        hidden = self.model.model(input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True)).last_hidden_state
        read = [h[len(c) - 1 : len(c) - 1 + len(t)] for h, c, t in zip(hidden, contexts, targets, strict=True)]
        logits = self.model.lm_head(torch.cat(read))
        losses = F.cross_entropy(logits, torch.tensor([i for t in targets for i in t]), reduction="none")
        return -torch.stack([part.sum() for part in losses.split([len(t) for t in targets])])

    def add_lora(self, rank: int) -> dict[str, nn.Parameter]:
        """Put trainable adapters on the attention (Hu et al. 2021, arXiv 2106.09685); the rest stays frozen."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0)
        inject_adapter_in_model(config, self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return self.adapters()

    def adapters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def _decode(self, ids: list[int]) -> str:
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return str(self.tokenizer.decode(ids)).strip()


def _pick(logits: Tensor, temperature: float, generator: Generator | None) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
