"""The prefix generator: a small language model with LoRA that reads the user's query and writes a prefix for it.

After CoDefend (Zhu et al. 2025, arXiv 2510.11096), which trains such a generator against the frozen victim. Here by
reward-weighted imitation (Peters and Schaal 2007; with the best of n only: RAFT, Dong et al. 2023, arXiv 2304.06767):
for each query, prefixes are sampled from the generator and from a bank of sentences; each earns the victim's
log-likelihood of the right answer to the attacked and purified picture; the generator learns to write the better ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codefend.prompts.items import Item
from codefend.prompts.learning import draw, rate, restore_state, save_state, update
from codefend.prompts.operators import SENTENCES, need
from codefend.prompts.policy import fingerprint
from codefend.prompts.proposers import BadProposal, clean_proposal
from codefend.prompts.writer import CHAT, Writer
from codefend.runs import make_generator
from codefend.types import Victim, WhiteBox

REQUEST = "Question about a picture: {query}\nOne short piece of advice for answering it:"
MAX_QUERY, MAX_PREFIX = 400, 160  # characters
REMEMBERED = 4096  # queries whose prefix is kept


@dataclass(frozen=True)
class GeneratorConfig:
    """How a generator is trained; ``samples`` prefixes of its own and ``bank`` sentences compete for each query."""

    rank: int = 8
    tokens: int = 14  # of a prefix, at most
    steps: int = 160
    samples: int = 4
    bank: int = 4
    temperature: float = 1.0
    sharpness: float = 0.5  # of the weights, in standard deviations of the rewards; smaller: nearer to best of n
    gap: float = 0.1  # nats; where no prefix gains more than this over none, the lesson is to write none; at 1 or
    # more nats at stake each query teaches, at less that share of them, and this share at least
    length_cost: float = 0.0005  # nats per character
    lr: float = 3e-4
    warmup: int = 10
    clean_share: float = 0.3
    check_every: int = 40


@dataclass
class GeneratedPolicy:
    """Writes a prefix for each query; the same query gets the same prefix, kept for the next time it is asked."""

    name: str
    writer: Writer
    tokens: int
    key: str
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
        prefix = self.prefix(prompt)
        return (f"{prefix}\n" if prefix else ""), ""

    def wrap(self, prompt: str) -> str:
        before, after = self.around(prompt)
        return f"{before}{prompt}{after}"

    def __call__(self, prompt: str) -> str:
        return self.wrap(prompt)


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
    return GeneratedPolicy(name, writer, config.tokens, writer_key(writer, config.tokens))


def writer_key(writer: Writer, tokens: int) -> str:
    """A fingerprint of the adapters and what else decides the prefixes."""
    values = [p.detach().half().contiguous().numpy().tobytes() for _, p in sorted(writer.adapters().items())]
    return fingerprint(b"".join([REQUEST.encode(), str(tokens).encode(), *values]))


def rewards(victim: Victim, item: Item, prefixes: Sequence[str]) -> Tensor:
    """``[n]``: log-likelihood of the right answer behind each prefix; of a black box, the judge's score."""
    images = item.image[None].expand(len(prefixes), -1, -1, -1)
    prompts = [f"{prefix}\n{item.prompt}" if prefix else item.prompt for prefix in prefixes]
    if isinstance(victim, WhiteBox):
        with torch.no_grad():
            return -victim.loss(images, prompts, [item.answer] * len(prefixes))
    return torch.tensor([item.judge(answer) for answer in victim.generate(images, prompts)])


def candidates(writer: Writer, item: Item, config: GeneratorConfig, seed: int, step: int) -> list[str]:
    """Different prefixes for a query: none at all, some of the bank, and the generator's own."""
    noise = make_generator(seed, "prefixes", step)
    asked = [context(writer, item.prompt)] * config.samples
    own = writer.sample(asked, config.tokens, temperature=config.temperature, generator=noise) if asked else []
    # Most sentences help no query at all: those made for the item's kind come first, the others fill up.
    rng, first = random.Random(f"{seed} {step}"), need(item.family)
    rest = [sentence for kind, sentences in SENTENCES.items() if kind != first for sentence in sentences]
    drawn = [*rng.sample(SENTENCES[first], len(SENTENCES[first])), *rng.sample(rest, len(rest))][: config.bank]
    return list(dict.fromkeys(["", *drawn, *map(usable, own)]))


def imitation_loss(writer: Writer, item: Item, prefixes: Sequence[str], earned: Tensor, sharpness: float) -> Tensor:
    """Minus the log-likelihood of the prefixes, weighted by the softmax of their standardized rewards."""
    weights = ((earned - earned.mean()) / (sharpness * earned.std(correction=0).clamp(min=1e-6))).softmax(0)
    told = [i for i, weight in enumerate(weights.tolist()) if weight > 0.02]  # the rest costs time and teaches nothing
    found = writer.log_likelihood([context(writer, item.prompt)] * len(told), [prefixes[i] for i in told])
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
    while step < config.steps:
        item = draw(items, 1, config.clean_share, seed, step)[0]
        prefixes = candidates(writer, item, config, seed, step)
        earned = rewards(victim, item, prefixes)
        earned = earned - config.length_cost * torch.tensor([float(len(prefix)) for prefix in prefixes])
        gap = float(earned.max() - earned[0])  # over no words, the first of them
        if gap < config.gap:
            stake, prefixes, earned = float(earned[0] - earned.min()), prefixes[:1], earned[:1]
        else:
            stake = gap
        # A query teaches as often as the choice of words matters to it: a loss weighted so would lose its weight where
        # gradients are cut. Else the many that any words leave alone would teach to leave all alone.
        if random.Random(f"{seed} stake {step}").random() < max(stake, config.gap):
            loss = imitation_loss(writer, item, prefixes, earned, config.sharpness)
            update(optimizer, parameters, loss, config.lr * rate(step, config.steps, config.warmup), step)
        step += 1
        advance(1, f"gap {gap:.2f}")
        if step % config.check_every == 0 or step == config.steps:
            judged(policy_of(writer, config, f"generator-{step:04d}"))
            save_state(checkpoint, parameters, optimizer, step)
