"""The prefix generator: a small language model with LoRA that reads the user's query and writes a prefix for it.

After CoDefend (Zhu et al. 2025, arXiv 2510.11096), which trains such a generator against the frozen victim. Here by
reward-weighted imitation (Peters and Schaal 2007; with the best of n only: RAFT, Dong et al. 2023, arXiv 2304.06767):
for each query, texts of a bank, the query's own sentences and samples of the generator earn the victim's
log-likelihood of the right answer to the attacked and purified picture; the generator learns to write the better ones.
Beside that it learns from pairs (`paired.py`), and an early exit decides whether it writes at all.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core.devices import mixed_precision
from codefend.core.runs import make_generator
from codefend.prompts.items import Item
from codefend.prompts.learning import draw, rate, restore_state, save_state, update
from codefend.prompts.operators import SENTENCES, need, split
from codefend.prompts.paired import Pair, QueryPairs
from codefend.prompts.policy import fingerprint
from codefend.prompts.proposers import BadProposal, clean_proposal
from codefend.prompts.writer import CHAT, Writer
from codefend.types import CodefendError, Victim, WhiteBox

REQUEST = "What is asked of the picture here, as it should be said: {query}"
MAX_QUERY, MAX_PREFIX = 400, 160  # characters
REMEMBERED = 4096  # queries whose prefix is kept
RESTATED = 3  # sentences of a query that compete to be said again
ALIKE = 0.6  # of `difflib`: a word of seven letters with two typing errors still is
TELLING = 4  # letters of a word that must have been said; two typing errors leave nothing of a shorter one
TRIES = 16  # queries looked at for one that teaches what is wanted

Place = Literal["before", "after"]


@dataclass(frozen=True)
class GeneratorConfig:
    """How a generator is trained.

    For each query ``samples`` prefixes of its own, ``bank`` sentences and the query's own sentences compete.
    """

    place: Place = "after"  # where the written words stand; after: they have the last word over what was injected
    rank: int = 16
    gate: int = 4  # layers that decide whether to write at all, of a model that has more; 0: it writes to find out
    tokens: int = 24  # of a prefix, at most
    steps: int = 600
    pairs: int = 12  # in a step, besides one rewarded query; 0: rewards alone
    lessons: int = 400  # first steps, of pairs alone: one that cannot say a query again yet has little to choose from
    samples: int = 0  # from a writer that is silent at first they teach little, and each costs an answer
    bank: int = 6
    pictures: int = 6  # that a query is judged on, at most: those of the examples that it is asked of
    temperature: float = 1.0
    sharpness: float = 0.25  # of the weights, in standard deviations of the rewards; smaller: nearer to best of n
    gap: float = 0.1  # nats; where no prefix gains more than this over none, the lesson is to write none
    length_cost: float = 0.0005  # nats per character
    lr: float = 1e-3
    warmup: int = 20
    clean_share: float = 0.25
    check_every: int = 200

    def __post_init__(self) -> None:
        if self.lessons and not self.pairs:
            raise CodefendError("generator.lessons are steps of pairs alone: set generator.pairs, or lessons=0")


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
            asked = context(self.writer, query)
            words = usable(self.writer.sample([asked], self.tokens)[0]) if self.writer.speaks(asked) else ""
            self._kept[query] = words if faithful(query, words) else ""
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


def faithful(query: str, words: str) -> bool:
    """Whether words may stand beside a query: a sentence of the bank, or what the query itself says, spelled right.

    A small writer sometimes says a word that it knows better than the one that was asked about.
    """
    if any(words in sentences for sentences in SENTENCES.values()):
        return True
    said, written = (re.findall(r"\w+", text.lower()) for text in (query, words))
    return all(difflib.get_close_matches(word, said, 1, ALIKE) for word in written if len(word) >= TELLING)


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
    """What may be written beside a query before anything is learned: nothing, the query as it was, ``count`` sentences,
    its own ones.

    To say the question again after what was injected is the sandwich defense (Liu et al. 2024, arXiv 2310.12815).
    """
    # Most sentences help no query at all: those made for the item's kind come first, the others fill up.
    rng, first = random.Random(f"{seed} {item.prompt}"), need(item.family)
    rest = [sentence for kind, sentences in SENTENCES.items() if kind != first for sentence in sentences]
    drawn = [*rng.sample(SENTENCES[first], len(SENTENCES[first])), *rng.sample(rest, len(rest))][:count]
    own = [usable(sentence) for line in item.prompt.splitlines() for sentence in split(line)]
    plain = [usable(item.plain)] if item.plain else []
    return list(dict.fromkeys(["", *plain, *drawn, *own[: RESTATED - 1], *own[-1:]]))


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
    """Minus the log-likelihood of the texts, weighted by the softmax of their standardized rewards, and the gate's."""
    weights = ((earned - earned.mean()) / (sharpness * earned.std(correction=0).clamp(min=1e-6))).softmax(0)
    told = [i for i, weight in enumerate(weights.tolist()) if weight > 0.02]  # the rest costs time and teaches nothing
    found, logits = writer.read([context(writer, query)] * len(told), [texts[i] for i in told])
    speak = weights[[i for i, text in enumerate(texts) if text]].sum()
    return -(weights[told] * found).sum() + F.binary_cross_entropy_with_logits(logits[0], speak.to(logits))


def pairs_loss(writer: Writer, pairs: Sequence[Pair]) -> Tensor:
    """Minus the mean log-likelihood of what should be written for each query, and the gate's."""
    found, logits = writer.read([context(writer, pair.query) for pair in pairs], [pair.wanted for pair in pairs])
    speak = torch.tensor([float(bool(pair.wanted)) for pair in pairs])
    return F.binary_cross_entropy_with_logits(logits, speak.to(logits)) - found.mean()


def train_generator(
    victim: Victim,
    writer: Writer,
    items: Sequence[Item],
    config: GeneratorConfig,
    checkpoint: Path,
    judged: Callable[[GeneratedPolicy], None],
    *,
    says: Sequence[str] = (),
    seed: int = 0,
    advance: Callable[[int, str], None] = lambda steps, note: None,
) -> None:
    """Train the adapters of ``writer`` (it must have none yet); ``judged`` hears of it every ``check_every`` steps.

    ``says``: what is planted in the queries of pairs. Resumes from ``checkpoint``. Raises CodefendError when the loss is
    not finite.
    """
    torch.manual_seed(seed)  # peft draws the adapters' first values
    prepare(writer, config)
    parameters: Any = writer.adapters()
    optimizer = torch.optim.Adam(parameters.values())
    step = restore_state(checkpoint, parameters, optimizer)
    advance(step, "")
    judge, source = Judge(victim, items, config), QueryPairs(items, says, seed)
    while step < config.steps:
        pairs = source.draw(config.pairs, step)
        with mixed_precision(torch.device("cpu")):  # where a writer stands
            loss = pairs_loss(writer, pairs) if pairs else torch.zeros(())
            note = f"pairs {loss.detach():.2f}" if pairs else ""
            if step >= config.lessons:
                rewarded, gap = _rewarded(judge, writer, items, config, seed, step)
                loss, note = loss + rewarded, f"{note} gap {gap:.2f}".strip()
        update(optimizer, parameters, loss, config.lr * rate(step, config.steps, config.warmup), step)
        step += 1
        advance(1, note)
        if step % config.check_every == 0 or step == config.steps:
            judged(policy_of(writer, config, f"generator-{step:04d}"))
            save_state(checkpoint, parameters, optimizer, step)


def prepare(writer: Writer, config: GeneratorConfig) -> None:
    """Give a writer what a generator learns: a gate, where the model is deep enough for it, and adapters."""
    if 0 < config.gate < writer.depth:
        writer.add_gate(config.gate)
    writer.add_lora(config.rank)


def _rewarded(
    judge: Judge, writer: Writer, items: Sequence[Item], config: GeneratorConfig, seed: int, step: int
) -> tuple[Tensor, float]:
    """The loss on one query that the victim judges, and by how much the best words for it beat none."""
    query, texts = _drawn(judge, items, config, seed, step)
    texts = list(dict.fromkeys([*texts, *_own(writer, query, config, seed, step)]))
    earned = judge(query, texts)
    gap = float(earned.max() - earned[0])  # over no words, the first of them
    if gap < config.gap:
        texts, earned = texts[:1], earned[:1]
    return imitation_loss(writer, query, texts, earned, config.sharpness), gap


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
