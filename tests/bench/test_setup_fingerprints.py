"""Resuming an evaluation: weights that changed are found, whatever they are called by, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import toys
from codefend.bench import evaluate
from codefend.bench.setup import FINGERPRINT_CHUNK, fingerprints
from codefend.types import CodefendError
from evaluate_kit import SMALL


def weights(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_a_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    one, twin = weights(tmp_path / "one"), weights(tmp_path / "twin")
    (one / "README.md").write_text("a card is no weight")
    first, same = fingerprints([str(one), str(twin)]).values()
    assert first == same
    weights(one, b"weighty")
    assert fingerprints([str(one)])[str(one)] != first
    (twin / "more").mkdir()
    (twin / "more" / "adapter.safetensors").write_bytes(b"")
    assert fingerprints([str(twin)])[str(twin)] != first


@pytest.mark.parametrize("place", [0, FINGERPRINT_CHUNK * 3 - 1])
def test_both_ends_of_a_large_file_count(tmp_path: Path, place: int) -> None:
    content = bytearray(FINGERPRINT_CHUNK * 3)
    before = fingerprints([str(weights(tmp_path / "w", bytes(content)))])
    content[place] = 1
    assert fingerprints([str(weights(tmp_path / "w", bytes(content)))]) != before


def test_names_lead_to_their_folders(tmp_path: Path) -> None:
    folder = str(weights(tmp_path / "w"))
    spelled = [folder, f"{folder}:sigma=0.1", f"hf:{folder}", f"hf-latent:{folder}:t=0.1,steps=1"]
    keys = fingerprints([*spelled, "none", "jpeg:quality=75", "openai:http://localhost:1/v1#m", "bridge"])
    assert list(keys) == [*spelled, "bridge"]  # and one that ships
    assert len({keys[name] for name in spelled}) == 1
    former = fingerprints(
        ["bridge-coarse:sigma=0.15"]
    )  # so that a run with the former weights is not resumed with others
    assert list(former.values()) == [keys["bridge"]]


def test_an_evaluation_refuses_other_weights_under_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = str(weights(tmp_path / "mine"))
    monkeypatch.setitem(toys.PURIFIERS, mine, toys.Smooth)
    config, run = replace(SMALL, defenses=("none", mine), threats=("T0",)), tmp_path / "run"
    rows = evaluate(config, run, loaders=toys.loaders())
    assert evaluate(config, run, loaders=toys.loaders()) == rows
    assert list(json.loads((run / "bench.json").read_text())["weights"]) == [mine]
    weights(Path(mine), b"trained on")
    with pytest.raises(CodefendError, match=r"the weights of '.*mine' changed since"):
        evaluate(config, run, loaders=toys.loaders())
