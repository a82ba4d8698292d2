"""Exported purifiers against torch: values, any size, tiles, metadata, and no torch where they are served."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from codefend.integrations.onnx import OnnxPurifier
from codefend.purifiers import grid, load
from codefend.purifiers import onnx_export as export
from codefend.purifiers.nets import NetConfig, PurifierNet, save_net
from codefend.types import CodefendError

TINY = NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        net = PurifierNet(TINY)
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_net(folder, net, kind="bridge", options={"evaluations": 2})
    return folder


@pytest.fixture(scope="module")
def model(weights: Path) -> Path:
    exported = export.export_onnx(weights, weights / "model.onnx")
    assert exported.difference < 1e-5
    assert [path.name for path in weights.glob("model.onnx*")] == ["model.onnx"]  # weights inside
    return exported.path


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (37, 50), (130, 64)])
def test_any_size_is_purified_as_torch_does(size: tuple[int, int], weights: Path, model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = load(weights)(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0].permute(1, 2, 0)
    ours = OnnxPurifier(model)(pixels)
    assert ours.dtype == np.uint8
    assert np.abs(ours / 255 - expected.detach().numpy()).max() < 0.51 / 255


def test_tiles_are_torchs(weights: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TILED_ABOVE": 1000, "TILE": 96, "OVERLAP": 48, "MARGIN": 16}.items():
        monkeypatch.setattr(grid, key, value)
    pixels = np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)
    expected = load(weights)(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0].permute(1, 2, 0)
    assert np.abs(OnnxPurifier(model)(pixels) / 255 - expected.detach().numpy()).max() < 0.51 / 255


def test_serving_does_not_import_torch(model: Path) -> None:
    code = (
        "import sys, numpy as np; from codefend.integrations.onnx import OnnxPurifier as P;"
        f"p = P({str(model)!r}); assert p(np.zeros((9, 9, 3), np.uint8)).shape == (9, 9, 3);"
        "assert p.multiple == 4; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mistakes_are_named(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CodefendError, match=r"\*\.onnx"):
        export.export_onnx("bridge", tmp_path / "model.pt")
    for name in ("jpeg", "bridge:sigma=0.1", "bridge-detail:gate=true"):
        with pytest.raises(CodefendError, match="cannot be exported"):
            export.export_onnx(name, tmp_path / "model.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no")
    with pytest.raises(CodefendError, match="not a model that `codefend export` wrote"):
        OnnxPurifier(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match=r"\[H,W,3\]"):
        OnnxPurifier(model)(np.zeros((4, 4), np.uint8))


def test_a_model_that_differs_is_not_written(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    monkeypatch.setattr(
        export, "_write", lambda purifier, path: path.write_bytes((weights / "model.onnx").read_bytes())
    )
    with pytest.raises(CodefendError, match="differs from torch"):
        export.export_onnx(weights, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_the_verb_says_how_far_from_torch(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from codefend.cli import main

    out = tmp_path / "bridge.onnx"
    assert main(["export", "--purifier", str(weights), "-o", str(out)]) == 0
    assert "from torch" in capsys.readouterr().out
    pixels = np.zeros((20, 20, 3), np.uint8)
    assert OnnxPurifier(out)(pixels).shape == pixels.shape
    assert main(["export", "--purifier", str(weights), "-o", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
