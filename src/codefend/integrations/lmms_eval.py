"""lmms-eval's tasks behind a purifier: ``python -m lmms_eval --model codefend --model_args victim=...,defense=bridge``.

The package registers it by an entry point (group ``lmms_eval.models``). It has lmms-eval's simple interface (version
0.7): each request brings a prompt, how to generate, and a function from a document to its images. Victims here take
one image, so several are put side by side; videos and audio are refused. Importing this module imports lmms-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lmms_eval.api.model import lmms
from torch import Tensor

from codefend import DefendedVictim, Defense, load_victim
from codefend.core import images
from codefend.core.progress import progress
from codefend.core.seeds import make_generator
from codefend.types import CodefendError, HasLoss

GAP = 8  # white pixels between two images


def manifest() -> Any:
    """What the entry point gives lmms-eval: the name and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("codefend", simple_class_path="codefend.integrations.lmms_eval.CoDefend")


class CoDefend(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """``victim`` by name (``hf:ID``, ``openai:URL#model``, ``pocket``) behind ``defense``, a spec or ``none``."""

    def __init__(
        self, victim: str = "pocket", defense: str = "bridge", batch_size: int | str = 1, seed: int = 0, **_: Any
    ) -> None:
        """Raises CodefendError for an unknown victim or defense. Other arguments (device, ...) are ignored."""
        super().__init__()
        generator = make_generator(int(seed), "lmms-eval")
        self.model = DefendedVictim(load_victim(victim), Defense.from_spec(defense), generator=generator)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1  # "auto": one

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request, cut at its ``until``; images of one size form a batch.

        All sizes are read before the first answer, and the pixels again, a batch at a time.
        """
        answers = [""] * len(requests)
        with progress("lmms-eval", len(requests)) as advance:
            for group in self._batches([self._sizes(*request.args[2:6]) for request in requests]):
                inputs = {i: self._read(*requests[i].args[:6]) for i in group}
                # Images of one size that a camera turned in different ways have different shapes only now.
                for places in self._batches([pixels.shape for pixels, _, _ in inputs.values()]):
                    batch = [group[place] for place in places]
                    stack = torch.stack([inputs[i][0] for i in batch])
                    texts = self.model.generate(stack, [inputs[i][1] for i in batch])
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = _cut(text, inputs[i][2])
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                    advance(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Mean log-likelihood per token of each continuation (a victim gives no sum), and whether it is the answer.

        Raises CodefendError for a victim that only answers text.
        """
        model, results = self.model, []
        if not isinstance(model, HasLoss):
            name = model.victim.name
            raise CodefendError(f"victim {name!r} only answers text: tasks by likelihood need a white box")
        for request in requests:
            context, target, visual, doc_id, task, split = request.args[:6]
            pixels = _side_by_side(visual, self.task_dict[task][split][doc_id])[None]
            expected = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            with torch.no_grad():
                loss = float(model.loss(pixels, [context], [expected]))
            results.append((-loss, model.generate(pixels, [context])[0].strip() == expected.strip()))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise CodefendError("a victim answers one question about one image: tasks of several rounds are not supported")

    def _sizes(self, visual: Any, doc_id: Any, task: str, split: str) -> tuple[Any, ...]:
        return tuple(image.size for image in _images(visual, self.task_dict[task][split][doc_id]))

    def _read(self, context: str, options: dict[str, Any], visual: Any, doc_id: Any, task: str, split: str) -> Any:
        until = options.get("until") or []
        pixels = _side_by_side(visual, self.task_dict[task][split][doc_id])
        return pixels, context.replace("<image>", "").strip(), [until] if isinstance(until, str) else until

    def _batches(self, shapes: Sequence[Any]) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for index, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(index)
        size = self.batch_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _cut(text: str, until: Sequence[str]) -> str:
    for mark in until:
        text = text.partition(mark)[0] if mark else text
    return text.strip()


def _images(visual: Any, document: Any) -> list[Any]:
    """The document's Pillow images. Raises CodefendError where there are none, and for anything else."""
    items = list(visual(document) or ())
    if not items:
        raise CodefendError("a task without images: there is nothing to purify, and victims here need one")
    for item in items:
        if not callable(getattr(item, "convert", None)):  # only `core` imports Pillow
            raise CodefendError(
                f"a {type(item).__name__} is not an image; tasks with videos or audio are not supported"
            )
    return items


def _side_by_side(visual: Any, document: Any) -> Tensor:
    """The document's images ``[3, H, W]`` in [0, 1], several side by side. Raises CodefendError for anything else."""
    parts = [images.from_pil(item).pixels for item in _images(visual, document)]
    tall = max(part.shape[1] for part in parts)
    padded = [F.pad(part, (0, GAP, 0, tall - part.shape[1]), value=1.0) for part in parts[:-1]]
    last = F.pad(parts[-1], (0, 0, 0, tall - parts[-1].shape[1]), value=1.0)
    return torch.cat([*padded, last], 2)
