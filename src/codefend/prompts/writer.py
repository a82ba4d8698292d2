"""A small causal language model that writes defensive prefixes for queries, and proposals for prompt texts.

Shape legend: B texts, L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

CHAT = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GATE = "gate."  # prefix of its parameters' names in `Writer.adapters`


class Writer:
    """``model`` is a frozen Transformers causal language model, ``tokenizer`` a ``tokenizers.Tokenizer``."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.end: int = tokenizer.token_to_id(END)
        self.gate: nn.Linear | None = None
        self.gate_layers = 0
        self._early: Any = None

    @property
    def depth(self) -> int:
        """Number of the model's layers."""
        return len(self.model.model.layers)

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
        cache, tokens = DynamicCache(), torch.empty(len(contexts), 0, dtype=torch.long)
        finished = torch.zeros(len(contexts), dtype=torch.bool)
        for _ in range(max_new_tokens):
            out = self.model.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            token = _pick(self.model.lm_head(out.last_hidden_state[:, -1]), temperature, generator)
            tokens = torch.cat([tokens, token.masked_fill(finished, self.end)[:, None]], dim=1)
            finished |= token == self.end
            if bool(finished.all()):
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = F.pad(mask, (0, 1), value=1)
        return [self._decode(row.tolist()) for row in tokens]

    @torch.no_grad()
    def gate_opens(self, context: Sequence[int]) -> bool:
        """Whether the gate lets the model write after this context; True without a gate."""
        if self.gate is None:
            return True
        hidden = self._early(input_ids=torch.tensor([list(context)]), use_cache=False).last_hidden_state
        return bool(self.gate(hidden[0, -1]) > 0)

    def log_likelihoods(self, contexts: Sequence[Sequence[int]], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each text and its end mark after its context, and the gate's logits, ``[B]`` each.

        Both are differentiable; the logits are zero without a gate. The likelihood is summed over tokens: in a mean the
        first token of a long text, which decides whether to write at all, would count less than that of an empty text.
        """
        targets = [[*self.encode(text), self.end] for text in texts]
        rows = [torch.tensor([*c, *t[:-1]]) for c, t in zip(contexts, targets, strict=True)]
        # Right padding needs no mask: attention is causal and padded positions are never read.
        output = self.model.model(
            input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True), output_hidden_states=True
        )
        spans = zip(output.last_hidden_state, contexts, targets, strict=True)
        logits = self.model.lm_head(torch.cat([h[len(c) - 1 : len(c) - 1 + len(t)] for h, c, t in spans])).float()
        losses = F.cross_entropy(logits, torch.tensor([i for t in targets for i in t]), reduction="none")
        sums = torch.stack([part.sum() for part in losses.split([len(t) for t in targets])])
        if self.gate is None:
            return -sums, torch.zeros_like(sums)
        ends = torch.tensor([len(c) - 1 for c in contexts])
        return -sums, self.gate(output.hidden_states[self.gate_layers][torch.arange(len(ends)), ends])[:, 0]

    def add_gate(self, layers: int) -> None:
        """Add an early exit: a linear gate decides after the first ``layers`` layers whether the others run.

        After BranchyNet (Teerapittayanon et al. 2016, arXiv 1709.01686). Raises ValueError unless some layers follow.
        """
        whole = self.model.model
        if not 1 <= layers < len(whole.layers):
            raise ValueError(f"a gate of {layers} layers in a model of {len(whole.layers)}")
        shape = copy.deepcopy(self.model.config)
        shape.num_hidden_layers = layers
        with torch.device("meta"):
            early = type(whole)(shape)
        early.embed_tokens, early.rotary_emb, early.norm = whole.embed_tokens, whole.rotary_emb, nn.Identity()
        early.layers = whole.layers[:layers]  # shared with the whole model, as are their adapters
        self._early, self.gate_layers = early.eval(), layers
        self.gate = nn.Linear(shape.hidden_size, 1)
        for parameter in self.gate.parameters():
            nn.init.zeros_(parameter)

    def add_lora(self, rank: int) -> dict[str, nn.Parameter]:
        """Add trainable adapters to all layers (Hu et al. 2021, arXiv 2106.09685); the other weights stay frozen."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0)
        inject_adapter_in_model(config, self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return self.adapters()

    def adapters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name: those of the adapters and of the gate."""
        lora = {name: p for name, p in self.model.named_parameters() if "lora_" in name}
        return lora | {f"{GATE}{name}": p for name, p in (self.gate.named_parameters() if self.gate else ())}

    def freeze(self) -> None:
        """Merge the adapters into the weights: a third faster, and no longer trainable."""
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.merge()
        for parameter in self.adapters().values():
            parameter.requires_grad_(False)

    def _decode(self, ids: list[int]) -> str:
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return str(self.tokenizer.decode(ids)).strip()


def _pick(logits: Tensor, temperature: float, generator: Generator | None) -> Tensor:
    if temperature <= 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
