"""Photographs judged by image encoders: one evaluation like any other, with agreement and cosines as its scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toys
from codefend.attacks import objectives
from codefend.bench import EvalConfig, PhotographsConfig, evaluate
from codefend.bench.results import CLEAN
from codefend.bench.tasks import with_equal_noise
from codefend.core.runs import Row
from codefend.purifiers.nets import NetConfig, PurifierNet, save_net
from codefend.types import CodefendError, Example, Task

TINY: dict[str, Any] = {"encoders": ("lite1",), "limit": 4, "side": 64, "steps": 3, "panels": 0}


def by(rows: list[Row], **where: object) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def cosine(rows: list[Row], **where: object) -> float:
    chosen = by(rows, **where)
    assert chosen
    return float(sum(row["scores"]["cosine"] for row in chosen) / len(chosen))


def test_noise_is_as_large_as_the_change() -> None:
    clean = torch.full((2, 3, 64, 64), 0.5)
    changed = clean + torch.tensor([0.02, 0.1]).view(2, 1, 1, 1)
    noised = with_equal_noise(clean, changed)
    sizes = (noised - clean).square().mean((1, 2, 3)).sqrt()
    assert sizes.tolist() == pytest.approx([0.02, 0.1], rel=0.05)
    assert abs(float((noised - clean).mean())) < 0.002


def test_a_task_without_references_is_judged_by_agreement(tmp_path: Path) -> None:
    def unlabelled(name: str, split: str, limit: int | None) -> Task:
        examples = [Example(f"u{i}", toys.scene(i)[0], "left?") for i in range(4)]
        return Task(name, examples, {"agreement": toys.VQA_METRICS["exact_match"]}, "agreement")

    config = EvalConfig(
        victim="toy", tasks=("u",), defenses=("none", "smooth"), attacks=("feature",), steps=12, panels=0
    )
    loaders = toys.loaders()
    rows = evaluate(config, tmp_path, loaders=type(loaders)(loaders.victim, unlabelled, loaders.purifier))
    assert {row["headline"] for row in rows} == {"cosine"}
    assert all(row["references"] == [row["answer"]] for row in by(rows, attack=CLEAN, defense="none"))
    assert cosine(rows, attack=CLEAN, defense="none") == pytest.approx(1, abs=1e-6)
    assert cosine(rows, threat="T0", defense="none") < 0.5 < cosine(rows, threat="T0", defense="smooth")
    fallen = [row["success"]["untargeted"] for row in by(rows, threat="T0", defense="none")]
    assert sum(fallen) > 0
    assert not any(row["success"]["untargeted"] for row in by(rows, threat="T0", defense="smooth"))


@pytest.mark.weights
def test_rows_hold_the_attack_and_the_restoration(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], few_samples: None
) -> None:
    rows = evaluate(PhotographsConfig(**TINY, defenses=("none", "jpeg", "blur:sigma=2")), tmp_path)
    assert len(rows) == 4 * 3 * 2
    for row in by(rows, attack=CLEAN, defense="none"):
        assert row["scores"] == {"agreement": 1, "agreement_noise": 1, "cosine": pytest.approx(1, abs=1e-4)}
        assert row["purified_psnr"] is None  # infinite: nothing was changed
    assert cosine(rows, threat="T0", defense="none") < 0.8
    assert cosine(rows, threat="T0", defense="jpeg") > cosine(rows, threat="T0", defense="none")
    assert all(row["perturbation"]["psnr"] > 29.9 and not row["violation"] for row in by(rows, threat="T0"))
    assert all(25 < row["purified_psnr"] < 50 for row in by(rows, attack=CLEAN, defense="jpeg"))
    before = (tmp_path / "rows.jsonl").read_text()
    assert evaluate(PhotographsConfig(**TINY, defenses=("none", "jpeg", "blur:sigma=2")), tmp_path) == rows
    assert (tmp_path / "rows.jsonl").read_text() == before
    code, out, _ = run("report", tmp_path)
    assert code == 0
    assert "photographs lite1: cosine at 8/255" in out


@pytest.mark.weights
def test_an_adaptive_attack_leaves_less(tmp_path: Path) -> None:
    labels = ("none", "blur:sigma=1.5")
    rows = evaluate(PhotographsConfig(**TINY, defenses=labels, adaptive=labels[1:]), tmp_path)
    assert {row["threat"] for row in by(rows, defense=labels[1])} == {"clean", "T0", "T2"}
    oblivious, adaptive = (by(rows, defense=labels[1], threat=threat) for threat in ("T0", "T2"))
    pairs = zip(oblivious, adaptive, strict=True)
    assert all(weak["scores"]["cosine"] > strong["scores"]["cosine"] + 0.1 for weak, strong in pairs)


def test_an_adaptive_attack_lowers_the_cosine_that_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    references = []

    def away(victim: Any, clean: Tensor, *, reference: Any = None) -> Any:
        references.append(type(reference or victim).__name__)
        return features_away(victim, clean, reference=reference)

    features_away = objectives.features_away
    monkeypatch.setattr(objectives, "features_away", away)
    loaders = type(toys.loaders())(victim=lambda name: toys.ToyVictim(), purifier=toys.purifier)
    config = PhotographsConfig(**TINY | {"side": 32}, defenses=("leaky",), threats=("T2",))
    evaluate(config, tmp_path, loaders=loaders)
    assert set(references) == {"ToyVictim"}  # the bare victim's tokens of the clean image


@pytest.mark.weights
def test_weights_may_not_change_during_a_run(tmp_path: Path) -> None:
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
    rows = evaluate(PhotographsConfig(**TINY | {"encoders": ("lite1", "lite1@96")}, defenses=("none",)), tmp_path)
    attacked = by(rows, threat="T0")
    plain, resized = (by(attacked, task=f"photographs {label}") for label in ("lite1", "lite1@96"))
    assert all(row["scores"]["cosine"] < 0.8 for row in attacked)
    pairs = zip(plain, resized, strict=True)
    assert all(a["scores"]["cosine"] != b["scores"]["cosine"] for a, b in pairs)
    assert all(row["perturbation"]["linf"] <= 8 / 255 + 1e-6 for row in attacked)  # of the crop's own pixels


@pytest.mark.weights
def test_a_gate_leaves_clean_images_alone(tmp_path: Path) -> None:
    labels = ("bridge-detail", "bridge-detail:gate=true")
    rows = evaluate(PhotographsConfig(**TINY | {"side": 224}, defenses=labels), tmp_path)
    for attack in (CLEAN, "feature"):
        plain, gated = (by(rows, defense=label, attack=attack) for label in labels)
        assert [row["suspicion"] for row in plain] == pytest.approx([row["suspicion"] for row in gated], abs=1e-3)
    assert cosine(rows, defense=labels[0], threat="T0") == pytest.approx(
        cosine(rows, defense=labels[1], threat="T0"), abs=1e-4
    )
    for row, other in zip(*(by(rows, defense=label, attack=CLEAN) for label in labels), strict=True):
        assert other["purified_psnr"] is None or other["purified_psnr"] > row["purified_psnr"]


def test_mistakes_are_named(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    wrong: list[tuple[dict[str, object], str]] = [({"side": 50}, "of 32"), ({"encoders": ()}, "encoders is empty")]
    wrong += [({"encoders": (label,)}, "after the @") for label in ("lite1@", "lite1@100", "lite0@0", "lite0@wide")]
    wrong += [({"victim": "pocket"}, "judged by encoders"), ({"tasks": ("vqa",)}, "judged by encoders")]
    for change, words in wrong:
        with pytest.raises(CodefendError, match=words):
            PhotographsConfig(**change)  # type: ignore[arg-type]
    mistakes = {"eps=0": "eps", "eot=0": "eot", "adaptive=bridge-large": "not among", "defenses=nothing": "nothing"}
    for setting, words in mistakes.items():
        code, _, err = run("eval", "photographs", "--run", tmp_path / "a", "--set", setting)
        assert code == 2
        assert words in err
    assert not (tmp_path / "a").exists()


def test_an_unknown_encoder_or_folder_is_named_before_the_run_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="unknown encoder 'vit'"):
        evaluate(PhotographsConfig(encoders=("vit",), defenses=("none",), limit=1), tmp_path / "run")
    with pytest.raises(CodefendError, match=r"holds no (pictures|images)"):
        evaluate(PhotographsConfig(photographs=str(tmp_path / "none")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
