"""Training of the prefix generator by reward-weighted imitation and on query pairs.

Imitation (Peters and Schaal 2007; with the best of n only: RAFT, Dong et al. 2023, arXiv 2304.06767): for each query,
sentences of a bank, the query's own sentences and samples of the generator compete. Their reward is the victim's
log-likelihood of the correct answer; the generator learns to write the better ones. Query pairs (`query_pairs`) teach
it to repeat a damaged query in its original form, and to leave a plain one unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core.seeds import make_generator
from codefend.prompts.generator import REQUEST, GeneratedPolicy, Place, around, query_context, usable
from codefend.prompts.items import Item
from codefend.prompts.operators import SENTENCES, need_of, split_sentences
from codefend.prompts.policy import fingerprint
from codefend.prompts.writer import Writer
from codefend.training.fit import Losses, Training
from codefend.training.prompt_search.policy_training import draw_items, policy_schedule
from codefend.training.prompt_search.query_pairs import QueryPair, QueryPairs
from codefend.types import CodefendError, Victim, WhiteBox

MAX_RESTATED = 3  # sentences of a query that compete to be repeated
MAX_DRAWS = 16  # queries per step, until one has the gap that the step calls for
MIN_WEIGHT = 0.02  # of a text in the imitation loss; smaller ones are left out


@dataclass(frozen=True)
class GeneratorConfig:
    """How a generator is trained.

    For each query ``samples`` texts of its own, ``bank`` sentences and the query's own sentences compete.
    """

    place: Place = "after"  # where the text stands; after: it follows planted instructions
    rank: int = 16
    gate: int = 4  # layers before the gate that decides whether to write, of a model that has more; 0: no gate
    tokens: int = 24  # of a text, at most
    steps: int = 600
    pairs: int = 12  # in a step, besides one rewarded query; 0: rewards alone
    lessons: int = 400  # first steps, of pairs alone: until it can repeat a query, rewards have little to choose from
    samples: int = 0  # each costs an answer, and those of a generator that is silent at first teach little
    bank: int = 6
    pictures: int = 6  # images per query, at most, over which a reward is averaged
    temperature: float = 1.0
    sharpness: float = 0.25  # of the weights, in standard deviations of the rewards; smaller: nearer to best of n
    gap: float = 0.1  # nats; where no text gains more than this over none, the target is to write none
    length_cost: float = 0.0005  # nats per character
    lr: float = 1e-3
    warmup: int = 20
    clean_share: float = 0.25
    check_every: int = 200

    def __post_init__(self) -> None:
        if self.lessons and not self.pairs:
            raise CodefendError("generator.lessons are steps of pairs alone: set generator.pairs, or lessons=0")


def generator_training(
    victim: Victim,
    writer: Writer,
    items: Sequence[Item],
    config: GeneratorConfig,
    on_candidate: Callable[[GeneratedPolicy], None],
    *,
    planted: Sequence[str] = (),
    seed: int = 0,
) -> Training[list[QueryPair]]:
    """The training of a gate and adapters, which are added to ``writer``.

    ``on_candidate`` receives the policy every ``check_every`` steps and at the end. ``planted``: sentences for the
    planted instructions of query pairs.
    """
    torch.manual_seed(seed)  # peft draws the adapters' initial values
    add_adapters(writer, config)
    optimizer = torch.optim.Adam(writer.adapters().values(), lr=config.lr)
    competition = Competition(RewardModel(victim, items, config), writer, items, config, seed)

    def loss(pairs: list[QueryPair], step: int) -> Losses:
        terms: dict[str, Tensor | float] = {"pairs": pairs_loss(writer, pairs) if pairs else torch.zeros(())}
        imitation, gap = competition.loss(step) if step >= config.lessons else (torch.zeros(()), 0.0)
        return terms | {"imitation": imitation, "gap": gap}

    return Training(
        parameters=writer.adapters(),
        batch=partial(QueryPairs(items, planted, seed).draw, config.pairs),
        loss=loss,
        optimizer=optimizer,
        schedule=policy_schedule(optimizer, config.steps, config.warmup),
        steps=config.steps,
        save=lambda step: on_candidate(policy_of(writer, config, f"generator-{step:04d}")),
        save_every=config.check_every,
    )


def add_adapters(writer: Writer, config: GeneratorConfig) -> None:
    """Add a gate, where the model is deep enough for it, and adapters."""
    if 0 < config.gate < writer.depth:
        writer.add_gate(config.gate)
    writer.add_lora(config.rank)


def policy_of(writer: Writer, config: GeneratorConfig, name: str) -> GeneratedPolicy:
    """The policy of the writer's current weights; its key changes with every step of the training."""
    values = [p.detach().half().contiguous().numpy().tobytes() for _, p in sorted(writer.adapters().items())]
    key = fingerprint(b"".join([REQUEST.encode(), config.place.encode(), str(config.tokens).encode(), *values]))
    return GeneratedPolicy(name, writer, config.tokens, key, config.place)


# --- losses ----------------------------------------------------------------------------------------------------------


def imitation_loss(writer: Writer, query: str, texts: Sequence[str], rewards: Tensor, sharpness: float) -> Tensor:
    """Minus the log-likelihood of the texts, weighted by the softmax of their standardized rewards, and the gate's."""
    weights = ((rewards - rewards.mean()) / (sharpness * rewards.std(correction=0).clamp(min=1e-6))).softmax(0)
    best = [i for i, weight in enumerate(weights.tolist()) if weight > MIN_WEIGHT]
    likelihoods, logits = writer.log_likelihoods([query_context(writer, query)] * len(best), [texts[i] for i in best])
    opens = weights[[i for i, text in enumerate(texts) if text]].sum()
    return -(weights[best] * likelihoods).sum() + F.binary_cross_entropy_with_logits(logits[0], opens.to(logits))


def pairs_loss(writer: Writer, pairs: Sequence[QueryPair]) -> Tensor:
    """Minus the mean log-likelihood of the target of each query, and the gate's."""
    contexts = [query_context(writer, pair.query) for pair in pairs]
    likelihoods, logits = writer.log_likelihoods(contexts, [pair.target for pair in pairs])
    opens = torch.tensor([float(bool(pair.target)) for pair in pairs])
    return F.binary_cross_entropy_with_logits(logits, opens.to(logits)) - likelihoods.mean()


# --- rewards ---------------------------------------------------------------------------------------------------------


class RewardModel:
    """Rewards of texts around a query: the mean over the images that the query belongs to, minus the cost of length.

    The generator doesn't see the image, so a text that helps on one image and leaves nine alone helps the query.
    """

    def __init__(self, victim: Victim, items: Sequence[Item], config: GeneratorConfig) -> None:
        self.victim, self.config = victim, config
        self.items: dict[str, list[Item]] = {}
        for item in items:
            self.items.setdefault(item.prompt, []).append(item)
        self._cache: dict[tuple[str, str], float] = {}  # by item and text

    def __call__(self, query: str, texts: Sequence[str]) -> Tensor:
        """``[n]``, nats per token of the answer. The victim is called for new texts only."""
        pool = self.items[query]
        items = random.Random(query).sample(pool, min(self.config.pictures, len(pool)))
        for item in items:
            new = [text for text in texts if (item.id, text) not in self._cache]
            if new:
                rewards = answer_rewards(self.victim, item, new, self.config.place).tolist()
                self._cache |= {(item.id, text): reward for text, reward in zip(new, rewards, strict=True)}
        means = [sum(self._cache[item.id, text] for item in items) / len(items) for text in texts]
        return torch.tensor(means) - self.config.length_cost * torch.tensor([float(len(text)) for text in texts])


def answer_rewards(victim: Victim, item: Item, texts: Sequence[str], place: Place) -> Tensor:
    """``[n]``: log-likelihood of the correct answer with each text; of a black box, the score of its answer."""
    images = item.image[None].expand(len(texts), -1, -1, -1)
    prompts = [item.prompt.join(around(text, place)) for text in texts]
    if isinstance(victim, WhiteBox):
        with torch.no_grad():
            return -victim.loss(images, prompts, [item.answer] * len(texts))
    return torch.tensor([item.judge(answer) for answer in victim.generate(images, prompts)])


# --- texts that compete ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Competition:
    """The query of a step, the texts that compete for it, and the imitation loss on them."""

    rewards: RewardModel
    writer: Writer
    items: Sequence[Item]
    config: GeneratorConfig
    seed: int

    def loss(self, step: int) -> tuple[Tensor, float]:
        """The imitation loss, and the gap: by how much the best text beats none."""
        query, texts = self._draw(step)
        texts = list(dict.fromkeys([*texts, *self._samples(query, step)]))
        rewards = self.rewards(query, texts)
        gap = float(rewards.max() - rewards[0])  # the first text is none
        if gap < self.config.gap:
            texts, rewards = texts[:1], rewards[:1]
        return imitation_loss(self.writer, query, texts, rewards, self.config.sharpness), gap

    def _draw(self, step: int) -> tuple[str, list[str]]:
        """A query and texts: at even steps one that a text helps, at odd steps one that is best left alone.

        Most are the latter; drawn uniformly they would teach to leave all alone.
        """
        for draw in range(MAX_DRAWS):
            item = draw_items(self.items, 1, self.config.clean_share, self.seed, MAX_DRAWS * step + draw)[0]
            texts = candidate_texts(item, self.config.bank, self.seed)
            rewards = self.rewards(item.prompt, texts)
            if bool(rewards.max() - rewards[0] >= self.config.gap) == (step % 2 == 0):
                break
        return item.prompt, texts

    def _samples(self, query: str, step: int) -> list[str]:
        """Samples of the generator itself."""
        if not self.config.samples:
            return []
        noise = make_generator(self.seed, "prefixes", step)
        contexts = [query_context(self.writer, query)] * self.config.samples
        temperature = self.config.temperature
        samples = self.writer.sample(contexts, self.config.tokens, temperature=temperature, generator=noise)
        return [usable(text) for text in samples]


def candidate_texts(item: Item, count: int, seed: int) -> list[str]:
    """Texts for the query of ``item``: none, the plain query, ``count`` sentences of the bank, its own sentences.

    To repeat the question after planted text is the sandwich defense (Liu et al. 2024, arXiv 2310.12815).
    """
    # Most sentences help no query at all, so those for the item's family come first.
    rng, first = random.Random(f"{seed} {item.prompt}"), need_of(item.family)
    rest = [sentence for need, sentences in SENTENCES.items() if need != first for sentence in sentences]
    bank = [*rng.sample(SENTENCES[first], len(SENTENCES[first])), *rng.sample(rest, len(rest))][:count]
    own = [usable(sentence) for line in item.prompt.splitlines() for sentence in split_sentences(line)]
    plain = [usable(item.plain)] if item.plain else []
    return list(dict.fromkeys(["", *plain, *bank, *own[: MAX_RESTATED - 1], *own[-1:]]))
