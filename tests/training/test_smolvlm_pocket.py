"""Both stages of `smolvlm-pocket`'s training, on a tiny language model: data, batches, losses, resumption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smolvlm_kit as kit
from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.runs import read_rows
from codefend.training import smolvlm_pocket as module
from codefend.training import train
from codefend.training.fit import Training, cosine_schedule, decay_groups, optimize
from codefend.types import CodefendError
from codefend.victims import smolvlm_pocket as victims

FEATURES = 5  # width of the teacher's features


def data(count: int = 6) -> module.DistillationData:
    """Each quadrant of each image has its own grey level, and features and labels with its number."""
    generator = torch.Generator().manual_seed(4)
    number = torch.arange(4 * count).view(count, 2, 2)
    cells = number.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    pixels = number.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, None].expand(-1, 3, -1, -1) * 10
    features = cells[..., None].expand(-1, -1, FEATURES).half()
    occupied = torch.stack([torch.randint(0, m, (9,), generator=generator) for m in (count, 4)], 1)
    return module.DistillationData(pixels.byte(), features, cells, occupied)


class Teacher(kit.TinyPocket):
    """A pocket whose tokens are random embeddings of its features' numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table = torch.randn(24, kit.WIDTH, generator=generator)
        self.encoder = SimpleNamespace(width=FEATURES)
        self.connector = Connector(self.table)


class Connector(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.place = table, torch.zeros(16, kit.WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        return self.table[features[..., 0].long()]


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_quadrants_of_other_scenes_bring_their_features_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "augment", lambda images, rng: images)
    config = module.SmolVLMConfig(distill_batch=8, mosaic=0.7)
    batch = module.distillation_batch(config, data(), step=3)
    numbers = (batch.images[:, 0] * 25.5).round().unfold(1, 32, 32).unfold(2, 32, 32).amin((-1, -2)).flatten(1)
    assert torch.equal(numbers.long(), batch.labels)
    assert torch.equal(batch.features, batch.labels[..., None].expand(-1, -1, FEATURES).float())
    mosaics = (batch.labels // 4).amax(1) != (batch.labels // 4).amin(1)
    assert 2 <= int(mosaics.sum()) <= 8
    assert torch.equal(module.distillation_batch(config, data(), step=3).images, batch.images)
    assert not torch.equal(module.distillation_batch(config, data(), step=4).labels, batch.labels)


def test_the_data_set_lists_occupied_quadrants_and_is_drawn_once(tmp_path: Path) -> None:
    from codefend.training.frozen import WORDS

    index = {name: i for i, name in enumerate([*WORDS, " background"])}
    pocket: Any = SimpleNamespace(features=lambda images: images.mean((1, 2, 3))[:, None, None].expand(-1, 16, 3))
    config = module.SmolVLMConfig(scenes=6, shapes=0)
    drawn = module.load_data(config, pocket, index, [], tmp_path / "data.safetensors")
    assert drawn.images.shape == (6, 3, 128, 128)
    listed = {(int(scene), int(quadrant)) for scene, quadrant in drawn.occupied}
    for scene, labels in enumerate(drawn.labels.view(-1, 4, 4)):
        for quadrant in range(4):
            part = labels[module._window(quadrant, 4)]
            occupied = bool(((part >= 0) & (part < len(index) - 1)).any())
            assert occupied == ((scene, quadrant) in listed)
    without_features: Any = SimpleNamespace()
    again = module.load_data(config, without_features, index, [], tmp_path / "data.safetensors")
    assert torch.equal(again.images, drawn.images)


def test_shapes_follow_all_scenes_in_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(numbers: Sequence[int], index: object) -> tuple[Tensor, Tensor]:
        values = torch.tensor(list(numbers))
        return (values / 255).view(-1, 1, 1, 1).expand(-1, 3, 128, 128), values[:, None].expand(-1, 16)

    def read(shapes: module.Shapes, index: object) -> tuple[Tensor, Tensor]:
        return draw([int(name) for _, name in shapes], index)

    monkeypatch.setattr(module, "_draw_scenes", draw)
    monkeypatch.setattr(module, "_read_shapes", read)
    pocket: Any = SimpleNamespace(features=lambda images: images[:, :, 0, :16].transpose(1, 2))
    shapes = [(Path("unused"), str(100 + i)) for i in range(50)]
    config = module.SmolVLMConfig(scenes=40, shapes=37)  # neither is a multiple of the 32 that are drawn together
    drawn = module.load_data(config, pocket, {" background": 0}, shapes, tmp_path / "data.safetensors")
    expected = [*range(40), *range(100, 137)]
    assert drawn.labels[:, 0].tolist() == drawn.images[:, 0, 0, 0].tolist() == expected


def test_distillation_lowers_its_loss() -> None:
    torch.manual_seed(5)
    teacher: Any = Teacher()
    student = module.TowerStudent(kit.tiny_tower(), FEATURES)
    words = F.normalize(teacher.table, dim=-1)
    config = module.SmolVLMConfig(distill_batch=8, mosaic=0.7)
    mean, std = module.initialize(student, data(), 0)
    statistics = module.FeatureStatistics(mean, std.clamp(min=1e-3))
    optimizer = torch.optim.AdamW(decay_groups(student.parameters(), module.DECAY, lr=3e-3))
    training = Training(
        parameters=dict(student.named_parameters()),
        batch=partial(module.distillation_batch, config, data()),
        loss=lambda batch, step: module.distillation_loss(student, teacher, words, statistics, batch, config),
        optimizer=optimizer,
        schedule=cosine_schedule(optimizer, 60, warmup=1),
        steps=60,
    )
    curve = [row["words"] for _, row in optimize(training)]
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def test_instruction_tuning_reaches_every_parameter() -> None:
    model = kit.trainable()
    parameters = model.trainable
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    batch = torch.rand(2, 3, 128, 128), [kit.TEXTS, kit.TEXTS[:1]]
    loss = module.instruction_loss(model, batch)["loss"]
    assert isinstance(loss, Tensor)
    loss.backward()
    silent = [name for name, p in parameters.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert all("k_proj.bias" in name for name in silent)  # softmax cancels them


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> module.SmolVLMConfig:
    """A training of both stages in seconds."""

    def instructions(*_: object) -> tuple[Tensor, list[list[tuple[str, str]]]]:
        return torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(6)), [kit.TEXTS]

    def vocabulary(pocket: Any, shapes: object) -> tuple[dict[str, int], Tensor]:
        return {}, F.normalize(pocket.table, dim=-1)

    generator = torch.Generator().manual_seed(8)
    varied = data()._replace(features=torch.rand(6, 16, FEATURES, generator=generator).half() * 20)
    replaced = {
        "load_unmerged": lambda folder: Teacher(),
        "load_shapes": list,
        "load_data": lambda *_: varied,
        "cell_vocabulary": vocabulary,
        "instruction_batch": instructions,
        "VISION": kit.VISION,
        "architecture": lambda text: victims.architecture(text, kit.VISION),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)
    return module.SmolVLMConfig(distill_steps=300, distill_batch=2, steps=4, save_every=2, warmup=1)


@pytest.mark.parametrize("step", [250, 2])
def test_both_stages_resume_after_their_last_checkpoint(
    step: int, tiny: module.SmolVLMConfig, tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    weights = train(tiny, tmp_path / "uncut")
    interrupt_saved(lambda: train(tiny, tmp_path / "cut"), step)
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists() == (step == 2)
    resumed = train(tiny, tmp_path / "cut")
    expected, state = (load_checkpoint(folder / "model.safetensors")[0] for folder in (weights, resumed))
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    config, read = victims.read_weights(resumed)
    assert config == {"kind": "smolvlm-pocket", "vision": kit.VISION}
    assert read["marks"].shape == (2, kit.WIDTH)
    keys = [row["key"] for row in read_rows(tmp_path / "cut")]
    assert keys == [*(f"distill-{10 * i}" for i in range(1, 31)), *(f"step-{i}" for i in range(1, 5))]
    assert "SmolVLM" in (resumed / "README.md").read_text()


def test_the_second_stage_goes_on_from_given_weights(tiny: module.SmolVLMConfig, tmp_path: Path) -> None:
    first = train(tiny, tmp_path / "first")
    further = replace(tiny, init=str(first), steps=1, save_every=1, lr_vision=0.0, lr_lora=0.0)
    weights = train(further, tmp_path / "further")
    expected, state = (load_checkpoint(folder / "model.safetensors")[0] for folder in (first, weights))
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    assert [row["key"] for row in read_rows(tmp_path / "further")] == ["step-1"]


def test_weights_of_another_architecture_are_refused(tiny: module.SmolVLMConfig, tmp_path: Path) -> None:
    weights = train(replace(tiny, distill_steps=1), tmp_path / "first")
    tensors, _ = load_checkpoint(weights / "model.safetensors")
    save_checkpoint(weights / "model.safetensors", {name: value[..., :1] for name, value in tensors.items()})
    with pytest.raises(CodefendError, match="another architecture"):
        train(replace(tiny, init=str(weights)), tmp_path / "further")
