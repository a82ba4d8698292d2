"""Pretrained purifiers: saved, loaded and uploaded, with the Hugging Face Hub replaced by a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from codefend import purifiers
from codefend.purifiers.base import Purifier
from codefend.purifiers.bridge import Bridge, BridgeOptions
from codefend.purifiers.diffpure import DiffPure
from codefend.purifiers.nets import NetConfig, PurifierNet
from codefend.types import CodefendError

IMAGES = torch.rand(2, 3, 18, 24, generator=torch.Generator().manual_seed(0))


def bridge() -> Bridge:
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16, residual_bound=0.2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return Bridge(net, BridgeOptions(evaluations=2)).eval()


def purified(purifier: Purifier) -> Tensor:
    with torch.no_grad():
        return purifier(IMAGES)


def test_a_saved_purifier_loads_with_its_options(tmp_path: Path) -> None:
    bridge().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = Bridge.from_pretrained(tmp_path)
    assert (loaded.evaluations, loaded.training) == (2, False)
    assert torch.equal(purified(loaded), purified(bridge()))
    assert Purifier.from_pretrained(tmp_path, evaluations=1).evaluations == 1
    assert purifiers.load(f"hub:{tmp_path}:evaluations=1").evaluations == 1
    assert "license: apache-2.0" in (tmp_path / "README.md").read_text()


@pytest.mark.weights
def test_a_shipped_purifier_keeps_its_detector(tmp_path: Path) -> None:
    shipped = purifiers.load("bridge-detail")
    assert isinstance(shipped, Bridge)
    shipped.save_pretrained(tmp_path)
    loaded = Bridge.from_pretrained(tmp_path, gate=True)
    assert loaded.detector == shipped.detector is not None


def test_the_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    bridge().save_pretrained(tmp_path)
    with pytest.raises(CodefendError, match="holds a Bridge, not a DiffPure"):
        DiffPure.from_pretrained(tmp_path)


def test_folders_in_the_old_format_of_diffusers_load(tmp_path: Path) -> None:
    bridge().save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    del config["format"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps({**config, "_class_name": "PurifierModel"}))
    state = {f"network.{name}": value.contiguous() for name, value in bridge().net.state_dict().items()}
    save_file(state, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    for spec in (tmp_path / "old", f"hub:{tmp_path / 'old'}"):
        loaded = purifiers.load(spec)
        assert loaded.evaluations == 2
        assert torch.equal(purified(loaded), purified(bridge()))


def test_an_upload_can_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **options: str(tmp_path / repo_id))
    assert bridge().push_to_hub("somebody/bridge") == "https://hub/somebody/bridge/commit/1"
    for loaded in (Bridge.from_pretrained("somebody/bridge"), purifiers.load("hub:somebody/bridge")):
        assert torch.equal(purified(loaded), purified(bridge()))


def test_a_failed_download_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CodefendError, match="cannot load 'somebody/bridge': offline"):
        Bridge.from_pretrained("somebody/bridge")


@pytest.mark.parametrize(
    ("name", "words"),
    [("hub:", "name a repository"), ("hub:./nowhere", "no such model folder"), ("hub:{empty}", "holds no config.json")],
)
def test_mistakes_are_named(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match=words):
        purifiers.load(name.format(empty=tmp_path))
