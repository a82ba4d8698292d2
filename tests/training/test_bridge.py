"""The bridge's training: mining, loss terms, replays and batches, with a toy guide instead of frozen networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from codefend.core import runs
from codefend.core.assets import asset
from codefend.core.settings import override, read_settings
from codefend.encoders.views import View, ViewedEncoder
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.training import bridge, guides, mining
from codefend.training.bridge import BridgeConfig, BridgeLoss, Pairs
from codefend.training.fit import MovingAverage
from codefend.training.replay import Replays
from codefend.types import CodefendError

CONFIG = BridgeConfig(batch=4, clean=0.25, mining_steps=2, max_sigma=0.0)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pocket:
    """Features are the mean colour of each quarter; counts the calls with a gradient."""

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


class ToyGuide(guides.PocketGuide):
    """Guides by the toy in place of a pocket; records the numbers of its micro-batches."""

    def __init__(self) -> None:
        self.pocket, self.steps = Pocket(), list[int]()
        super().__init__(cast(Any, self.pocket), [cast(Any, self.pocket)])

    def encoder(self, number: int) -> Any:
        self.steps.append(number)
        return super().encoder(number)


def small_net() -> PurifierNet:
    torch.manual_seed(0)
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16, residual_bound=0.25))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=gen()))
    return net


def loss_of(config: BridgeConfig, guide: Any = None, net: PurifierNet | None = None) -> BridgeLoss:
    net = net or small_net()
    replays = Replays(max_eps=config.max_eps, rel_step=config.replay_step)
    return BridgeLoss(config, net, MovingAverage(net), guide or ToyGuide(), replays)


def mined(config: BridgeConfig = CONFIG, *, seed: int = 0, step: int = 0, texts: Any = (), guide: Any = None) -> Tensor:
    return loss_of(replace(config, seed=seed), guide).mine(images(), texts, step, gen())


def images() -> Tensor:
    return 0.3 + 0.4 * torch.rand(4, 3, 16, 16, generator=gen(5))


def reach(attacked: Tensor) -> list[float]:
    return (255 * (attacked - images()).abs().flatten(1).amax(1)).tolist()


# --- mining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lean", [False, True])
def test_mining_lowers_its_objective_through_the_network(lean: bool) -> None:
    config, net, guide = replace(CONFIG, lean=lean, max_eps=16 / 255, mining_steps=4), small_net(), ToyGuide()
    clean = images()
    mined_images = loss_of(replace(config, seed=1), guide, net).mine(
        clean, (), 0, gen()
    )  # seed 1 draws features, not words
    assert guide.pocket.gradients == 4
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    ones, zeros = torch.ones(4), torch.zeros(4)
    with torch.no_grad():
        right = guide.pocket.features(clean)
        before, after = (guide.pocket.features(net(x, ones, zeros)) for x in (clean, mined_images))
    assert float((after - right).square().sum()) > float((before - right).square().sum())


def test_lean_mining_gives_each_image_its_own_budget() -> None:
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


def test_every_evaluation_has_new_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, noise_like = [], mining.noise_like

    def spy(images: Tensor, generator: Any = None) -> Tensor:
        drawn.append(noise_like(images, generator))
        return drawn[-1]

    monkeypatch.setattr(mining, "noise_like", spy)
    mined(replace(CONFIG, noise_free=1.0, max_sigma=0.2))
    assert drawn == []
    mined(replace(CONFIG, noise_free=0.0, min_sigma=0.1, max_sigma=0.2, lean=True, mining_steps=3))
    assert len(drawn) == 3
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("without", "features"), [((), None), (("words",), True), (("features", "towards"), False)])
def test_a_kind_that_is_left_out_is_not_mined(without: tuple[str, ...], features: bool | None) -> None:
    used = set()
    for seed in range(8):
        guide = ToyGuide()
        mined(replace(CONFIG, without=without), seed=seed, guide=guide)
        used.add(bool(guide.steps))
    assert used == ({True, False} if features is None else {features})


def test_answers_are_attacked_targeted_and_untargeted() -> None:
    texts = [(f"q{i}", f"a{i}") for i in range(4)]
    attacked_answers = set()
    for seed in range(8):
        guide = ToyGuide()
        mined(seed=seed, texts=texts, guide=guide)
        attacked_answers |= {targets for targets, _ in guide.pocket.losses}
    assert attacked_answers == {("a0", "a1", "a2", "a3"), ("a1", "a2", "a3", "a0")}


def test_leaving_out_every_kind_is_refused() -> None:
    with pytest.raises(CodefendError, match="nothing to mine"):
        BridgeConfig(without=("features", "words"))
    BridgeConfig(without=("features", "words"), mined=0.0)


# --- pairs and terms -------------------------------------------------------------------------------------------------


def test_the_first_images_stay_clean_and_are_not_mined() -> None:
    guide, clean = ToyGuide(), images()
    _, attacked = loss_of(CONFIG, guide).pairs(Pairs(clean, None), 0, gen())
    assert torch.equal(attacked[0], clean[0])
    assert all(r > 0.5 for r in reach(attacked)[1:])
    _, attacked = loss_of(CONFIG, guide).pairs(Pairs(clean, clean + 0.1), 0, gen())
    assert torch.equal(attacked, torch.cat([clean[:1], clean[1:] + 0.1]))


def terms(config: BridgeConfig, texts: Any = ()) -> tuple[dict[str, float], ToyGuide]:
    guide, clean = ToyGuide(), images()
    attacked = (clean + 0.05 * torch.randn(clean.shape, generator=gen(8))).clamp(0, 1)
    losses = loss_of(config, guide).terms(clean, attacked, 0, gen(), texts)
    return {name: value.item() for name, value in losses.items()}, guide


@pytest.mark.parametrize(
    ("field", "term"),
    [("w_bridge", "bridge"), ("w_features", "features"), ("w_words", "words"), ("w_direction", "direction")],
)
def test_every_term_has_a_weight(field: str, term: str) -> None:
    full, _ = terms(CONFIG)
    off, _ = terms(replace(CONFIG, **{field: 0.0}))
    double, _ = terms(replace(CONFIG, **{field: 2 * getattr(CONFIG, field)}))
    assert full[term] > 0
    assert off.get(term, 0.0) == 0.0
    assert double[term] == pytest.approx(2 * full[term], rel=1e-5)
    assert {k: v for k, v in off.items() if k != term} == {k: v for k, v in full.items() if k != term}


def test_without_terms_on_features_nothing_is_encoded() -> None:
    _, guide = terms(replace(CONFIG, w_features=0.0, w_direction=0.0, w_words=0.0))
    assert guide.pocket.gradients == 0


def test_some_steps_are_guided_by_another_view() -> None:
    class Towered(ViewedEncoder):
        def __init__(self) -> None:
            self.name, self.view = "toy", View()

    encoders = [guides.viewed(Towered(), np.random.default_rng([n, 11]), share=0.3) for n in range(100)]
    views = [encoder.view for encoder in encoders if isinstance(encoder, ViewedEncoder)]
    assert 20 <= sum(view != View() for view in views) <= 40
    assert len(set(views)) > 8
    assert all(guides.viewed(encoder, np.random.default_rng(0), share=0.0) is encoder for encoder in encoders)
    own = cast(Any, Pocket())  # a victim of your own has one view
    assert guides.viewed(own, np.random.default_rng(0), share=1.0) is own


def test_replays_keep_their_view() -> None:
    replayed = loss_of(replace(REPLAYED, views=1.0))
    draws = [replayed._views_rng(number).random() for number in range(6)]
    assert draws[0] == draws[1] == draws[2] != draws[3] == draws[4] == draws[5]


def test_the_answers_term_needs_texts_and_a_weight() -> None:
    texts = [("q", f"a{i}") for i in range(4)]
    weighted = replace(CONFIG, w_answers=2.0)
    assert terms(weighted, texts)[0]["answers"] > 0
    assert terms(weighted)[0]["answers"] == 0
    assert "answers" not in terms(CONFIG, texts)[0]


def test_noise_levels_of_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []

    def spy(clean: Tensor, attacked: Tensor, s: Tensor, sigma: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        levels.append((s, sigma))
        return attacked, sigma

    monkeypatch.setattr(bridge, "bridge_state", spy)
    terms(replace(CONFIG, noise_free=0.0, min_sigma=0.1, max_sigma=0.25, at_one=1.0))
    s, sigma = levels[0]
    assert s.tolist() == [1.0] * 4
    assert bool(((sigma >= 0.1) & (sigma <= 0.25)).all())
    terms(CONFIG)
    assert levels[1][1].tolist() == [0.0] * 4


# --- replayed pairs --------------------------------------------------------------------------------------------------

REPLAYED = replace(CONFIG, replay=3, replay_step=0.4, mined=0.0, save_every=3, max_eps=6 / 255, warmup=1, steps=9)


class SmallBank:
    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        images = 0.3 + 0.4 * torch.rand(count, 3, 16, 16, generator=gen(int(rng.integers(1000))))
        return images, (images + 8 / 255).clamp(0, 1)


def test_replayed_pairs_ascend_the_loss_in_their_balls() -> None:
    clean, loss = images(), loss_of(REPLAYED)
    replays = loss.replays
    replays.begin(0, clean, None, untouched=1, generator=gen())
    radii = reach(replays.attacked(0).detach())
    losses = []
    for _ in range(6):
        total = torch.stack(list(loss.terms(clean, replays.attacked(0), 0, gen()).values())).sum()
        total.backward()
        losses.append(total.item())
    last = replays.attacked(0).detach()
    assert losses[-1] > losses[0]
    assert torch.equal(last[0], clean[0])
    assert all(0.9 * r < now <= 6 + 1e-3 for r, now in zip(radii[1:], reach(last)[1:], strict=True))


def test_a_replayed_pair_starts_at_the_banks_and_stays_within_the_budget() -> None:
    clean, replays = images(), Replays(max_eps=6 / 255, rel_step=0.4)
    replays.begin(0, clean, clean + 10 / 255, untouched=0, generator=gen())
    first = replays.attacked(0)
    assert torch.equal(first, clean + 10 / 255)
    first.sum().backward()
    assert max(reach(replays.attacked(0).detach())) <= 6 + 1e-3


def test_each_batch_is_replayed() -> None:
    drawn = [bridge.draw_pairs(REPLAYED, SmallBank(), n)[0].sum().item() for n in range(9)]  # type: ignore[arg-type]
    assert [len(set(drawn[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(drawn)) == 3
    two = replace(REPLAYED, micro=2)
    drawn = [bridge.draw_pairs(two, SmallBank(), n)[0].sum().item() for n in range(12)]  # type: ignore[arg-type]
    assert drawn[:6] == drawn[:2] * 3
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("behind", [False, True], ids=["between checkpoints", "behind the last one"])
def test_an_interrupted_training_on_replayed_pairs_equals_an_uninterrupted_one(
    behind: bool, tmp_path: Path, interrupt: Any, interrupt_saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "load_guide", lambda *_: ToyGuide())
    monkeypatch.setattr(bridge, "open_bank", lambda _: SmallBank())
    save_net(tmp_path / "prior", small_net(), kind="prior")
    config = replace(REPLAYED, prior=str(tmp_path / "prior"), strength=1.1)
    whole = config.train(tmp_path / "whole")
    assert load_net(whole)[1]["options"] == {"strength": 1.1}
    if behind:  # after the last checkpoint
        interrupt_saved(lambda: config.train(tmp_path / "cut"), config.steps)
    else:
        interrupt(lambda: config.train(tmp_path / "cut"), 5)
    cut = config.train(tmp_path / "cut")
    ours, theirs = (load_net(folder)[0].state_dict() for folder in (whole, cut))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_views_without_a_named_encoder_are_refused() -> None:
    with pytest.raises(CodefendError, match="encoders by name"):
        BridgeConfig(views=0.3, encoders=("victim",))


def test_a_strength_outside_its_range_is_refused() -> None:
    with pytest.raises(CodefendError, match=r"above 0, to 1\.5"):
        BridgeConfig(strength=2)


def test_replays_across_a_checkpoint_are_refused() -> None:
    with pytest.raises(CodefendError, match="replay must divide save_every=50"):
        BridgeConfig(replay=3)
    with pytest.raises(CodefendError, match="ascend the whole loss"):
        BridgeConfig(replay=5, without=("words",))


# --- batches, start, config ------------------------------------------------------------------------------------------


class NoBank:
    def draw(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(count, 3, 8, 8), torch.ones(count, 3, 8, 8)


def test_batches_for_the_language_model_are_scenes_with_texts() -> None:
    config = replace(CONFIG, mined=1.0, answers=1.0, answers_batch=2)
    clean, attacked, texts = bridge.draw_pairs(config, NoBank(), 3)  # type: ignore[arg-type]
    again = bridge.draw_pairs(config, NoBank(), 3)  # type: ignore[arg-type]
    assert (len(clean), attacked, len(texts)) == (2, None, 2)
    assert torch.equal(clean, again[0])
    assert texts == again[2]
    assert all(prompt and answer for prompt, answer in texts)
    drawn = bridge.draw_pairs(replace(CONFIG, mined=0.0), NoBank(), 3)  # type: ignore[arg-type]
    assert drawn.attacked is not None
    assert len(drawn.attacked) == 4
    plain = bridge.draw_pairs(replace(CONFIG, mined=1.0), NoBank(), 3)  # type: ignore[arg-type]
    assert (len(plain.clean), plain.attacked, plain.texts) == (4, None, ())


def test_a_share_of_the_pairs_is_compressed_under_its_own_perturbation() -> None:
    clean = torch.rand(64, 3, 16, 16, generator=gen())
    attacked = (clean + 4 / 255 * torch.randn(clean.shape, generator=gen(1)).sign()).clamp(0, 1)
    pairs = bridge.compress_clean(clean, attacked, np.random.default_rng(0), share=0.0)
    assert all(torch.equal(a, b) for a, b in zip(pairs, (clean, attacked), strict=True))
    coded, perturbed = bridge.compress_clean(clean, attacked, np.random.default_rng(0), share=0.25)
    changed = (coded - clean).abs().amax((1, 2, 3)) > 0
    assert 8 < int(changed.sum()) < 24
    assert torch.allclose(perturbed, (coded + attacked - clean).clamp(0, 1))
    assert torch.allclose((coded[changed] * 255).round() / 255, coded[changed])  # a file has 8 bits


def test_a_share_of_the_mined_steps_attacks_the_average() -> None:
    net = small_net()
    never, always = (loss_of(replace(CONFIG, mined_average=share), net=net) for share in (0.0, 1.0))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    before, after = (loss.mine(images(), (), 0, gen()) for loss in (always, never))
    assert torch.equal(before, mined())  # through the average, which is still the first network
    assert not torch.equal(after, before)
    some = loss_of(replace(CONFIG, mined_average=0.3))
    assert 60 < sum(some._mines_average(number) for number in range(300)) < 120


def test_training_starts_from_the_prior_or_from_the_identity(tmp_path: Path) -> None:
    save_net(tmp_path, small_net(), kind="prior")
    started = bridge.start_from_prior(BridgeConfig(prior=str(tmp_path), residual_bound=0.1))
    assert started.config.residual_bound == 0.1
    assert torch.equal(started.stem.weight, small_net().stem.weight)
    shipped = bridge.start_from_prior(BridgeConfig(prior="bridge-detail"))
    assert torch.equal(shipped.stem.weight, load_net(asset("weights/bridge-detail"))[0].stem.weight)
    fresh = bridge.start_from_prior(BridgeConfig(prior="none"))
    images = torch.rand(1, 3, 16, 16, generator=gen())
    assert torch.allclose(fresh(images, torch.ones(1), torch.zeros(1)), images, atol=1e-6)


def test_a_run_from_before_a_setting_existed_resumes(tmp_path: Path) -> None:
    before = BridgeConfig().recorded()
    assert "without" not in before
    assert "save_every" in before
    runs.open_run(tmp_path, {"train": "bridge", **before}).close()
    runs.open_run(tmp_path, {"train": "bridge", **BridgeConfig(noise_free=0.5).recorded()}).close()
    with pytest.raises(CodefendError, match="noise_free"):
        runs.open_run(tmp_path, {"train": "bridge", **BridgeConfig(noise_free=0.2).recorded()})


def test_each_ablation_changes_one_setting() -> None:
    files = Path(__file__).parents[2].glob("recipes/ablations/*.toml")
    family = {file.stem: override(BridgeConfig(), read_settings(file)) for file in files}
    full = family["full"]
    assert full == BridgeConfig(steps=300)
    assert len(family) == 11
    for name, config in family.items():
        changed = {key for key, value in vars(config).items() if value != getattr(full, key)}
        assert len(changed) == {"full": 0, "one-encoder": 2}.get(name, 1), name
