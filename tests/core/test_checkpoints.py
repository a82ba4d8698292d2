"""Checkpoints return the tensors and the state that were saved, or say that they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codefend.core.checkpoints import cached_tensors, find_nonfinite, load_checkpoint, load_weights, save_checkpoint
from codefend.core.seeds import make_generator
from codefend.types import CodefendError


def test_checkpoint_round_trip_with_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    generator = make_generator(5)
    tensors = {
        "base": base,
        "tied": base,
        "view": base[1:],
        "transposed": base.t(),
        "half": base.to(torch.bfloat16),
        "empty": torch.zeros(0),
        "random": generator.get_state(),
    }
    save_checkpoint(tmp_path / "c.safetensors", tensors, {"step": 7, "eps": 8 / 255, "names": ("a", "b")})
    loaded, state = load_checkpoint(tmp_path / "c.safetensors")
    assert state == {"step": 7, "eps": 8 / 255, "names": ["a", "b"]}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    expected = torch.rand(3, generator=generator)
    assert torch.equal(torch.rand(3, generator=torch.Generator().set_state(loaded["random"])), expected)


def test_damaged_and_missing_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(CodefendError, match="no checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CodefendError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_with_a_value_that_is_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = {"a": torch.ones(3, 4, dtype=dtype), "empty": torch.zeros(0), "count": torch.tensor(7)}
    save_checkpoint(tmp_path / "w.safetensors", tensors)
    loaded = load_weights(tmp_path / "w.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == dict.fromkeys(tensors, torch.float32)
    tensors["a"][1, 2] = value
    save_checkpoint(tmp_path / "w.safetensors", tensors)
    with pytest.raises(CodefendError, match=r"w.safetensors: a holds NaN or infinity; train or download these"):
        load_weights(tmp_path / "w.safetensors")


def test_extreme_and_absent_values_are_finite() -> None:
    largest = torch.finfo(torch.float32).max
    assert find_nonfinite({"large": torch.full((9,), largest), "meta": torch.empty(2, device="meta")}) == ""


def test_cached_tensors_are_made_anew_for_another_state(tmp_path: Path) -> None:
    path, made = tmp_path / "new" / "c.safetensors", []

    def make() -> dict[str, torch.Tensor]:
        made.append(len(made))
        return {"a": torch.full((2,), float(len(made)))}

    for state, value in (({"seed": 1}, 1), ({"seed": 1}, 1), ({"seed": 2}, 2)):
        assert cached_tensors(path, state, make)["a"].tolist() == [value, value]
    assert cached_tensors("", {"seed": 2}, make)["a"].tolist() == [3, 3]
    assert cached_tensors(path, {"seed": 2}, make)["a"].tolist() == [2, 2]
