"""Each peer trains, resumes and loads as what it is; cards say what the weights were trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from codefend import purifiers
from codefend.cli.presets import PRESETS
from codefend.contrib.fare import FareConfig, fare_loss
from codefend.contrib.peers.base import PeerConfig
from codefend.contrib.peers.flowpure import FlowPureConfig
from codefend.core import runs
from codefend.core.settings import known_keys
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.training import train
from codefend.training.card import add_results, curve, refresh
from codefend.training.mining import sign_steps
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.victims.pocket import Pocket

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

PEERS = ("hgd", "flowpure", "flowpure-gauss", "adbm", "codefend-r")


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_net(tmp_path / "prior", PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16)), kind="prior")
    return tmp_path / "prior"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Eight pairs of 128 pixels, half of them "features" on lite2 and half "words" on the pocket."""
    run = runs.open_run(tmp_path / "bank", {"pairs": True, "steps": 3, "encoders": ["lite2"]})
    for shard, (kind, target) in enumerate([("features", "lite2"), ("words", "pocket")]):
        clean = torch.rand(4, 3, 128, 128, generator=gen(shard))
        attacked = clean + (shard + 1) * 4 / 255 * torch.randn(clean.shape, generator=gen(9)).sign()
        eight = {"clean": clean, "attacked": attacked.clamp(0, 1)}
        tensors = {name: (value * 255).round().to(torch.uint8) for name, value in eight.items()}
        runs.save_checkpoint(run.dir / f"pairs-{shard:05d}.safetensors", tensors, {"kind": kind})
        pairs = [{"eps": (shard + 1) * 4 / 255, "fall": 1.0}] * 4
        run.append({"key": f"shard-{shard}", "kind": kind, "target": target, "steps": 3, "pairs": pairs})
    run.close()
    return tmp_path / "bank"


def config(name: str, prior: Path, bank: Path, **changes: Any) -> PeerConfig:
    settings = {"prior": prior, "pairs": bank, "encoders": "lite0", "steps": 2, "batch": 2, "save_every": 1, **changes}
    known = known_keys(PRESETS[name].build({}))
    built = PRESETS[name].build({key: str(value) for key, value in settings.items() if key in known})
    assert isinstance(built, PeerConfig)
    return built


@pytest.mark.weights
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_and_loads(
    name: str, prior: Path, bank: Path, tmp_path: Path, bare_pocket: Pocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codefend import victims

    monkeypatch.setattr(victims, "load", lambda name: bare_pocket)
    folder = train(config(name, prior, bank, mining_steps=1), tmp_path / name)
    purifier = purifiers.load(folder)
    assert load_net(folder)[1]["kind"] == name
    assert type(purifier).__name__ in ("Hgd", "FlowPure", "DiffPure")
    rows = runs.read_rows(tmp_path / name)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(value is not None for row in rows for value in row.values())  # nan is written as null
    assert rows[0]["grad_norm"] > 0
    card = (folder / "README.md").read_text()
    assert "2 of 2 steps" in card
    assert ("PGD-3 on features on lite2 (4 pairs, 4.0 to 4.0/255)" in card) is (
        name in ("hgd", "flowpure", "codefend-r")
    )
    assert ("in the loop" in card) is (name == "adbm")


def test_an_interrupted_peer_equals_an_uninterrupted_one(
    prior: Path, bank: Path, tmp_path: Path, interrupt: Callable[[Callable[[], object], int], None]
) -> None:
    chosen = config("flowpure", prior, bank, steps=4, save_every=2)
    whole = train(chosen, tmp_path / "whole")
    interrupt(lambda: train(chosen, tmp_path / "cut"), 4)
    assert "2 of 4 steps" in (tmp_path / "cut" / "weights" / "README.md").read_text()
    cut = train(chosen, tmp_path / "cut")
    assert torch.equal(weights(whole), weights(cut))
    assert not torch.equal(weights(whole), weights(prior))


def test_a_peer_cut_short_behind_its_last_checkpoint_has_its_weights(
    prior: Path, bank: Path, tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    chosen = config("flowpure", prior, bank, steps=4, save_every=2)
    whole = train(chosen, tmp_path / "whole")
    interrupt_saved(lambda: train(chosen, tmp_path / "cut"), 4)
    assert torch.equal(weights(whole), weights(train(chosen, tmp_path / "cut")))


def weights(folder: Path) -> Tensor:
    return torch.cat([value.flatten() for value in load_net(folder)[0].state_dict().values()])


def test_what_a_bank_leaves_out_is_left_out(bank: Path) -> None:
    from codefend.training.banks import Bank

    assert len(Bank([str(bank)]).clean) == 8
    kept = Bank([str(bank)], without=("words",))
    assert len(kept.clean) == 4
    assert int((kept.clean.int() - kept.attacked.int()).abs().amax()) == 4
    assert int((Bank([str(bank)], without=("lite2",)).attacked.int() - kept.clean.int()).abs().amax()) > 8
    assert len(Bank([str(bank)], without=("lite1",)).clean) == 8  # an encoder that it never attacked
    with pytest.raises(CodefendError, match="knows no 'light'"):
        Bank([str(bank)], without=("light",))
    with pytest.raises(CodefendError, match="no pairs are left"):
        Bank([str(bank)], without=("words", "lite2"))


def test_static_peers_need_pairs(prior: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="codefend pairs"):
        train(FlowPureConfig(prior=str(prior)), tmp_path / "run")


# --- the attack in the loop ------------------------------------------------------------------------------------------


def test_sign_steps_go_down_inside_each_pictures_budget() -> None:
    clean = torch.rand(3, 3, 8, 8, generator=gen())
    eps = torch.tensor([1 / 255, 4 / 255, 16 / 255])
    weight = torch.randn(clean.shape, generator=gen(1))
    calls = []

    def objective(images: Tensor) -> Tensor:
        calls.append(images.requires_grad)
        return (weight * images).flatten(1).sum(1)

    found = sign_steps(objective, clean, eps=eps, steps=3, rel_step=1.0, generator=gen(2))
    reach = (found - clean).abs().flatten(1).amax(1)
    assert calls == [True] * 3  # no look beside the gradients
    assert torch.allclose(reach, eps, atol=1e-6)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    best = (clean - eps.view(-1, 1, 1, 1) * weight.sign()).clamp(0, 1)  # three steps of eps cross the whole ball
    assert torch.allclose(found, best, atol=1e-6)


# --- FARE ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "pocket"
    runs.save_checkpoint(folder / "model.safetensors", {"connector.scale": torch.tensor(0.5)})
    (folder / "config.json").write_text(json.dumps({"encoder": "lite0", "rank": 4}))
    return folder


@pytest.mark.weights
def test_fare_trains_an_encoder_that_a_pocket_reads(base: Path, tmp_path: Path) -> None:
    from codefend import encoders
    from codefend.core.runs import load_checkpoint
    from codefend.victims.pocket import read_encoder

    fare = FareConfig(victim=str(base), steps=2, batch=2, mining_steps=1, warmup=1, save_every=1, lr=1e-3)
    folder = train(fare, tmp_path / "fare")
    assert json.loads((folder / "config.json").read_text()) == {"encoder": "lite0", "rank": 4, "vocabulary": []}
    state, _ = load_checkpoint(folder / "model.safetensors")
    assert float(state["connector.scale"]) == 0.5  # the pocket's own part as it was
    assert {value.dtype for key, value in state.items() if key.startswith("encoder.")} == {torch.float16}
    encoder, original = encoders.load("lite0"), encoders.load("lite0")
    assert read_encoder(encoder, state, folder)
    image = torch.rand(1, 3, 64, 64, generator=gen())
    change = (encoder(image) - original(image)).norm() / original(image).norm()
    assert 1e-3 < float(change) < 1
    assert "4/255" in (folder / "README.md").read_text()
    again = train(FareConfig(**{**fare.__dict__, "victim": str(folder), "steps": 1}), tmp_path / "again")  # goes on
    assert runs.read_rows(tmp_path / "again")[0]["clean"] == 0  # the original is now the tuned one
    with pytest.raises(CodefendError, match="another encoder"):
        read_encoder(encoders.load("lite2"), load_checkpoint(again / "model.safetensors")[0], again)


@pytest.mark.weights
def test_fare_cut_short_behind_its_last_checkpoint_has_its_weights(
    base: Path, tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    chosen = FareConfig(victim=str(base), steps=2, batch=1, mining_steps=1, warmup=1, save_every=1, lr=1e-3)
    whole = train(chosen, tmp_path / "whole")
    interrupt_saved(lambda: train(chosen, tmp_path / "cut"), 2)
    ours, theirs = (
        runs.load_checkpoint(folder / "model.safetensors")[0] for folder in (whole, train(chosen, tmp_path / "cut"))
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.weights
def test_fares_loss_falls_on_the_same_pictures() -> None:
    from codefend import encoders

    encoder, original = encoders.load("lite0"), encoders.load("lite0")
    fare, images = (
        FareConfig(mining_steps=2, eps=8 / 255, mining_step=4 / 255),
        torch.rand(2, 3, 64, 64, generator=gen()),
    )
    optimizer = torch.optim.Adam(encoder.parameters(), lr=5e-4)
    losses = []
    for _ in range(4):
        terms: Any = fare_loss(fare, encoder, original, images, 0)
        losses.append(terms["loss"].item())
        assert terms["clean"] < losses[-1]  # the attack moves the features by more than the drift
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert encoder.fc.weight.grad is None  # its classifier is no part of the tokens


@pytest.mark.parametrize("text", ["", "{", '{"rank": 4}'])
def test_fare_of_what_is_no_pocket_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CodefendError, match="no folder of pocket weights"):
        train(FareConfig(victim=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- cards -----------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_means_of_its_stretches() -> None:
    rows = [{"step": i, "loss": float(i), "mined": True} for i in range(1, 11)] + [{"key": "ground-0", "loss": 9.0}]
    assert curve(rows, points=2) == [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 8.0}]
    assert curve([], points=2) == []


def test_a_card_names_no_folders_of_the_machine(prior: Path, bank: Path, tmp_path: Path) -> None:
    folder = train(config("flowpure", prior, f"{bank},{bank}", steps=1), tmp_path / "run")  # type: ignore[arg-type]
    told = (folder / "training.json").read_text() + (folder / "README.md").read_text()
    assert str(tmp_path) not in told
    assert f"prior={tmp_path.name}/prior" in told
    assert "drawn 2 times as often" in told
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text("lost")
    assert refresh(folder).read_text() == card
    with pytest.raises(CodefendError, match=r"training\.json"):
        refresh(bank)


def test_a_card_names_the_steps_that_each_kind_of_pairs_had(prior: Path, bank: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (bank / "rows.jsonl").read_text().splitlines()]
    rows[1] |= {"kind": "answers", "steps": 7}
    (bank / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = train(config("flowpure", prior, bank, steps=1), tmp_path / "run")
    known = (
        "PGD-3 on features on lite2 (4 pairs, 4.0 to 4.0/255)",
        "PGD-7 on answers on pocket (4 pairs, 8.0 to 8.0/255)",
    )
    card = (folder / "README.md").read_text()
    assert all(words in card for words in known)
    told = json.loads((folder / "training.json").read_text())  # as they were before steps were noted
    told["pairs"][0]["config"]["answer_steps"] = 7
    for made in told["pairs"][0]["made"]:
        del made["steps"]
    (folder / "training.json").write_text(json.dumps(told))
    assert refresh(folder).read_text() == card


def test_results_are_those_of_the_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import toys
    from codefend.bench import EvalConfig, evaluate
    from codefend.cli import main

    tasks = EvalConfig(tasks=("questions",), defenses=("none", "smooth"), attacks=("pgd",), steps=3, limit=6, panels=0)
    evaluate(tasks, tmp_path / "eval", loaders=toys.loaders())
    (tmp_path / "README.md").write_text("# smooth\n")
    assert main(["card", str(tmp_path), str(tmp_path / "eval"), "--defense", "smooth"]) == 0
    card = (tmp_path / "README.md").read_text()
    assert "| questions | clean | none |  | vqa_accuracy 1.000" in card
    assert "| questions | T2 | pgd | 8/255 | vqa_accuracy 1.000 [1.000, 1.000] | 100% | 6 |" in card
    assert "none |  | vqa_accuracy 0" not in card  # the bare victim's lines stay out
    assert main(["card", str(tmp_path), str(tmp_path / "eval")]) == 2
    assert "no rows of defense" in capsys.readouterr().err


def test_results_replace_earlier_ones(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match=r"no README\.md"):
        add_results(tmp_path, "x", "runs/eval")
    (tmp_path / "README.md").write_text("# mine\n\nWhat it is.\n")
    add_results(tmp_path, "| old |", "runs/a")
    path = add_results(tmp_path, "| new |", "runs/b")
    assert path.read_text() == "# mine\n\nWhat it is.\n\n## Results\n\n`runs/b`\n\n| new |\n"
