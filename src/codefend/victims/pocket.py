"""The pocket victim: a multimodal LLM with LLaVA's architecture, small enough for two CPU cores.

image -> frozen EfficientNet-Lite -> 16 vision tokens -> connector (trained here) -> SmolLM2-135M-Instruct with LoRA
(trained here). Differentiable from pixels to the language-model loss. Liu et al. 2023 (LLaVA), Hu et al. 2021 (LoRA).

Shape legend: B batch, T vision tokens (16), L text positions, D the language model's width (576).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from codefend import encoders
from codefend.core.checkpoints import load_weights
from codefend.core.devices import default_device
from codefend.encoders.views import SIDE, fit_square
from codefend.types import CodefendError
from codefend.victims.packed import answer_logits
from codefend.victims.photographs import PhotographTokens, class_scores
from codefend.victims.photographs import load as load_photographs
from codefend.victims.smollm import load_smollm

TOKENS = (SIDE // 32) ** 2
BEFORE = "<|im_start|>user\n"  # then the image
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
EMBEDDING_STD = 0.136  # of SmolLM2's input embeddings; projected tokens start at this scale or training stalls
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Connector(nn.Module):
    """Encoder tokens ``[B, T, W]`` to language-model embeddings ``[B, T, D]`` of the embedding table's own scale."""

    def __init__(self, width: int, *, hidden: int = 1152, out: int = 576) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.position = nn.Parameter(torch.zeros(TOKENS, width))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.scale = nn.Parameter(torch.tensor(EMBEDDING_STD))
        self.place = nn.Parameter(torch.zeros(TOKENS, out))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens) + self.place

    def words(self, tokens: Tensor) -> Tensor:
        """The content of each token, without its position."""
        projected: Tensor = self.mlp(self.norm(tokens) + self.position)
        return F.rms_norm(projected, projected.shape[-1:]) * self.scale


class Pocket(nn.Module):
    """The pocket MLLM. ``encoder`` names one of `codefend.encoders`; ``rank`` of the LoRA adapters (0: none).

    ``vocabulary``: the words and phrases that its connector was trained with (`word_scores`).
    """

    name = "pocket"
    greedy = True

    def __init__(self, encoder: str = "lite0", *, rank: int = 32, vocabulary: Sequence[str] = ()) -> None:
        super().__init__()
        self.config = {"encoder": encoder, "rank": rank, "vocabulary": list(vocabulary)}
        self.vocabulary = tuple(vocabulary)
        self.encoder = encoders.load(encoder)
        self.connector = Connector(self.encoder.width)
        self.llm, self.tokenizer = load_smollm()
        self.photographs: PhotographTokens | None = None
        self._end = self.tokenizer.token_to_id(END)
        if rank:
            _add_lora(self.llm, rank)
        self.requires_grad_(False).eval()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes and a weights folder holds: connector and adapters."""
        return {k: p for k, p in self.named_parameters() if k.startswith("connector.") or "lora_" in k}

    @property
    def device(self) -> torch.device:
        """The pocket's device. Images may be on another one; results are on the device of the images."""
        return self.connector.scale.device

    # Reading images and text

    def features(self, images: Tensor) -> Tensor:
        """Vision tokens of the encoder, ``[B, T, W]``."""
        return self._tokens(images).to(images.device)

    def _tokens(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.encoder.features(fit_square(images.to(self.device)))
        return tokens

    def _vision(self, images: Tensor) -> Tensor:
        """Vision tokens of the language model, ``[B, T, D]``."""
        tokens = self._tokens(images)
        words = self.connector.words(tokens)
        vision = words + self.connector.place
        if self.photographs is None:
            return vision
        return self.photographs.blend(vision, words, tokens, images.to(self.device), self.encoder)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Token embeddings ``[L_i, D]`` of each text."""
        table = self.llm.get_input_embeddings().weight
        return [F.embedding(self._ids(ids), table) for ids in self.encode(texts)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _context(
        self, images: Tensor, prompts: Sequence[str], prefix: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings of BEFORE, and for each example those of ``[image, prefix, prompt, AFTER]``, ``[L_i, D]``."""
        vision = self._vision(images)
        before, *questions = self.embed([BEFORE, *(f"\n{prompt}{AFTER}" for prompt in prompts)])
        soft = [] if prefix is None else [prefix.to(self.device)]
        return before, [torch.cat([v, *soft, q]) for v, q in zip(vision, questions, strict=True)]

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """Cosine of each projected vision token to the mean embedding of each word or phrase, ``[B, T, C]``.

        The connector is trained so that the nearest word names the content of a token's cell. This gives a head on the
        tokens at the cost of the encoder alone, for mining and guidance where the language model is too slow.
        """
        table = F.normalize(torch.stack([e.mean(0) for e in self.embed(words)]), dim=-1)
        cosines = F.normalize(self.connector.words(self._tokens(images)), dim=-1) @ table.T
        return cosines.to(images.device)

    @property
    def classes(self) -> Sequence[str]:
        """The classes that it names in photographs."""
        return encoders.class_names() if self.photographs is not None else ()

    def class_scores(self, images: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the classes, before the steps and powers through which the tokens read them."""
        return class_scores(self.encoder, images.to(self.device)).to(images.device)

    # Capabilities

    def loss(
        self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], *, prefix: Tensor | None = None
    ) -> Tensor:
        """Mean negative log-likelihood of each target and the end token, ``[B]``, differentiable in the images.

        ``prefix`` ``[K, D]``: a soft prefix, embeddings before every prompt; the loss is also differentiable in it.
        """
        logits, answers = self._answer_logits(images, prompts, targets, prefix)
        nll = F.cross_entropy(logits, self._ids([i for a in answers for i in a]), reduction="none")
        return torch.stack([part.mean() for part in nll.split([len(a) for a in answers])]).to(images.device)

    def margins(
        self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], *, prefix: Tensor | None = None
    ) -> list[Tensor]:
        """For each image ``[L_i]``: the logit of each token of the target and the end token minus the largest other.

        If all are positive, greedy decoding gives the target. Differentiable in the images.
        """
        logits, answers = self._answer_logits(images, prompts, targets, prefix)
        labels = self._ids([i for a in answers for i in a])[:, None]
        others = logits.scatter(1, labels, -torch.inf).amax(1)
        margins = (logits.gather(1, labels)[:, 0] - others).to(images.device)
        return list(margins.split([len(a) for a in answers]))

    def _answer_logits(
        self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], prefix: Tensor | None
    ) -> tuple[Tensor, list[list[int]]]:
        """Logits ``[sum L_i, V]`` that predict each token of the targets and their end tokens, and those tokens."""
        before, contexts = self._context(images, prompts, prefix)
        answers = self.encode([f"{target}{END}" for target in targets])
        table = self.llm.get_input_embeddings().weight
        rows = [torch.cat([c, F.embedding(self._ids(a[:-1]), table)]) for c, a in zip(contexts, answers, strict=True)]
        reads = [range(len(c) - 1, len(c) - 1 + len(a)) for c, a in zip(contexts, answers, strict=True)]
        return answer_logits(self.llm, [before, *rows], [range(0), *reads]), answers

    @torch.no_grad()
    def generate(
        self, images: Tensor, prompts: Sequence[str], *, max_new_tokens: int = 48, prefix: Tensor | None = None
    ) -> list[str]:
        """Greedy answers, batched with a key-value cache. ``prefix``: as for `loss`."""
        from transformers import DynamicCache

        before, after = self._context(images, prompts, prefix)
        contexts = [torch.cat([before, c]) for c in after]
        lengths = self._ids([len(c) for c in contexts])
        longest = int(lengths.max())
        embeds = torch.stack([F.pad(c, (0, 0, longest - len(c), 0)) for c in contexts])  # left padding
        mask = (torch.arange(longest, device=self.device) >= (longest - lengths)[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, answers = DynamicCache(), lengths.new_empty(len(contexts), 0)
        finished = torch.zeros_like(lengths, dtype=torch.bool)
        step: dict[str, Any] = {"inputs_embeds": embeds}
        for _ in range(max_new_tokens):
            out = self.llm.model(
                **step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            token = self.llm.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
            answers = torch.cat([answers, token.masked_fill(finished, self._end)[:, None]], dim=1)
            finished |= token == self._end
            if bool(finished.all()):
                break
            step = {"input_ids": token[:, None]}
            positions = positions[:, -1:] + 1
            mask = F.pad(mask, (0, 1), value=1)
        return [self._decode(row.tolist()) for row in answers]

    def _decode(self, ids: list[int]) -> str:
        ids = ids[: ids.index(self._end)] if self._end in ids else ids
        return str(self.tokenizer.decode(ids)).strip()


def _add_lora(llm: Any, rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), lora_dropout=0.0)
    inject_adapter_in_model(config, llm)


def merge_lora(llm: Any) -> None:
    """Merge the adapters into the weights, in place: the same outputs, a third faster."""
    from peft.tuners.lora import Linear

    for module in list(llm.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                child.merge()
                setattr(module, name, child.get_base_layer().requires_grad_(False))


def load_pocket(folder: Path, photographs: Path | None = None) -> Pocket:
    """The pocket with the weights of ``folder`` (``model.safetensors``, ``config.json``), adapters merged.

    ``photographs``: a folder of `victims.photographs` weights, so that it also answers about photographs. Raises
    CodefendError when a folder holds no such weights, or those of another version.
    """
    victim = load_unmerged(folder)
    merge_lora(victim.llm)
    if photographs:
        victim.photographs = load_photographs(photographs, victim.encoder, victim.vocabulary, victim.embed)
    return victim.to(default_device())


def load_unmerged(folder: Path) -> Pocket:
    """As `load_pocket`, on the CPU and with adapters that are not merged, as training needs them."""
    try:
        config = json.loads((folder / "config.json").read_text())
        victim = Pocket(config["encoder"], rank=config["rank"], vocabulary=config.get("vocabulary", ()))
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise CodefendError(_NO_WEIGHTS.format(folder=folder, error=error)) from error
    read_trained(victim, folder)
    return victim


_NO_WEIGHTS = "{folder} holds no pocket weights ({error}); train some with `codefend train pocket`"


def read_trained(victim: Pocket, folder: Path) -> None:
    """Load the trained part of an unmerged pocket, and a fine-tuned encoder where the folder has one.

    Raises CodefendError when the folder's weights don't fit or are not finite.
    """
    try:
        state = load_weights(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CodefendError(_NO_WEIGHTS.format(folder=folder, error=error)) from error
    for name, parameter in victim.trainable.items():
        if name not in state:
            raise CodefendError(f"{folder}/model.safetensors lacks {name!r}; it was made by another version")
        if state[name].shape != parameter.shape:
            raise CodefendError(f"{folder}/model.safetensors has another encoder or rank than this pocket ({name!r})")
        parameter.data.copy_(state[name])
    read_encoder(victim.encoder, state, folder)


def read_encoder(encoder: nn.Module, state: Mapping[str, Tensor], folder: Path) -> bool:
    """Load a fine-tuned encoder (FARE), ``encoder.*`` of the state, if there is one; returns whether there was.

    Raises CodefendError when the weights are of another encoder.
    """
    tuned = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    parameters = dict(encoder.named_parameters())
    for name, value in tuned.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise CodefendError(f"{folder}/model.safetensors has another encoder than this pocket ({name!r})")
        parameters[name].data.copy_(value)
    return bool(tuned)
