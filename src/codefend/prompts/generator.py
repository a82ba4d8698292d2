"""The prefix generator: a small language model with LoRA that reads the user's query and writes a prefix for it.

After CoDefend (Zhu et al. 2025, arXiv 2510.11096), which trains such a generator against the frozen victim. Here by
reward-weighted imitation (Peters and Schaal 2007; with the best of n only: RAFT, Dong et al. 2023, arXiv 2304.06767):
for each query, texts of a bank, the query's own sentences and samples of the generator earn the victim's
log-likelihood of the right answer to the attacked and purified picture; the generator learns to write the better ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from codefend.prompts.items import Item
from codefend.prompts.learning import draw, rate, restore_state, save_state, update
from codefend.prompts.operators import SENTENCES, need, split
from codefend.prompts.policy import fingerprint
from codefend.prompts.proposers import BadProposal, clean_proposal
from codefend.prompts.writer import CHAT, Writer
from codefend.runs import make_generator
from codefend.types import Victim, WhiteBox

REQUEST = "Question about a picture: {query}\nOne short piece of advice for answering it:"
MAX_QUERY, MAX_PREFIX = 400, 160  # characters
REMEMBERED = 4096  # queries whose prefix is kept
RESTATED = 3  # sentences of a query that compete to be said again
TRIES = 16  # queries looked at for one that teaches what is wanted

Place = Literal["before", "after"]


@dataclass(frozen=True)
class GeneratorConfig:
    """How a generator is trained.

    For each query ``samples`` prefixes of its own, ``bank`` sentences and the query's own sentences compete.
    """

    place: Place = "after"  # where the written words stand; after: they have the last word over what was injected
    rank: int = 8
    tokens: int = 24  # of a prefix, at most
    steps: int = 300
    samples: int = 0  # from a writer that is silent at first they teach little, and each costs an answer
    bank: int = 6
    pictures: int = 6  # that a query is judged on, at most: those of the examples that it is asked of
    temperature: float = 1.0
    sharpness: float = 0.25  # of the weights, in standard deviations of the rewards; smaller: nearer to best of n
    gap: float = 0.1  # nats; where no prefix gains more than this over none, the lesson is to write none
    length_cost: float = 0.0005  # nats per character
    lr: float = 1e-3
    warmup: int = 10
    clean_share: float = 0.25
    check_every: int = 100


@dataclass
class GeneratedPolicy:
    """Writes a prefix for each query; the same query gets the same prefix, kept for the next time it is asked."""

    name: str
    writer: Writer
    tokens: int
    key: str
    place: Place = "before"
    system: str = ""
    _kept: dict[str, str] = field(default_factory=dict, repr=False)

    empty = False
    slow = True  # a model writes: not on an event loop

    def prefix(self, query: str) -> str:
        """The prefix for a query; empty when what was written cannot be used."""
        if query not in self._kept:
            if len(self._kept) >= REMEMBERED:
                self._kept.pop(next(iter(self._kept)))
            self._kept[query] = usable(self.writer.sample([context(self.writer, query)], self.tokens)[0])
        return self._kept[query]

    def around(self, prompt: str) -> tuple[str, str]:
        """What stands before and after the user's words."""
        return around(self.prefix(prompt), self.place)

    def wrap(self, prompt: str) -> str:
        before, after = self.around(prompt)
        return f"{before}{prompt}{after}"

    def __call__(self, prompt: str) -> str:
        return self.wrap(prompt)


def around(words: str, place: Place) -> tuple[str, str]:
    """What stands before and after a query when ``words`` stand at ``place``; nothing for no words."""
    if not words:
        return "", ""
    return (f"{words}\n", "") if place == "before" else ("", f"\n{words}")


def context(writer: Writer, query: str) -> list[int]:
    """The generator's input: the query without a chat template's marks, and only its first characters."""
    plain = query.replace("<|", "< |")[:MAX_QUERY]
    return writer.encode(CHAT.format(text=REQUEST.format(query=plain)))


def usable(text: str) -> str:
    """The written prefix, or "" when it is not fit to stand before a query."""
    try:
        return clean_proposal(text, max_chars=MAX_PREFIX)
    except BadProposal:
        return ""


def policy_of(writer: Writer, config: GeneratorConfig, name: str) -> GeneratedPolicy:
    """The policy of the writer as it is now; training on makes another one, with another key."""
    return GeneratedPolicy(name, writer, config.tokens, writer_key(writer, config), config.place)


def writer_key(writer: Writer, config: GeneratorConfig) -> str:
    """A fingerprint of the adapters and what else decides the prefixes."""
    values = [p.detach().half().contiguous().numpy().tobytes() for _, p in sorted(writer.adapters().items())]
    return fingerprint(b"".join([REQUEST.encode(), config.place.encode(), str(config.tokens).encode(), *values]))


def rewards(victim: Victim, item: Item, texts: Sequence[str], place: Place) -> Tensor:
    """``[n]``: log-likelihood of the right answer beside each text; of a black box, the judge's score."""
    images = item.image[None].expand(len(texts), -1, -1, -1)
    prompts = [item.prompt.join(around(text, place)) for text in texts]
    if isinstance(victim, WhiteBox):
        with torch.no_grad():
            return -victim.loss(images, prompts, [item.answer] * len(texts))
    return torch.tensor([item.judge(answer) for answer in victim.generate(images, prompts)])


def sentences_for(item: Item, count: int, seed: int) -> list[str]:
    """What may be written beside a query before anything is learned: nothing, ``count`` sentences, its own ones.

    To say the question again after what was injected is the sandwich defense (Liu et al. 2024, arXiv 2310.12815).
    """
    # Most sentences help no query at all: those made for the item's kind come first, the others fill up.
    rng, first = random.Random(f"{seed} {item.prompt}"), need(item.family)
    rest = [sentence for kind, sentences in SENTENCES.items() if kind != first for sentence in sentences]
    drawn = [*rng.sample(SENTENCES[first], len(SENTENCES[first])), *rng.sample(rest, len(rest))][:count]
    own = [usable(sentence) for line in item.prompt.splitlines() for sentence in split(line)]
    return list(dict.fromkeys(["", *drawn, *own[: RESTATED - 1], *own[-1:]]))


class Judge:
    """What texts earn beside a query: the mean over the pictures that it is asked of, less their length's cost.

    Over pictures, as the generator sees none of them: where words help one and leave nine alone, they help the query.
    """

    def __init__(self, victim: Victim, items: Sequence[Item], config: GeneratorConfig) -> None:
        self.victim, self.config = victim, config
        self.asked: dict[str, list[Item]] = {}
        for item in items:
            self.asked.setdefault(item.prompt, []).append(item)
        self._known: dict[tuple[str, str], float] = {}  # item, text

    def __call__(self, query: str, texts: Sequence[str]) -> Tensor:
        """``[n]``, nats per token of the answer. What was judged before costs nothing."""
        pool = self.asked[query]
        items = random.Random(query).sample(pool, min(self.config.pictures, len(pool)))
        for item in items:
            new = [text for text in texts if (item.id, text) not in self._known]
            if new:
                earned = rewards(self.victim, item, new, self.config.place).tolist()
                self._known |= {(item.id, text): value for text, value in zip(new, earned, strict=True)}
        means = [sum(self._known[item.id, text] for item in items) / len(items) for text in texts]
        return torch.tensor(means) - self.config.length_cost * torch.tensor([float(len(text)) for text in texts])


def imitation_loss(writer: Writer, query: str, texts: Sequence[str], earned: Tensor, sharpness: float) -> Tensor:
    """Minus the log-likelihood of the texts, weighted by the softmax of their standardized rewards."""
    weights = ((earned - earned.mean()) / (sharpness * earned.std(correction=0).clamp(min=1e-6))).softmax(0)
    told = [i for i, weight in enumerate(weights.tolist()) if weight > 0.02]  # the rest costs time and teaches nothing
    found = writer.log_likelihood([context(writer, query)] * len(told), [texts[i] for i in told])
    return -(weights[told] * found).sum()


def train_generator(
    victim: Victim,
    writer: Writer,
    items: Sequence[Item],
    config: GeneratorConfig,
    checkpoint: Path,
    judged: Callable[[GeneratedPolicy], None],
    *,
    seed: int = 0,
    advance: Callable[[int, str], None] = lambda steps, note: None,
) -> None:
    """Train the adapters of ``writer`` (it must have none yet); ``judged`` hears of it every ``check_every`` steps.

    Resumes from ``checkpoint``. Raises UserError when the loss is not finite.
    """
    torch.manual_seed(seed)  # peft draws the adapters' first values
    parameters: Any = writer.add_lora(config.rank)
    optimizer = torch.optim.Adam(parameters.values())
    step = restore_state(checkpoint, parameters, optimizer)
    advance(step, "")
    judge = Judge(victim, items, config)
    while step < config.steps:
        query, texts = _drawn(judge, items, config, seed, step)
        texts = list(dict.fromkeys([*texts, *_own(writer, query, config, seed, step)]))
        earned = judge(query, texts)
        gap = float(earned.max() - earned[0])  # over no words, the first of them
        if gap < config.gap:
            texts, earned = texts[:1], earned[:1]
        loss = imitation_loss(writer, query, texts, earned, config.sharpness)
        update(optimizer, parameters, loss, config.lr * rate(step, config.steps, config.warmup), step)
        step += 1
        advance(1, f"gap {gap:.2f}")
        if step % config.check_every == 0 or step == config.steps:
            judged(policy_of(writer, config, f"generator-{step:04d}"))
            save_state(checkpoint, parameters, optimizer, step)


def _drawn(judge: Judge, items: Sequence[Item], config: GeneratorConfig, seed: int, step: int) -> tuple[str, list[str]]:
    """A query that teaches, and the sentences that compete for it: in turn one that words help and one that is best
    left alone. Most are the latter; evenly drawn they would teach to leave all alone."""
    for turn in range(TRIES):
        item = draw(items, 1, config.clean_share, seed, TRIES * step + turn)[0]
        texts = sentences_for(item, config.bank, seed)
        earned = judge(item.prompt, texts)
        if bool(earned.max() - earned[0] >= config.gap) == (step % 2 == 0):
            break
    return item.prompt, texts


def _own(writer: Writer, query: str, config: GeneratorConfig, seed: int, step: int) -> list[str]:
    """What the writer itself proposes now."""
    if not config.samples:
        return []
    noise, asked = make_generator(seed, "prefixes", step), [context(writer, query)] * config.samples
    return [*map(usable, writer.sample(asked, config.tokens, temperature=config.temperature, generator=noise))]
