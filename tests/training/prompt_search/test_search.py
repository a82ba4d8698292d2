"""Searches on a toy victim: their results, resumption after a kill, and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codefend.attacks import ATTACKS
from codefend.attacks.base import PromptObjective
from codefend.core.images import quantize8
from codefend.core.runs import Run, open_run, read_rows
from codefend.defense import DefendedVictim, Defense
from codefend.prompts import PromptPolicy, load, load_any
from codefend.prompts.folders import load_folder, save_folder
from codefend.prompts.generator import GeneratedPolicy, query_context
from codefend.prompts.gepa_search import GepaConfig
from codefend.prompts.items import Item
from codefend.prompts.soft import SoftPolicy
from codefend.prompts.writer import Writer
from codefend.training.prompt_search import optimize_prompt
from codefend.training.prompt_search.bank import AttackConfig, ItemBuilder, SearchLoaders, attack_task
from codefend.training.prompt_search.config import SearchConfig
from codefend.training.prompt_search.generator import GeneratorConfig, RewardModel, generator_training
from codefend.training.prompt_search.policy_training import train_policy
from codefend.training.prompt_search.search import build_items, load_models, make_proposer
from codefend.training.prompt_search.soft import SoftConfig
from codefend.types import CodefendError, HasMargins, HasWordScores
from prompts_kit import BANK, HELP, Killed, Suggestible, black_box, random_image, search_loaders, tiny_writer
from toys import Leaky, Rounded, ToyVictim, task

CONFIG = SearchConfig(
    victim="toy",
    bank=BANK,
    gepa=GepaConfig(evaluations=300),
    soft=SoftConfig(steps=12, check_every=4, lr=0.2),
    generator=GeneratorConfig(tokens=6, steps=2, check_every=1, samples=1, bank=2, gate=1, pairs=2, lessons=1),
)


def row_counts(run: Path) -> dict[str, int]:
    kinds = [row["kind"] for row in read_rows(run)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def train_generator(
    victim: Any, writer: Writer, item: Item, config: GeneratorConfig, folder: Path, **options: Any
) -> list[GeneratedPolicy]:
    """The candidates of a training on one item."""
    candidates: list[GeneratedPolicy] = []
    training = generator_training(victim, writer, [item], config, candidates.append, **options)
    train_policy(training, folder, "generator", lambda row: None)
    return candidates


def attacked_item(query: str = "left?") -> Item:
    return Item("i", "attacked", "pgd", "none", "t", random_image(), query, "red", lambda answer: 0.0)


@pytest.mark.parametrize("method", ["gepa", "soft"])
def test_a_search_results_in_a_policy_that_helps_and_a_card_with_its_cost(tmp_path: Path, method: Any) -> None:
    result = optimize_prompt(replace(CONFIG, method=method), tmp_path, loaders=search_loaders())
    assert result.helps
    assert result.baseline.robust == 0
    assert result.score.robust == 1
    assert result.score.clean == result.baseline.clean == 1
    assert result.score.refusal == 0
    policy = load_any(result.folder)
    card = (result.folder / "README.md").read_text()
    assert card.startswith(f"# {method} policy for toy: more robust than no prompt")
    assert "- apgd: 1.000 (no prompt 0.000)" in card
    assert json.loads((tmp_path / "result.json").read_text())["helps"] is True
    candidates = [row["policy"] for row in read_rows(tmp_path) if row["kind"] == "candidate"]
    assert policy.key in candidates
    assert all((tmp_path / "candidates" / key / "policy.json").is_file() for key in candidates)
    steps = [row["step"] for row in read_rows(tmp_path) if row["kind"] == "step"]
    assert steps == (list(range(1, 13)) if method == "soft" else [])


@pytest.mark.parametrize("method", ["gepa", "soft", "generator"])
def test_a_killed_search_resumes_with_the_same_result(tmp_path: Path, method: Any) -> None:
    config = replace(CONFIG, method=method)
    whole = optimize_prompt(config, tmp_path / "whole", loaders=search_loaders())
    total = row_counts(tmp_path / "whole")["answer"]
    with pytest.raises(KeyboardInterrupt):
        optimize_prompt(config, tmp_path / "run", loaders=search_loaders(Killed(total * 2 // 3)))
    before = row_counts(tmp_path / "run")["answer"]
    assert 0 < before < total
    victim = Killed(total - before)  # a question too many would interrupt it
    resumed = optimize_prompt(config, tmp_path / "run", loaders=search_loaders(victim))
    assert victim.left == 0
    assert (resumed.name, resumed.score) == (whole.name, whole.score)
    assert row_counts(tmp_path / "run") == row_counts(tmp_path / "whole")
    assert optimize_prompt(config, tmp_path / "run", loaders=search_loaders(Killed(0))).name == whole.name


def test_result_and_card_say_where_no_policy_helps(tmp_path: Path) -> None:
    config = replace(CONFIG, gepa=GepaConfig(evaluations=40))  # enough for the first policy only
    result = optimize_prompt(config, tmp_path, loaders=search_loaders())
    assert not result.helps
    assert "no better than no prompt" in (result.folder / "README.md").read_text()


def test_a_search_for_a_black_box_attacks_a_surrogate(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="only answers text: name a white box"):
        optimize_prompt(CONFIG, tmp_path / "a", loaders=search_loaders(black_box()))
    with pytest.raises(CodefendError, match="takes no embeddings"):
        optimize_prompt(replace(CONFIG, method="soft"), tmp_path / "b", loaders=search_loaders(black_box()))
    assert not (tmp_path / "b").exists()
    for method in ("gepa", "generator"):
        config = replace(CONFIG, method=method, surrogate="white", gepa=GepaConfig(evaluations=300))  # type: ignore[arg-type]
        result = optimize_prompt(config, tmp_path / method, loaders=search_loaders(black_box()))
        assert result.baseline.robust == 0
        assert result.helps == (method == "gepa")


@pytest.mark.parametrize("setting", ["seen", "held_out"])
def test_an_attack_that_the_victim_lacks_a_capability_for_leaves_no_run_folder(tmp_path: Path, setting: Any) -> None:
    changes: dict[str, Any] = {setting: ("feature", "word-head", "planted")}
    with pytest.raises(CodefendError, match=f"'word-head' cannot attack .*; here --set bank.{setting}=feature,planted"):
        optimize_prompt(replace(CONFIG, bank=replace(BANK, **changes)), tmp_path / "run", loaders=search_loaders())
    assert not (tmp_path / "run").exists()


def test_a_local_model_proposes_and_its_bad_proposals_are_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Rambling:
        def __init__(self) -> None:
            self.requests: list[str] = []

        def complete(self, prompt: str, *, generator: Any = None) -> str:
            self.requests.append(prompt)
            return [HELP, "", "word " * 500][len(self.requests) % 3]

    writer = Rambling()
    config = replace(CONFIG, gepa=GepaConfig(evaluations=400, proposer="local"))
    result = optimize_prompt(config, tmp_path, loaders=replace(search_loaders(), writer=lambda: writer))  # type: ignore[arg-type,return-value]
    assert result.helps
    assert 'expected "' in writer.requests[0]
    assert "proposal refused: it is empty" in capsys.readouterr().err
    proposals = [row["text"] for row in read_rows(tmp_path) if row["kind"] == "proposal"]
    assert HELP in proposals
    assert max(map(len, proposals)) <= 600


def test_answers_are_saved_when_a_victim_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)

    class Down(Killed):
        def generate(self, images: Tensor, prompts: Sequence[str], *, prefix: Tensor | None = None) -> list[str]:
            try:
                return super().generate(images, prompts, prefix=prefix)
            except KeyboardInterrupt:
                raise ConnectionError("no route to host") from None

    with pytest.raises(CodefendError, match=r"failed 3 times \(no route to host\); answers so far are saved"):
        optimize_prompt(CONFIG, tmp_path, loaders=search_loaders(Down(150)))
    assert row_counts(tmp_path)["answer"] > 100
    assert optimize_prompt(CONFIG, tmp_path, loaders=search_loaders()).helps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be 1 or more"),
        ({"bank": replace(BANK, held_out=("pgd",))}, "'pgd' is in bank.seen and in bank.held_out"),
        ({"bank": replace(BANK, seen=("pdg",))}, "did you mean 'pgd'"),
        ({"bank": replace(BANK, seen=("pgd", "pgd"))}, "'pgd' is named twice"),
        ({"bank": replace(BANK, attack=AttackConfig(eps=math.nan))}, "above 0 and finite, not nan"),
        ({"bank": replace(BANK, attack=AttackConfig(eps=math.inf))}, "above 0 and finite, not inf"),
        ({"bank": replace(BANK, attack=AttackConfig(eps=8 / 255))}, "write 8, not"),
        ({"bank": replace(BANK, attack=AttackConfig(steps=0))}, "bank.attack.steps must be 1 or more, not 0"),
        ({"bank": replace(BANK, attack=AttackConfig(cheap_steps=0))}, "bank.attack.cheap_steps"),
        ({"bank": replace(BANK, attack=AttackConfig(queries=0))}, "bank.attack.queries"),
        ({"bank": replace(BANK, seen=("word-head",))}, "no space that vision tokens and words share"),
        ({"gepa": GepaConfig(components=("prefx",))}, "gepa.components"),
        ({"gepa": GepaConfig(proposer="someone")}, "operators, local, or an address"),
        ({"gepa": GepaConfig(proposer="http://host")}, "gepa.model"),
        ({"gepa": GepaConfig(seed_policy="nothing")}, "unknown prompt 'nothing'"),
        ({"method": "soft", "soft": SoftConfig(tokens=65)}, "soft.tokens must be 1 to 64"),
        ({"method": "generator", "generator": GeneratorConfig(samples=-1)}, "generator.samples"),
        ({"method": "generator", "generator": GeneratorConfig(rank=0)}, "generator.rank"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CodefendError, match=message):
        optimize_prompt(replace(CONFIG, **change), tmp_path, loaders=search_loaders())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": replace(BANK, tasks=("questoins",))}, "unknown task"),
        ({"bank": replace(BANK, tasks=("captions",))}, "no split 'val'"),
        ({"bank": replace(BANK, purifier="brigde")}, "unknown purifier"),
        ({"bank": replace(BANK, purifier="jpeg+prompt=doubt")}, "names a prompt policy: list policies separately"),
        ({"surrogate": "whiet"}, "unknown victim 'whiet'"),
    ],
)
def test_names_are_looked_up_before_the_folder_is_created(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def load_task(name: str, split: str, limit: int | None) -> Any:
        if (name, split) == ("captions", "val"):
            raise CodefendError("captions has no split 'val'")
        return task(name, split, limit)

    def victim(name: str) -> Any:
        if name != "toy":
            raise CodefendError(f"unknown victim {name!r}")
        return Suggestible()

    loaders = replace(search_loaders(), task=load_task, victim=victim, purifier=SearchLoaders().purifier)
    with pytest.raises(CodefendError, match=message):
        optimize_prompt(replace(CONFIG, **change), tmp_path / "run", loaders=loaders)
    assert not (tmp_path / "run").exists()


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    optimize_prompt(replace(CONFIG, gepa=GepaConfig(evaluations=40)), tmp_path, loaders=search_loaders())
    with pytest.raises(CodefendError, match="holds a run with another config: seed"):
        optimize_prompt(replace(CONFIG, gepa=GepaConfig(evaluations=40), seed=1), tmp_path, loaders=search_loaders())


@pytest.mark.parametrize("name", ["stadv", "patch"])
def test_an_attack_with_its_own_bound_is_not_clipped_to_the_ball(name: str) -> None:
    toy = task("questions", "train", 4)
    generator = torch.Generator().manual_seed(0)
    noisy = [replace(e, image=quantize8(torch.rand(3, 24, 24, generator=generator))) for e in toy.examples]
    inputs = attack_task(name, Suggestible(), replace(toy, examples=noisy), AttackConfig(eps=1.0, steps=8))
    clean, attacked = torch.stack([e.image for e in noisy]), torch.stack(inputs.images)
    assert float((attacked - clean).abs().max()) > 4 / 255
    assert ATTACKS[name].build().outside(attacked, clean).tolist() == [0, 0, 0, 0]  # type: ignore[attr-defined]


def test_an_image_alone_in_its_batch_imitates_another_one() -> None:
    victim, toy = ToyVictim(), task("questions", "train", 9)
    inputs = attack_task("feature-target", victim, toy, AttackConfig(cheap_steps=20))
    attacked, clean = torch.stack(inputs.images), torch.stack([quantize8(e.image) for e in toy.examples])
    cosines = torch.nn.functional.cosine_similarity(victim.features(attacked), victim.features(clean), dim=-1)
    assert cosines.mean(1).max() < 0.9
    with pytest.raises(CodefendError, match="has one image"):
        attack_task("feature-target", victim, task("questions", "train", 1), AttackConfig())


def test_adaptive_attacks_go_through_each_purifier_and_the_policy(tmp_path: Path) -> None:
    policy = PromptPolicy("p", prefix="Mind the colours. ")
    purifiers: dict[str, Any] = {"none": None, "leaky": Leaky(), "rounded": Rounded()}
    config = AttackConfig(steps=6)

    def attacked(policy: PromptPolicy | None) -> dict[str, Tensor]:
        items = ItemBuilder(Suggestible(), purifiers, tmp_path, config, policy).items("t", task("questions"), ["pgd"])
        return {
            label: torch.stack([item.image for item in items if (item.group, item.variant) == ("attacked", label)])
            for label in purifiers
        }

    oblivious, adaptive = attacked(None), attacked(policy)
    assert torch.equal(oblivious["rounded"], oblivious["none"])  # 8-bit images
    assert torch.equal(adaptive["rounded"], adaptive["none"])  # BPDA
    assert not torch.equal(adaptive["leaky"], oblivious["leaky"])


def test_the_local_model_proposes_the_same_after_a_kill() -> None:
    config = replace(CONFIG, gepa=GepaConfig(proposer="local"))
    whole, resumed = make_proposer(config, search_loaders()), make_proposer(config, search_loaders())
    proposals = [whole("prefix", "x", (), turn) for turn in (1, 2, 3)]
    assert len(set(proposals)) == 3
    assert resumed("prefix", "x", (), 3) == proposals[2]


def test_policy_json_is_written_after_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Run.write

    def killed(run: Run, name: str, content: Any) -> Path:
        if name == "policy/model.safetensors":
            raise KeyboardInterrupt
        return write(run, name, content)

    monkeypatch.setattr(Run, "write", killed)
    config = replace(CONFIG, method="soft", soft=SoftConfig(steps=4, check_every=2, lr=0.2))
    with pytest.raises(KeyboardInterrupt):
        optimize_prompt(config, tmp_path, loaders=search_loaders())
    assert not (tmp_path / "policy" / "policy.json").exists()


def test_the_search_plants_other_sentences_than_the_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prompt_objective_for(*_: object) -> PromptObjective:
        """The longer the prompt, the better for the attacker."""
        return lambda prompts: lambda images: -torch.tensor([float(len(prompt)) for prompt in prompts])

    monkeypatch.setattr("codefend.bench.attacking.prompt_objective_for", prompt_objective_for)
    bank = replace(CONFIG.bank, seen=("planted",), held_out=("injection",), search_scenes=12, says=("one", "two"))
    loaders = search_loaders()
    with open_run(tmp_path, {}) as run:
        config = replace(CONFIG, bank=bank)
        parts = build_items(config, run, load_models(config, loaders))
    searched, selected = (" ".join(i.prompt for i in items if i.group == "attacked") for items in parts)
    target = loaders.task(bank.tasks[0], "val", 1).target
    assert "one" in searched.split()
    assert "two" in searched.split()
    assert target
    assert target not in searched
    assert target in selected


def test_a_generator_learns_to_write_the_text_with_the_highest_reward(tmp_path: Path) -> None:
    class Fond(Suggestible):
        """Likes one sentence."""

        def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], **_: Any) -> Tensor:
            return torch.tensor([0.0 if HELP in prompt else 1.0 for prompt in prompts])

    writer = tiny_writer()

    def likelihood() -> float:
        return writer.log_likelihoods([query_context(writer, "left?")], [HELP])[0].item()

    before = likelihood()
    config = GeneratorConfig(
        place="before", steps=25, check_every=25, bank=21, lr=2e-2, warmup=1, length_cost=0.0, pairs=0, lessons=0
    )
    candidates = train_generator(Fond(), writer, attacked_item(), config, tmp_path)
    assert likelihood() > before + 1
    assert candidates[-1]("left?") == f"{HELP}\nleft?"


def test_a_generator_learns_to_write_nothing_where_nothing_helps(tmp_path: Path) -> None:
    class Indifferent(Suggestible):
        """Nearly the same loss with every text, a little lower with longer ones."""

        def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], **_: Any) -> Tensor:
            return torch.tensor([1.0 - 0.001 * len(prompt) for prompt in prompts])

    config = GeneratorConfig(steps=25, check_every=25, bank=21, lr=2e-2, warmup=1, gap=1.0, pairs=0, lessons=0)
    assert train_generator(Indifferent(), tiny_writer(), attacked_item(), config, tmp_path)[-1]("left?") == "left?"


def test_a_generator_learns_to_repeat_a_question_after_planted_text(tmp_path: Path) -> None:
    class Sandwiched(Suggestible):
        """Answers the last question."""

        def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], **_: Any) -> Tensor:
            return torch.tensor([0.0 if prompt.endswith("textures.") else 1.0 for prompt in prompts])

    question, query = "Trust the textures.", "Trust the textures. Say cheese."
    config = GeneratorConfig(steps=25, check_every=25, bank=0, lr=2e-2, warmup=1, gate=1, pairs=0, lessons=0)
    policy = train_generator(Sandwiched(), tiny_writer(), attacked_item(query), config, tmp_path)[-1]
    assert policy(query) == f"{query}\n{question}"
    assert policy.around(query) == ("", f"\n{question}")
    assert load_folder(save_folder(policy, tmp_path / "p"), writer=tiny_writer())(query) == policy(query)


def test_a_generator_is_trained_on_pairs_alone_at_first(tmp_path: Path) -> None:
    victim = Suggestible()
    config = GeneratorConfig(steps=3, lessons=3, check_every=3, pairs=2, gate=1)
    candidates = train_generator(victim, tiny_writer(), attacked_item(), config, tmp_path, planted=["cheese"])
    assert victim.calls == 0
    assert [policy.name for policy in candidates] == ["generator-0003"]


def test_rewards_are_averaged_over_the_images_of_a_query() -> None:
    class Partial(Suggestible):
        """A text helps with the first of four images and harms with the others."""

        def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str], **_: Any) -> Tensor:
            self.calls += len(prompts)
            good = 1.0 if targets[0] == "0" else -1.0
            return torch.tensor([2.0 - good * ("Help" in prompt) for prompt in prompts])

    victim = Partial()
    items = [replace(attacked_item(), id=f"{i}", answer=f"{i}") for i in range(4)]
    rewards = RewardModel(victim, items, GeneratorConfig(length_cost=0.0))
    assert rewards("left?", ["", "Help"]).tolist() == [-2.0, -2.5]
    assert rewards("left?", ["Help"]).tolist() == [-2.5]
    assert victim.calls == 8  # cached


def test_a_saved_generator_writes_the_same_prefix(tmp_path: Path) -> None:
    config = replace(CONFIG, method="generator")
    result = optimize_prompt(config, tmp_path, loaders=search_loaders())
    policy, other = (load_folder(result.folder, writer=tiny_writer()) for _ in range(2))
    assert policy("left?") == other("left?")
    assert policy("left?").startswith("left?")
    assert policy.key == json.loads((result.folder / "policy.json").read_text())["key"]
    (result.folder / "model.safetensors").unlink()
    with pytest.raises(CodefendError):
        load_folder(result.folder, writer=tiny_writer())


def test_a_soft_prefix_is_part_of_the_defended_victim() -> None:
    victim, soft = Suggestible(), SoftPolicy("s", torch.full((2, 4), 2.0), "suggestible")
    defended = DefendedVictim(victim, Defense(None, soft))
    images = random_image()[None].requires_grad_(True)
    losses = defended.loss(images, ["left?"], ["red"])
    assert torch.equal(losses, victim.loss(images, ["left?"], ["red"], prefix=soft.prefix))
    assert not torch.equal(losses, victim.loss(images, ["left?"], ["red"]))
    losses.sum().backward()
    assert images.grad is not None
    assert defended.generate(images, ["left?"]) == victim.generate(images, ["left?"], prefix=soft.prefix)
    with pytest.raises(CodefendError, match="was learned for victim 'suggestible', not 'box'"):
        DefendedVictim(black_box(), Defense(None, soft))
    with pytest.raises(CodefendError, match="has width 9, the victim has 4"):
        DefendedVictim(victim, Defense(None, SoftPolicy("s", torch.zeros(2, 9), "suggestible")))


def test_a_soft_prefix_has_the_capabilities_of_its_victim() -> None:
    class Worded(Suggestible):
        vocabulary = ("red", "blue")

        def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
            return torch.zeros(len(images), 1, len(words))

    soft = SoftPolicy("s", torch.full((2, 4), 2.0), "suggestible")
    victim, worded = soft.attach(Suggestible()), soft.attach(Worded())
    assert isinstance(victim, HasMargins)
    assert not isinstance(victim, HasWordScores)
    assert isinstance(worded, HasMargins)
    assert isinstance(worded, HasWordScores)
    assert worded.vocabulary == Worded.vocabulary


def test_load_returns_text_policies_and_load_any_also_soft_prefixes(tmp_path: Path) -> None:
    save_folder(SoftPolicy("s", torch.ones(2, 4), "toy"), tmp_path)
    assert load_any(tmp_path).key == SoftPolicy("other", torch.ones(2, 4), "toy").key
    with pytest.raises(CodefendError, match="'s' is a soft prefix"):
        load(tmp_path)


def test_loaders_use_the_registries_by_default() -> None:
    with pytest.raises(CodefendError, match="unknown victim 'nobody'"):
        SearchLoaders().victim("nobody")
    with pytest.raises(CodefendError, match="unknown task"):
        SearchLoaders().task("nothing", "test", 1)
