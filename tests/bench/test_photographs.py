"""Held-out photographs under ImageNet encoders: crops, rows, the table, and how a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("skimage")

from codefend.attacks.objectives import features_away
from codefend.bench import evaluate, photographs
from codefend.bench.photographs import SEEN, PhotographsConfig, _as_noisy, crops, names
from codefend.cli import main
from codefend.core.images import save
from codefend.core.runs import make_generator
from codefend.purifiers import WEIGHTS
from codefend.purifiers.nets import NetConfig, PurifierNet, save_net
from codefend.tasks.scenes import PHOTOGRAPHS
from codefend.tasks.training_images import HELD_OUT
from codefend.types import CodefendError

TINY = {"encoders": ("lite1",), "limit": 1, "side": 64, "steps": 3}


def test_crops_are_8_bit_windows_from_the_seed() -> None:
    config = PhotographsConfig(limit=2, side=64)
    first = crops("chelsea", config)
    assert first.shape == (2, 3, 64, 64)
    assert torch.allclose(first * 255, (first * 255).round(), atol=1e-4)
    assert torch.equal(first, crops("chelsea", config))
    assert not torch.equal(first, crops("chelsea", PhotographsConfig(limit=2, side=64, seed=1)))
    assert float(first.std()) > 0.05


def test_no_training_sees_the_held_out() -> None:
    """Scenes and trainings take scikit-image's pictures by these names; scikit-learn's two are others."""
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)


def test_seen_is_what_the_shipped_bridge_was_guided_by() -> None:
    told = json.loads((WEIGHTS / "bridge" / "training.json").read_text())
    banks = [name for bank in told["pairs"] for name in bank["config"]["encoders"]]
    assert {*told["config"]["encoders"], *banks} == set(SEEN)
    assert set(PhotographsConfig().encoders) > set(SEEN)


def test_noise_is_as_large_as_the_change() -> None:
    clean = torch.full((2, 3, 64, 64), 0.5)
    changed = clean + torch.tensor([0.02, 0.1]).view(2, 1, 1, 1)
    noised = _as_noisy(clean, changed, make_generator(0))
    sizes = (noised - clean).square().mean((1, 2, 3)).sqrt()
    assert sizes.tolist() == pytest.approx([0.02, 0.1], rel=0.05)
    assert abs(float((noised - clean).mean())) < 0.002


def test_photographs_of_ones_own_are_judged_by_name(tmp_path: Path) -> None:
    for name, level in (("b.png", 0.2), ("deep/a.png", 0.8)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, torch.full((3, 130, 140), level))
    config = PhotographsConfig(limit=2, side=64, photographs=str(tmp_path))
    assert names(config) == ["b.png", "deep/a.png"]
    assert crops("deep/a.png", config).shape == (2, 3, 64, 64)
    assert float(crops("deep/a.png", config).mean()) == pytest.approx(0.8, abs=0.01)
    assert not {"photographs", "adaptive", "eot"} & set(PhotographsConfig().recorded())
    assert config.recorded()["photographs"] == str(tmp_path)
    with pytest.raises(CodefendError, match="holds no pictures"):
        evaluate(PhotographsConfig(photographs=str(tmp_path / "none")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.weights
def test_rows_show_the_attack_and_the_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PhotographsConfig(**TINY, defenses=("none", "jpeg", "blur:sigma=2"))
    rows = evaluate(config, tmp_path)
    assert len(rows) == len(HELD_OUT) * 3
    by = {(row["photograph"], row["defense"]): row for row in rows}
    for name in HELD_OUT:
        bare, jpeg = by[name, "none"], by[name, "jpeg"]
        assert bare["cosine_clean"] == pytest.approx(1, abs=1e-4)
        assert bare["agrees_clean"] == bare["agrees_noised"] == 1
        assert bare["psnr_clean"] is None  # infinite: nothing was changed
        assert bare["cosine_attacked"] < 0.8
        assert bare["psnr_attacked"] > 29.9  # 8/255 at most
        assert 25 < jpeg["psnr_clean"] < 50
        assert jpeg["cosine_attacked"] > bare["cosine_attacked"]
    table = (tmp_path / "photographs.md").read_text()
    assert [line.split(" |")[0] for line in table.splitlines()[4:]] == ["| none", "| jpeg", "| blur:sigma=2"]
    assert "lite1 (unseen)" in table
    assert f"(n = {len(HELD_OUT)} each)" in table
    assert table.splitlines()[5].split(" | ")[3] == "-"  # nothing detects
    before = (tmp_path / "rows.jsonl").read_text()
    assert evaluate(config, tmp_path) == rows
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.weights
def test_an_attacker_who_sees_the_defense_leaves_less(tmp_path: Path) -> None:
    labels = ("none", "blur:sigma=1.5")
    config = PhotographsConfig(**TINY, defenses=labels, adaptive=labels[1:])
    rows = evaluate(config, tmp_path)
    assert len(rows) == len(HELD_OUT) * 3
    blurred = [row for row in rows if row["defense"] == labels[1]]
    plain, seen = ([row for row in blurred if ("threat" in row) == adaptive] for adaptive in (False, True))
    assert len(plain) == len(seen) == len(HELD_OUT)
    assert all(row["cosine_attacked"] > other["cosine_attacked"] + 0.1 for row, other in zip(plain, seen, strict=True))
    assert not any("agrees_clean" in row for row in seen)
    last = (tmp_path / "photographs.md").read_text().splitlines()[-1]
    assert last.startswith("| blur:sigma=1.5, seen by the attacker (T2) | - | - | - | ")
    before = (tmp_path / "rows.jsonl").read_text()
    assert evaluate(config, tmp_path) == rows
    assert (tmp_path / "rows.jsonl").read_text() == before


@pytest.mark.weights
def test_who_sees_the_defense_is_judged_by_what_the_attack_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def away(victim: Any, clean: Tensor, *, reference: Any = None) -> Any:
        asked.append(type(reference or victim).__name__)
        return features_away(victim, clean, reference=reference)

    monkeypatch.setattr(photographs, "features_away", away)
    config = PhotographsConfig(**TINY, defenses=("blur:sigma=1.5",), adaptive=("blur:sigma=1.5",))
    evaluate(config, tmp_path)
    assert set(asked) == {"Encoder"}  # the bare encoder's tokens of the clean picture, as the table's


@pytest.mark.weights
def test_weights_may_not_change_while_photographs_are_judged(tmp_path: Path) -> None:
    save_net(tmp_path / "mine", PurifierNet(NetConfig(channels=(4,), blocks=(1,), embedding=8)), kind="bridge")
    config = PhotographsConfig(**TINY, defenses=(str(tmp_path / "mine"),))
    rows = evaluate(config, tmp_path / "run")
    assert evaluate(config, tmp_path / "run") == rows
    meta = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps({**meta, "options": {"evaluations": 2}}))
    with pytest.raises(CodefendError, match=r"the weights of '.*mine' changed since"):
        evaluate(config, tmp_path / "run")


@pytest.mark.weights
def test_an_encoder_behind_a_resizing_is_attacked_through_it(tmp_path: Path) -> None:
    labels = ("lite1", "lite1@96")
    rows = evaluate(PhotographsConfig(**{**TINY, "encoders": labels}, defenses=("none",)), tmp_path)
    plain, resized = ([row for row in rows if row["encoder"] == label] for label in labels)
    assert all(row["cosine_attacked"] < 0.8 for row in rows)
    assert all(a["cosine_attacked"] != b["cosine_attacked"] for a, b in zip(plain, resized, strict=True))
    assert all(row["psnr_attacked"] > 29.9 for row in rows)  # 8/255 of the crop's own pixels
    assert "lite1@96 (unseen)" in (tmp_path / "photographs.md").read_text()


@pytest.mark.weights
def test_a_gate_shows_in_what_is_unchanged_and_flagged(tmp_path: Path) -> None:
    labels = ("bridge-detail", "bridge-detail:gate=true")
    rows = evaluate(PhotographsConfig(encoders=("lite1",), limit=1, side=224, steps=3, defenses=labels), tmp_path)
    plain, gated = ([row for row in rows if row["defense"] == label] for label in labels)
    for one, other in zip(plain, gated, strict=True):
        assert one["flagged_clean"] == other["flagged_clean"] == 0
        assert one["flagged_attacked"] == other["flagged_attacked"] == 1
        assert one["cosine_attacked"] == pytest.approx(other["cosine_attacked"], abs=1e-4)
        assert one["psnr_clean"] < 60
        assert other["psnr_clean"] is None or other["psnr_clean"] > one["psnr_clean"]
    lines = (tmp_path / "photographs.md").read_text().splitlines()[-2:]
    assert [line.split(" | ")[3] for line in lines] == ["0%, 100%"] * 2
    assert lines[1].split(" | ")[1] == "-" or "unchanged" in lines[1]


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"encoders": ("vit",)}, "known: lite0"),
        ({"side": 50}, "of 32"),
        ({"eps": 0.0}, "eps"),
    ]
    wrong.append(({"eot": 0}, "at least 1"))
    wrong += [({"adaptive": (label,)}, "is none of them") for label in ("none", "blur")]
    wrong += [({"encoders": (label,)}, "after the @") for label in ("lite1@", "lite1@100", "lite0@0", "lite0@wide")]
    for change, words in wrong:
        with pytest.raises(CodefendError, match=words):
            PhotographsConfig(**change)  # type: ignore[arg-type]
    run = ["eval", "photographs", "--run", str(tmp_path / "a")]
    assert main([*run, "--set", "defenses=nothing"]) == 2
    assert main([*run, "--max-asr", "0.1"]) == 2
    assert main([*run, "--victim", "pocket"]) == 2
    assert "judged by encoders" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
