"""A Transformers image-text-to-text model as a white-box victim: loss, features and answers from [0, 1] pixels.

The processor lays out the text (how many image tokens, grids, masks) from a blank image of the same size; the pixels
bypass it through `pixels.pixel_values`, so that gradients reach them. Answers are generated with the processor's own
8-bit arithmetic, as for a user's upload.

Shape legend: B batch, T vision tokens, D their width, L text positions, A answer tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from codefend.types import CodefendError
from codefend.victims.hf.pixels import pixel_values
from codefend.victims.hf.prefix import marker, marker_places, replaced
from codefend.victims.hf.prompts import answer_end, answer_lead, question

NEUTRAL = "Describe the picture."  # the question that `features` asks of encoders that read it (InstructBLIP)
LAYOUTS = 4096  # cached layouts; an attack needs the same few of them at every step
TEXT_ROWS = ("input_ids", "attention_mask", "type_ids")  # suffixes of keys that have one entry per text position
Layout = Mapping[str, Tensor]  # what the processor gives for one example, without its pixels


class HFVictim:
    """``model`` and ``processor`` of one checkpoint. Frozen, in eval mode; device and dtype stay unchanged."""

    greedy = True

    def __init__(self, model: Any, processor: Any, *, name: str, max_new_tokens: int = 48) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.max_new_tokens = max_new_tokens
        self.checkpointing = False
        model.requires_grad_(False).eval()
        self.kind: str = model.config.model_type
        self._end = answer_end(processor)
        # Some processors override options of their image processor (InternVL's always cuts tiles).
        self._reader = copy.copy(processor.image_processor)
        for key, value in getattr(processor, "images_kwargs", {}).items():
            if hasattr(self._reader, key):
                setattr(self._reader, key, value)
        self._layouts: dict[tuple[int, int, str], Layout] = {}
        self._encoder_decoder = _text_config(model).is_encoder_decoder
        self._selects_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    # Capabilities

    def loss(
        self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], *, prefix: Tensor | None = None
    ) -> Tensor:
        """Mean negative log-likelihood of each target and its end token, ``[B]`` float32, differentiable in the images.

        Pixels are resampled without the processor's rounding: smooth, and within about one of 255 levels of it.
        ``prefix`` ``[K, D]``: a soft prefix, embeddings before every prompt; the loss is also differentiable in it.
        """
        logits, answers = self._read(images, prompts, targets, prefix)
        flat = torch.tensor([token for answer in answers for token in answer], device=logits.device)
        nll = F.cross_entropy(logits, flat, reduction="none").to(images.device)
        return torch.stack([part.mean() for part in nll.split([len(answer) for answer in answers])])

    def margins(
        self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], *, prefix: Tensor | None = None
    ) -> list[Tensor]:
        """For each image ``[A_i]``: the logit of each token of its target minus the largest other logit there."""
        logits, answers = self._read(images, prompts, targets, prefix)
        flat = torch.tensor([token for answer in answers for token in answer], device=logits.device)[:, None]
        others = logits.scatter(1, flat, -torch.inf).amax(1)
        gaps = (logits.gather(1, flat)[:, 0] - others).to(images.device)
        return list(gaps.split([len(answer) for answer in answers]))

    def answer_logits(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        """For each image ``[A_i, V]`` float32: the logits that predict each token of its target; differentiable."""
        logits, answers = self._read(images, prompts, targets)
        return list(logits.to(images.device).split([len(answer) for answer in answers]))

    def features(self, images: Tensor) -> Tensor:
        """Vision tokens as the language model receives them, ``[B, T, D]`` float32, differentiable in the images."""
        batch = self._collate(self._lay_out(images, [NEUTRAL] * len(images)), left=False)
        accepted = inspect.signature(self.model.get_image_features).parameters
        batch = {key: value for key, value in batch.items() if key in accepted}
        with self._recompute():
            output = self.model.get_image_features(self._pixels(images), **batch, return_dict=True)
        tokens: Any = output.pooler_output
        if not isinstance(tokens, Tensor):  # one tensor for each image
            tokens = torch.cat([part.flatten(0, -2) for part in tokens])
        merged: Tensor = tokens.reshape(len(images), -1, tokens.shape[-1])
        return merged.float().to(images.device)

    @torch.no_grad()
    def generate(self, images: Tensor, prompts: Sequence[str], *, prefix: Tensor | None = None) -> list[str]:
        """Greedy answers, one batch. The images are rounded to 8 bits, as an upload is. ``prefix``: as for `loss`."""
        layouts = self._lay_out(images, self._marked(prompts, prefix))
        batch = self._collate(layouts, left=True)
        batch["pixel_values"] = self._pixels(images, exact=True)
        with self._prefixed(layouts, prefix, left=True):
            out = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False)
        question_ids = batch["input_ids"]
        length = question_ids.shape[1]
        if out.shape[1] >= length and torch.equal(out[:, :length], question_ids):
            out = out[:, length:]  # some families return question and answer, others only the answer
        return [text.strip() for text in self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [self.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Token embeddings ``[L_i, D]`` of each text."""
        table = self.model.get_input_embeddings()
        return [table(torch.tensor(ids, device=self.model.device)) for ids in self.encode(texts)]

    def save(self, folder: str | Path) -> None:
        """Write model and processor so that ``hf:folder`` loads them again."""
        from codefend.victims.hf.saving import save_victim

        save_victim(self, Path(folder))

    # Implementation

    def _read(
        self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], prefix: Tensor | None = None
    ) -> tuple[Tensor, list[list[int]]]:
        """Logits ``[sum of A, V]`` float32 where the answers' tokens are predicted, and those tokens."""
        layouts = self._lay_out(images, self._marked(prompts, prefix))
        answers = [self._answer(*pair) for pair in zip(prompts, targets, strict=True)]
        read = self._read_decoder if self._encoder_decoder else self._read_causal
        with self._recompute(), self._prefixed(layouts, prefix, left=False):
            return read(images, layouts, answers).float(), answers

    def _marked(self, prompts: Sequence[str], prefix: Tensor | None) -> Sequence[str]:
        """The prompts behind a marker for each token of the prefix."""
        if prefix is None:
            return prompts
        if self._encoder_decoder or self.kind == "instructblip":
            raise CodefendError(f"victim {self.name!r} takes no soft prefix: an encoder reads its questions as well")
        marks = marker(self.processor, self.kind) * len(prefix)
        return [marks + prompt for prompt in prompts]

    def _prefixed(
        self, layouts: Sequence[Layout], prefix: Tensor | None, *, left: bool
    ) -> AbstractContextManager[None]:
        """Embeds the prefix in the places of the markers."""
        if prefix is None:
            return nullcontext()
        mark = self.processor.tokenizer.convert_tokens_to_ids(marker(self.processor, self.kind))
        places = marker_places([layout["input_ids"] for layout in layouts], mark, len(prefix), left=left)
        return replaced(self.model, places, prefix)

    def _pixels(self, images: Tensor, *, exact: bool = False) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images [B,3,H,W], got {tuple(images.shape)}")
        pixels = pixel_values(self._reader, images, exact=exact)
        return pixels.to(self.model.device, self.model.dtype)

    def _answer(self, prompt: str, target: str) -> list[int]:
        """The target's ids as they follow those of the question, and the end token.

        Behind "Assistant:" an answer begins with a space, which most tokenizers have in its first word's token.
        """
        lead = None if self._encoder_decoder else answer_lead(self.processor, self.kind, prompt, target)
        if lead is not None:
            opening = question(self.processor, self.kind, prompt)
            start, whole = self.encode([opening, opening + lead + target])
            if whole[: len(start)] == start:
                return [*whole[len(start) :], *self._end]
        return [*self.encode([target])[0], *self._end]

    def _lay_out(self, images: Tensor, prompts: Sequence[str]) -> list[Layout]:
        """The processor's output for each example without its pixels, cached by size and question."""
        if len(prompts) != len(images):
            raise CodefendError(f"{len(images)} images but {len(prompts)} prompts")
        height, width = images.shape[-2:]
        layouts = []
        for prompt in prompts:
            key = (height, width, prompt)
            if key not in self._layouts:
                if len(self._layouts) >= LAYOUTS:
                    self._layouts.clear()
                blank = np.zeros((height, width, 3), dtype=np.uint8)
                text = question(self.processor, self.kind, prompt)
                try:
                    output = self.processor(images=[blank], text=[text], return_tensors="pt")
                except ValueError as error:  # some processors refuse very long and narrow images
                    raise CodefendError(
                        f"{self.name} does not accept an image of {width}x{height} pixels ({error}); crop or resize it"
                    ) from error
                self._layouts[key] = {k: _compact(v) for k, v in output.items() if k not in ("pixel_values", "labels")}
            layouts.append(self._layouts[key])
        return layouts

    def _collate(self, layouts: Sequence[Layout], *, left: bool) -> dict[str, Tensor]:
        """One batch on the model's device: rows of text padded (ids with the pad token), everything else stacked."""
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batch = {}
        for key in layouts[0]:
            parts = [layout[key] for layout in layouts]
            if parts[0].ndim == 2 and key.endswith(TEXT_ROWS):
                fill = (pad or 0) if key == "input_ids" else 0
                longest = max(part.shape[1] for part in parts)
                on_left = left and not key.startswith("qformer")
                gaps = [longest - part.shape[1] for part in parts]
                parts = [
                    F.pad(part, (gap, 0) if on_left else (0, gap), value=fill)
                    for part, gap in zip(parts, gaps, strict=True)
                ]
            batch[key] = torch.cat(parts).to(self.model.device)
        return batch

    def _with_answer(self, layout: Layout, answer: Sequence[int]) -> dict[str, Tensor]:
        """The layout with the answer, less its last token, behind the question."""
        ids = torch.tensor([answer[:-1]], dtype=torch.long)
        # PaliGemma's type 1 is the answer, which attends causally; elsewhere 0 is text and 1 an image.
        tails = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.full_like(ids, int(self.kind == "paligemma")),
            "mm_token_type_ids": torch.zeros_like(ids),
        }
        return {key: torch.cat([value, tails[key]], 1) if key in tails else value for key, value in layout.items()}

    def _read_causal(self, images: Tensor, layouts: Sequence[Layout], answers: Sequence[list[int]]) -> Tensor:
        """Logits ``[sum of A, V]`` at the positions that predict the answers' tokens."""
        # Right padding: attention is causal and padded positions are never read.
        batch = self._collate([self._with_answer(*pair) for pair in zip(layouts, answers, strict=True)], left=False)
        starts = [layout["input_ids"].shape[1] - 1 for layout in layouts]
        places = [torch.arange(s, s + len(a)) for s, a in zip(starts, answers, strict=True)]
        positions = torch.cat(places).unique()  # sorted; the head over the vocabulary is a large part of the memory
        extra = {"logits_to_keep": positions.to(self.model.device)} if self._selects_logits else {}
        out = self.model(**batch, pixel_values=self._pixels(images), use_cache=False, **extra)
        if self._selects_logits:
            places = [torch.searchsorted(positions, place) for place in places]
        return torch.cat([row[place.to(row.device)] for row, place in zip(out.logits, places, strict=True)])

    def _read_decoder(self, images: Tensor, layouts: Sequence[Layout], answers: Sequence[list[int]]) -> Tensor:
        """As `_read_causal`, for language models that read the question with an encoder (FlanT5 in BLIP-2)."""
        batch = self._collate(layouts, left=False)
        rows = [torch.tensor(answer) for answer in answers]
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).to(self.model.device)
        out = self.model(**batch, pixel_values=self._pixels(images), labels=labels, use_cache=False)
        return torch.cat([row[: len(answer)] for row, answer in zip(out.logits, answers, strict=True)])

    @contextmanager
    def _recompute(self) -> Iterator[None]:
        """Checkpoint the layers inside if ``checkpointing`` is set. Only they are in training mode: no dropout."""
        if not self.checkpointing or not torch.is_grad_enabled():
            yield
            return
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            if isinstance(getattr(layer, "dropout", None), float):  # OPT's layers drop by their own flag
                layer.dropout = 0.0
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False


def _compact(value: Tensor) -> Tensor:
    """``value`` in the memory of one number where all are equal: SmolVLM's pixel mask has four million."""
    first = value.flatten()[:1]
    return first.clone().expand(value.shape) if bool((value == first).all()) else value


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config(decoder=False) if not config.is_encoder_decoder else config
