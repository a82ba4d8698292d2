"""Mining and the switches of the bridge's training, on a guide of a few numbers instead of frozen networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from codefend.cli.presets import PRESETS
from codefend.core import runs
from codefend.encoders.views import View
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.training import bridge, guides
from codefend.training.bridge import BridgeConfig, Step
from codefend.training.pairs import Tower
from codefend.training.replay import Replays
from codefend.training.state import Average
from codefend.types import CodefendError

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

CONFIG = BridgeConfig(batch=4, clean=0.25, mining_steps=2, max_sigma=0.0)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pocket:
    """Reads the mean colour of each quarter; remembers who asked for a gradient."""

    name = "toy"

    def __init__(self) -> None:
        self.gradients, self.losses = 0, list[tuple[tuple[str, ...], bool]]()

    def features(self, images: Tensor) -> Tensor:
        self.gradients += images.requires_grad
        return torch.nn.functional.adaptive_avg_pool2d(images - 0.5, 2).flatten(2).transpose(1, 2)

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        return self.features(images) @ torch.randn(3, len(words), generator=gen())

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        self.losses.append((tuple(targets), images.requires_grad))
        return images.flatten(1).mean(1)


class Guide(guides.Guide):
    """Guides by the toy in the pocket's place; remembers for which steps."""

    def __init__(self) -> None:
        self.pocket, self.steps = Pocket(), list[int]()
        super().__init__(cast(Any, self.pocket), [cast(Any, self.pocket)])

    def tower(self, step: int) -> Any:
        self.steps.append(step)
        return super().tower(step)


def small_net() -> PurifierNet:
    torch.manual_seed(0)
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16, residual_bound=0.25))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=gen()))
    return net


def of(config: BridgeConfig, guide: Any = None, number: int = 0, texts: Any = ()) -> Step:
    return Step(config, guide or Guide(), number, gen(), texts)


def mined(config: BridgeConfig = CONFIG, *, seed: int = 0, step: int = 0, texts: Any = (), guide: Any = None) -> Tensor:
    return bridge.mine(of(replace(config, seed=seed), guide, step, texts), small_net(), pictures())


def pictures() -> Tensor:
    return 0.3 + 0.4 * torch.rand(4, 3, 16, 16, generator=gen(5))


def reach(images: Tensor) -> list[float]:
    return (255 * (images - pictures()).abs().flatten(1).amax(1)).tolist()


# --- mining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [False, True])
def test_mining_lowers_its_objective_through_the_network(lean: bool) -> None:
    config, net, guide = replace(CONFIG, lean=lean, max_eps=16 / 255, mining_steps=4), small_net(), Guide()
    clean = pictures()
    found = bridge.mine(of(replace(config, seed=1), guide), net, clean)  # whose draw takes features, not words
    assert guide.pocket.gradients == 4
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    ones, zeros = torch.ones(4), torch.zeros(4)
    with torch.no_grad():
        right = guide.pocket.features(clean)
        before, after = (guide.pocket.features(net(x, ones, zeros)) for x in (clean, found))
    assert float((after - right).square().sum()) > float((before - right).square().sum())


def test_lean_mining_gives_each_picture_its_own_budget() -> None:
    shared, own = reach(mined()), reach(mined(replace(CONFIG, lean=True)))
    assert max(shared) - min(shared) < 0.01
    assert max(own) - min(own) > 0.5
    assert max(shared + own) <= 255 * CONFIG.max_eps + 1e-3


def test_the_budget_ramps_up() -> None:
    config = replace(CONFIG, eps_ramp=100, max_eps=16 / 255)
    early = max(max(reach(mined(config, seed=s, step=0))) for s in range(5))
    late = max(max(reach(mined(config, seed=s, step=200))) for s in range(5))
    assert early <= 1.16
    assert late > 8


def test_noise_is_fresh_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, noise_like = [], bridge.noise_like

    def spy(images: Tensor, generator: Any = None) -> Tensor:
        drawn.append(noise_like(images, generator))
        return drawn[-1]

    monkeypatch.setattr(bridge, "noise_like", spy)
    mined(replace(CONFIG, noise_free=1.0, max_sigma=0.2))
    assert drawn == []
    mined(replace(CONFIG, noise_free=0.0, min_sigma=0.1, max_sigma=0.2, lean=True, mining_steps=3))
    assert len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("without", "features"), [((), None), (("words",), True), (("features", "towards"), False)])
def test_a_family_that_is_left_out_is_not_mined(without: tuple[str, ...], features: bool | None) -> None:
    used = set()
    for seed in range(8):
        guide = Guide()
        mined(replace(CONFIG, without=without), seed=seed, guide=guide)
        used.add(bool(guide.steps))
    assert used == ({True, False} if features is None else {features})


def test_answers_are_attacked_both_ways() -> None:
    texts = [(f"q{i}", f"a{i}") for i in range(4)]
    seen = set()
    for seed in range(8):
        guide = Guide()
        mined(seed=seed, texts=texts, guide=guide)
        seen |= {targets for targets, _ in guide.pocket.losses}
    assert seen == {("a0", "a1", "a2", "a3"), ("a1", "a2", "a3", "a0")}


def test_leaving_out_everything_is_told() -> None:
    with pytest.raises(CodefendError, match="nothing to mine"):
        BridgeConfig(without=("features", "words"))
    BridgeConfig(without=("features", "words"), mined=0.0)


# --- pairs and terms -------------------------------------------------------------------------------------------------


def test_the_first_pictures_stay_clean_and_are_not_mined() -> None:
    guide, clean = Guide(), pictures()
    net = small_net()
    _, attacked = bridge.training_pair(of(CONFIG, guide), net, clean, torch.empty(0))
    assert torch.equal(attacked[0], clean[0])
    assert all(r > 0.5 for r in reach(attacked)[1:])
    _, given = bridge.training_pair(of(CONFIG, guide), net, clean, clean + 0.1)
    assert torch.equal(given, torch.cat([clean[:1], clean[1:] + 0.1]))


def terms(config: BridgeConfig, texts: Any = ()) -> tuple[dict[str, float], Guide]:
    guide, clean = Guide(), pictures()
    attacked = (clean + 0.05 * torch.randn(clean.shape, generator=gen(8))).clamp(0, 1)
    found = bridge.bridge_terms(of(config, guide, texts=texts), small_net(), clean, attacked)
    return {name: value.item() for name, value in found.items()}, guide


@pytest.mark.parametrize(
    ("field", "term"),
    [("w_bridge", "bridge"), ("w_features", "features"), ("w_words", "words"), ("w_direction", "direction")],
)
def test_every_term_has_its_switch(field: str, term: str) -> None:
    full, _ = terms(CONFIG)
    off, _ = terms(replace(CONFIG, **{field: 0.0}))
    double, _ = terms(replace(CONFIG, **{field: 2 * getattr(CONFIG, field)}))
    assert full[term] > 0
    assert off.get(term, 0.0) == 0.0
    assert double[term] == pytest.approx(2 * full[term], rel=1e-5)
    assert {k: v for k, v in off.items() if k != term} == {k: v for k, v in full.items() if k != term}


def test_no_term_that_looks_through_the_encoder_no_encoding() -> None:
    _, guide = terms(replace(CONFIG, w_features=0.0, w_direction=0.0, w_words=0.0))
    assert guide.pocket.gradients == 0


def test_some_steps_are_guided_by_another_view() -> None:
    class Towered(Tower):
        def __init__(self) -> None:
            self.name, self.view = "toy", View()

    towers = [bridge._shown(of(replace(CONFIG, views=0.3), number=n), Towered()) for n in range(100)]
    views = [tower.view for tower in towers if isinstance(tower, Tower)]
    assert 20 <= sum(view != View() for view in views) <= 40
    assert len(set(views)) > 8
    assert all(bridge._shown(of(CONFIG, number=n), tower) is tower for n, tower in enumerate(towers))
    own = cast(Any, Pocket())  # a victim of one's own prepares its pictures itself
    assert bridge._shown(of(replace(CONFIG, views=1.0)), own) is own


def test_the_answers_term_needs_texts_and_a_weight() -> None:
    texts = [("q", f"a{i}") for i in range(4)]
    weighted = replace(CONFIG, w_answers=2.0)
    assert terms(weighted, texts)[0]["answers"] > 0
    assert "answers" not in terms(weighted)[0]
    assert "answers" not in terms(CONFIG, texts)[0]


def test_noise_levels_of_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(net: Any, clean: Tensor, attacked: Tensor, s: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        asked.append((s, sigma))
        return attacked

    monkeypatch.setattr(bridge, "bridge_predict", spy)
    terms(replace(CONFIG, noise_free=0.0, min_sigma=0.1, max_sigma=0.25, at_one=1.0))
    s, sigma = asked[0]
    assert s.tolist() == [1.0] * 4
    assert bool(((sigma >= 0.1) & (sigma <= 0.25)).all())
    terms(CONFIG)
    assert asked[1][1].tolist() == [0.0] * 4


# --- replayed pairs --------------------------------------------------------------------------------------------------

REPLAYED = replace(CONFIG, replay=3, replay_step=0.4, mined=0.0, save_every=3, max_eps=6 / 255, warmup=1, steps=9)


class SmallBank:
    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        images = 0.3 + 0.4 * torch.rand(count, 3, 16, 16, generator=gen(int(rng.integers(1000))))
        return images, (images + 8 / 255).clamp(0, 1)


def test_replayed_pairs_climb_the_loss_in_their_balls() -> None:
    clean, guide, net = pictures(), Guide(), small_net()
    held = Replays(max_eps=6 / 255, rel_step=0.4)
    held.begin(0, clean, torch.empty(0), untouched=1, generator=gen())
    first = held.pictures(0)
    radii = reach(first.detach())
    losses = []
    for _ in range(6):
        present = held.pictures(0)
        loss = torch.stack(list(bridge.bridge_terms(of(REPLAYED, guide), net, clean, present).values())).sum()
        loss.backward()
        held.climb(0, clean, present)
        losses.append(loss.item())
    last = held.pictures(0).detach()
    assert losses[-1] > losses[0]
    assert torch.equal(last[0], clean[0])
    assert all(0.9 * r < now <= 6 + 1e-3 for r, now in zip(radii[1:], reach(last)[1:], strict=True))


def test_a_replayed_pair_starts_where_the_bank_has_it_and_goes_on_within_the_budget() -> None:
    clean, held = pictures(), Replays(max_eps=6 / 255, rel_step=0.4)
    held.begin(0, clean, clean + 10 / 255, untouched=0, generator=gen())
    present = held.pictures(0)
    assert torch.equal(present, clean + 10 / 255)
    present.sum().backward()
    held.climb(0, clean, present)
    assert max(reach(held.pictures(0).detach())) <= 6 + 1e-3


def test_each_batch_is_replayed_as_often_as_said() -> None:
    drawn = [bridge._images(REPLAYED, SmallBank(), n)[0].sum().item() for n in range(9)]  # type: ignore[arg-type]
    assert [len(set(drawn[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(drawn)) == 3
    two = replace(REPLAYED, micro=2)
    drawn = [bridge._images(two, SmallBank(), n)[0].sum().item() for n in range(12)]  # type: ignore[arg-type]
    assert drawn[:6] == drawn[:2] * 3
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("behind", [False, True], ids=["between checkpoints", "behind the last one"])
def test_an_interrupted_training_on_replayed_pairs_equals_an_uninterrupted_one(
    behind: bool, tmp_path: Path, interrupt: Any, interrupt_saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "find_guide", lambda *_: Guide())
    monkeypatch.setattr(bridge, "open_bank", lambda _: SmallBank())
    save_net(tmp_path / "prior", small_net(), kind="prior")
    config = replace(REPLAYED, prior=str(tmp_path / "prior"), strength=1.1)
    whole = bridge.train_bridge(config, tmp_path / "whole")
    assert load_net(whole)[1]["options"] == {"strength": 1.1}
    if behind:  # the weights are there before the checkpoint that says so
        interrupt_saved(lambda: bridge.train_bridge(config, tmp_path / "cut"), bridge, config.steps)
    else:
        interrupt(lambda: bridge.train_bridge(config, tmp_path / "cut"), 5)
    cut = bridge.train_bridge(config, tmp_path / "cut")
    ours, theirs = (load_net(folder)[0].state_dict() for folder in (whole, cut))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_views_of_a_victim_of_ones_own_are_refused() -> None:
    with pytest.raises(CodefendError, match="encoders by name"):
        BridgeConfig(views=0.3, encoders=("victim",))


def test_a_strength_that_no_purifier_takes_is_refused() -> None:
    with pytest.raises(CodefendError, match=r"above 0, to 1\.5"):
        BridgeConfig(strength=2)


def test_replays_that_a_checkpoint_would_cut_are_refused() -> None:
    with pytest.raises(CodefendError, match="replay must divide save_every=50"):
        BridgeConfig(replay=3)
    with pytest.raises(CodefendError, match="climb the whole loss"):
        BridgeConfig(replay=5, without=("words",))


# --- batches, start, config ------------------------------------------------------------------------------------------


class NoBank:
    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(count, 3, 8, 8), torch.ones(count, 3, 8, 8)


def test_batches_for_the_language_model_are_scenes_with_texts() -> None:
    config = replace(CONFIG, mined=1.0, answers=1.0, answers_batch=2)
    clean, attacked, texts = bridge._images(config, NoBank(), 3)  # type: ignore[arg-type]
    again = bridge._images(config, NoBank(), 3)  # type: ignore[arg-type]
    assert (len(clean), attacked.numel(), len(texts)) == (2, 0, 2)
    assert torch.equal(clean, again[0])
    assert texts == again[2]
    assert all(prompt and answer for prompt, answer in texts)
    assert len(bridge._images(replace(CONFIG, mined=0.0), NoBank(), 3)[1]) == 4  # type: ignore[arg-type]
    plain = bridge._images(replace(CONFIG, mined=1.0), NoBank(), 3)  # type: ignore[arg-type]
    assert (len(plain[0]), plain[1].numel(), plain[2]) == (4, 0, [])


def test_a_share_of_the_pairs_is_compressed_under_its_own_perturbation() -> None:
    clean = torch.rand(64, 3, 16, 16, generator=gen())
    attacked = (clean + 4 / 255 * torch.randn(clean.shape, generator=gen(1)).sign()).clamp(0, 1)
    kept = bridge.compressed(clean, attacked, np.random.default_rng(0), share=0.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, (clean, attacked), strict=True))
    coded, perturbed = bridge.compressed(clean, attacked, np.random.default_rng(0), share=0.25)
    changed = (coded - clean).abs().amax((1, 2, 3)) > 0
    assert 8 < int(changed.sum()) < 24
    assert torch.allclose(perturbed, (coded + attacked - clean).clamp(0, 1))
    assert torch.allclose((coded[changed] * 255).round() / 255, coded[changed])  # what a file holds has 8 bits


def test_a_share_of_the_steps_attacks_the_average() -> None:
    assert not any(bridge._attacks_average(CONFIG, step) for step in range(50))
    chosen = [bridge._attacks_average(replace(CONFIG, mined_average=0.3), step) for step in range(300)]
    assert 60 < sum(chosen) < 120
    net = small_net()
    average = Average(dict(net.named_parameters()))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    copy = bridge.averaged(net, average)
    assert all(torch.equal(p, q) for p, q in zip(copy.parameters(), small_net().parameters(), strict=True))


def test_training_starts_from_the_prior_or_from_nothing(tmp_path: Path) -> None:
    save_net(tmp_path, small_net(), kind="prior")
    started = bridge.start_from_prior(BridgeConfig(prior=str(tmp_path), residual_bound=0.1))
    assert started.config.residual_bound == 0.1
    assert torch.equal(started.stem.weight, small_net().stem.weight)
    fresh = bridge.start_from_prior(BridgeConfig(prior="none"))
    images = torch.rand(1, 3, 16, 16, generator=gen())
    assert torch.allclose(fresh(images, torch.ones(1), torch.zeros(1)), images, atol=1e-6)


def test_a_run_from_before_a_switch_existed_goes_on(tmp_path: Path) -> None:
    before = BridgeConfig().recorded()
    assert "without" not in before
    assert "save_every" in before
    runs.open_run(tmp_path, {"train": "bridge", **before}).close()
    runs.open_run(tmp_path, {"train": "bridge", **BridgeConfig(noise_free=0.5).recorded()}).close()
    with pytest.raises(CodefendError, match="noise_free"):
        runs.open_run(tmp_path, {"train": "bridge", **BridgeConfig(noise_free=0.2).recorded()})


def test_each_ablation_changes_what_it_says_and_nothing_else() -> None:
    full = PRESETS["ablation-full"].build({})
    family = {name: preset.build({}) for name, preset in PRESETS.items() if name.startswith("ablation-")}
    assert full == BridgeConfig(steps=300)
    assert len(family) == 11
    for name, config in family.items():
        changed = {key for key, value in vars(config).items() if value != getattr(full, key)}
        assert len(changed) == {"ablation-full": 0, "ablation-one-encoder": 2}.get(name, 1), name
