"""Soft prefixes for Transformers models: learned embeddings in the places of marker tokens before the prompt.

The markers pass through chat template and processor like any text, and a hook on the embedding layer replaces them,
which works for every family without its own code.

Shape legend: B batch, K tokens of the prefix, L text positions, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from codefend.types import CodefendError
from codefend.victims.hf.prompts import question


def marker(processor: Any, kind: str) -> str:
    """A special token that questions do not have. Raises CodefendError where the tokenizer has none."""
    text, tokenizer = question(processor, kind, ""), processor.tokenizer
    added = (tokenizer.bos_token, str(getattr(processor, "image_token", "")))  # by some processors
    for token in tokenizer.all_special_tokens:
        if token not in text and token not in added:
            return str(token)
    raise CodefendError("the tokenizer has no unused special token to mark the place of a soft prefix")


def marker_places(rows: Sequence[Tensor], mark: int, count: int, *, left: bool) -> Tensor:
    """Where the ``count`` markers are after padding of ``rows``, each ``[1, L_i]``: ``[B, K]``."""
    longest = max(row.shape[1] for row in rows)
    places = []
    for row in rows:
        place = (row[0] == mark).nonzero()[:, 0]
        if len(place) != count:
            raise CodefendError("this model's processor does not keep the markers of a soft prefix")
        places.append(place + (longest - row.shape[1] if left else 0))
    return torch.stack(places)


@contextmanager
def replaced(model: Any, places: Tensor, prefix: Tensor) -> Iterator[None]:
    """Within, ``prefix`` ``[K, D]`` takes the places ``[B, K]`` of the input embeddings, differentiable in it."""

    def replace(module: Any, args: Any, output: Tensor) -> Tensor:
        if output.shape[1] <= int(places.max()):  # a single token, after the first step of a generation
            return output
        rows = torch.arange(len(places), device=output.device)[:, None]
        return output.index_put((rows, places.to(output.device)), prefix.to(output).expand(len(places), -1, -1))

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
