"""lmms-eval's tasks behind a purifier: ``python -m lmms_eval --model codefend --model_args victim=...,defense=bridge``.

The package registers it by an entry point (group ``lmms_eval.models``). It has lmms-eval's simple interface (version
0.7): each request brings a prompt, how to generate, and a function from a document to its pictures. Victims here see
one picture, so several are set side by side; videos and sounds are refused. Importing this module imports lmms-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lmms_eval.api.model import lmms
from torch import Tensor

from codefend import purifiers, victims
from codefend.core import images
from codefend.core.runs import make_generator, progress
from codefend.defense import DefendedVictim, Defense
from codefend.types import CodefendError, HasLoss, WhiteBox

GAP = 8  # white pixels between two pictures


def manifest() -> Any:
    """What the entry point gives lmms-eval: the name and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("codefend", simple_class_path="codefend.integrations.lmms_eval.CoDefend")


class CoDefend(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """``victim`` by name (``hf:ID``, ``openai:URL#model``, ``pocket``) behind the purifier ``defense``, or ``none``."""

    def __init__(
        self, victim: str = "pocket", defense: str = "bridge", batch_size: int | str = 1, seed: int = 0, **_: Any
    ) -> None:
        """Raises CodefendError for an unknown victim or defense. Other arguments (device, ...) are ignored."""
        super().__init__()
        behind = Defense() if defense == "none" else Defense(purifiers.load(defense), name=defense)
        generator = make_generator(int(seed), "lmms-eval")
        self.model = DefendedVictim(victims.load(victim), behind, generator=generator)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 1  # "auto": one

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request, cut at its ``until``; pictures of one size are asked about together.

        All are looked at for their sizes before the first answer, and read again, a batch at a time, for their pixels.
        """
        answers = [""] * len(requests)
        with progress("lmms-eval", len(requests)) as advance:
            for group in self._batches([self._sizes(*request.args[2:6]) for request in requests]):
                asked = {i: self._read(*requests[i].args[:6]) for i in group}
                # Pictures of one size that a camera turned in different ways are of different shapes only now.
                for places in self._batches([pixels.shape for pixels, _, _ in asked.values()]):
                    batch = [group[place] for place in places]
                    stack = torch.stack([asked[i][0] for i in batch])
                    said = self.model.generate(stack, [asked[i][1] for i in batch])
                    for i, text in zip(batch, said, strict=True):
                        answers[i] = _cut(text, asked[i][2])
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                    advance(len(batch))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Mean log-likelihood per token of each continuation (a victim gives no sum), and whether it says just that.

        Raises CodefendError for a victim that only answers text.
        """
        if not isinstance(self.model.victim, WhiteBox):
            name = self.model.victim.name
            raise CodefendError(f"victim {name!r} only answers text: tasks by likelihood need a white box")
        model, found = self.model, []
        if not isinstance(model, HasLoss):
            raise CodefendError(f"victim {model.name!r} only answers text, and this task needs its loss")
        for request in requests:
            context, target, visual, doc_id, task, split = request.args[:6]
            pixels = _pictures(visual, self.task_dict[task][split][doc_id])[None]
            wanted = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            with torch.no_grad():
                loss = float(model.loss(pixels, [context], [wanted]))
            found.append((-loss, model.generate(pixels, [context])[0].strip() == wanted.strip()))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise CodefendError("a victim answers one question about one picture: tasks of several rounds cannot be run")

    def _sizes(self, visual: Any, doc_id: Any, task: str, split: str) -> tuple[Any, ...]:
        return tuple(picture.size for picture in _found(visual, self.task_dict[task][split][doc_id]))

    def _read(self, context: str, options: dict[str, Any], visual: Any, doc_id: Any, task: str, split: str) -> Any:
        until = options.get("until") or []
        pixels = _pictures(visual, self.task_dict[task][split][doc_id])
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


def _found(visual: Any, document: Any) -> list[Any]:
    """The document's Pillow pictures. Raises CodefendError where there are none, or anything else."""
    found = visual(document)
    if not found:
        raise CodefendError("a task without pictures: there is nothing to purify, and victims here want one")
    for item in found:
        if not hasattr(item, "convert"):  # a Pillow picture has it
            raise CodefendError(f"a {type(item).__name__} is no picture; tasks with videos or sounds cannot be run")
    return list(found)


def _pictures(visual: Any, document: Any) -> Tensor:
    """The document's pictures ``[3, H, W]`` in [0, 1], several side by side. Raises CodefendError for anything else."""
    parts = [images.from_pil(item).pixels for item in _found(visual, document)]
    tall = max(part.shape[1] for part in parts)
    padded = [F.pad(part, (0, GAP, 0, tall - part.shape[1]), value=1.0) for part in parts[:-1]]
    last = F.pad(parts[-1], (0, 0, 0, tall - parts[-1].shape[1]), value=1.0)
    return torch.cat([*padded, last], 2)
