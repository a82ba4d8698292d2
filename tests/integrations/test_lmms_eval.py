"""The wrapper for lmms-eval: against the real package where it is installed, else against its documented interface."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import toys
from codefend import purifiers
from codefend.types import CodefendError

REAL = find_spec("lmms_eval") is not None


class Interface:
    """What lmms-eval 0.7.3's ``api.model.lmms`` gives a model."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if not REAL:
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["lmms_eval.api.model"], "lmms", Interface, raising=False)
    module = importlib.import_module("codefend.integrations.lmms_eval")
    monkeypatch.setattr(module, "load_victim", lambda name: toys.ToyVictim() if name == "toy" else toys.BlackBox())
    monkeypatch.setattr(purifiers, "load", lambda name: toys.PURIFIERS[name]())
    yield module
    sys.modules.pop("codefend.integrations.lmms_eval", None)


def photograph(index: int) -> Image.Image:
    return Image.fromarray((toys.scene(index)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def requests(contexts: Sequence[str], second: Any, documents: list[Any]) -> list[Any]:
    args = [(text, second, lambda doc: doc["images"], i, "task", "test") for i, text in enumerate(contexts)]
    if REAL:
        from lmms_eval.api.instance import Instance

        notes = {"task": "task", "doc_id": 0, "repeats": 1}
        return [Instance("generate_until", arguments=a, idx=0, metadata=notes) for a in args]
    return [SimpleNamespace(args=a) for a in args]


def ready(module: Any, documents: list[Any], **options: Any) -> Any:
    model = module.CoDefend(**{"victim": "toy", "defense": "smooth", "device": "cuda:0", **options})
    model.task_dict = {"task": {"test": documents}}
    return model


def attacked(index: int) -> dict[str, Any]:
    """A document whose image carries the toy's own perturbation towards blue."""
    image = toys.scene(index)[0]
    wave = toys.checkerboard(image) * torch.tensor([-1.0, -1.0, 1.0])[:, None, None]
    moved = ((image + 8 / 255 * wave).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    return {"images": [Image.fromarray(moved)]}


@pytest.mark.parametrize("batch", [1, 2, "auto"])
def test_answers_come_from_behind_the_defense_in_order(module: Any, batch: Any) -> None:
    documents = [attacked(0), attacked(4), attacked(3)]
    batch_requests = requests(["<image>\nleft?", "right?", "left?"], {"until": [" "], "max_new_tokens": 9}, documents)
    expected = [toys.scene(0)[1], toys.scene(4)[2], toys.scene(3)[1]]
    assert ready(module, documents, batch_size=batch).generate_until(batch_requests) == expected
    bare = ready(module, documents, defense="none").generate_until(batch_requests)
    assert bare == ["blue"] * 3
    both = ready(module, documents).generate_until(requests(["both"], {"until": " and"}, documents))
    assert both == [toys.scene(0)[1]]


def test_images_are_read_a_batch_at_a_time(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = MagicMock(side_effect=module.images.from_pil)
    monkeypatch.setattr(module.images, "from_pil", reader)
    documents = [{"images": [photograph(i)]} for i in range(6)]
    model, read = ready(module, documents, batch_size=2), list[int]()

    def generate(*arguments: Any) -> list[str]:
        read.append(reader.call_count)
        answers: list[str] = module.DefendedVictim.generate(model.model, *arguments)
        return answers

    monkeypatch.setattr(model.model, "generate", generate)
    answers = model.generate_until(requests(["left?"] * 6, {}, documents))
    assert answers == [toys.scene(i)[1] for i in range(6)]
    assert read == [2, 4, 6]


def test_images_with_exif_rotation_are_batched_separately(module: Any) -> None:
    upright, turned = photograph(0).resize((20, 16)), photograph(4).resize((20, 16))
    turned.getexif()[0x0112] = 6  # orientation: shown 16 wide and 20 high
    documents = [{"images": [upright]}, {"images": [turned]}]
    answers = ready(module, documents, defense="none", batch_size=2).generate_until(
        requests(["left?", "both"], {}, documents)
    )
    assert answers[0] == toys.scene(0)[1]
    assert " and " in answers[1]


def test_several_images_are_set_side_by_side(module: Any) -> None:
    joined: Tensor = module._side_by_side(lambda document: document, [photograph(0), photograph(4).resize((10, 8))])
    assert joined.shape == (3, toys.SIDE, toys.SIDE + module.GAP + 10)
    assert torch.allclose(joined[..., : toys.SIDE], toys.scene(0)[0], atol=0.51 / 255)
    assert (joined[:, :, toys.SIDE : toys.SIDE + module.GAP] == 1).all()
    assert (joined[:, 8:, -10:] == 1).all()


def test_likelihood_is_the_defended_victims(module: Any) -> None:
    documents = [attacked(0)]
    right, wrong = toys.scene(0)[1], "blue"
    model = ready(module, documents)
    (good, says), (bad, doubts) = (model.loglikelihood(requests(["left?"], t, documents))[0] for t in (right, wrong))
    assert good > bad
    assert (says, doubts) == (True, False)
    with pytest.raises(CodefendError, match="white box"):
        ready(module, documents, victim="black").loglikelihood(requests(["left?"], right, documents))


def test_unsupported_requests_are_refused(module: Any) -> None:
    for content, words in (([], "without images"), (["film.mp4"], "a str is not an image")):
        with pytest.raises(CodefendError, match=words):
            ready(module, [{"images": content}]).generate_until(requests(["a"], {}, []))
    with pytest.raises(CodefendError, match="several rounds"):
        ready(module, []).generate_until_multi_round([])


@pytest.mark.skipif(not REAL, reason="lmms-eval is not installed")
def test_the_real_registry_takes_the_entry_point(module: Any) -> None:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(module.manifest())
    assert registry.get_model_class("codefend") is module.CoDefend
    assert issubclass(module.CoDefend, lmms)
