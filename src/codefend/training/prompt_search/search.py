"""``codefend optimize-prompt``: examples, baseline, one of three optimizers, the Pareto front, the chosen policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from codefend import prompts
from codefend.core.runs import Run, check_run, open_run, plain, progress
from codefend.prompts.asking import Asker, Policy
from codefend.prompts.generator import train_generator
from codefend.prompts.gepa_search import search
from codefend.prompts.items import Item, Score, choose, pareto
from codefend.prompts.operators import EditOperators
from codefend.prompts.proposers import Endpoint, ModelProposer, Proposer, Resilient, WriterProposer
from codefend.prompts.soft import open_weight, train_soft
from codefend.purifiers.base import Purifier
from codefend.training.prompt_search.bank import BARE, Kitchen, Sources, white_box
from codefend.training.prompt_search.card import card
from codefend.training.prompt_search.config import SearchConfig, check, seed_policy
from codefend.types import Task, Victim

HAND_WRITTEN = "adashield-static"


@dataclass(frozen=True)
class Outcome:
    """The chosen policy's folder, its score and that of no policy; ``helps``: whether it is admissible and better."""

    folder: Path
    name: str
    score: Score
    baseline: Score
    helps: bool


class Stock(NamedTuple):
    """What a search needs by name, loaded before its run folder exists."""

    victim: Victim
    attacked: Victim  # whose gradients make the attacked pictures
    purifier: Purifier | None
    search: list[Task]
    selection: list[Task]


class Candidates:
    """The policies judged so far on the selection set, in the run folder: rows, and a folder for each."""

    def __init__(self, run: Run, asker: Asker, items: Sequence[Item]) -> None:
        self.run, self.asker, self.items = run, asker, items
        self.scored: dict[str, tuple[str, Score]] = {
            row["policy"]: (row["name"], Score(**row["score"])) for row in run.rows() if row.get("kind") == "candidate"
        }

    def folder(self, key: str) -> Path:
        return self.run.dir / "candidates" / key

    def judge(self, policy: Any) -> None:
        """Score a candidate and keep it. Called again with the same policy, does nothing."""
        if policy.key in self.scored:
            return
        watch, self.asker.watch = self.asker.watch, lambda count: None  # a search has counted these answers
        score = self.asker.score(policy, self.items)
        self.asker.watch = watch
        prompts.save_folder(policy, self.folder(policy.key))
        row = {"key": f"candidate|{policy.key}", "kind": "candidate", "policy": policy.key, "name": policy.name}
        self.run.append({**row, "score": asdict(score)})
        self.scored[policy.key] = (policy.name, score)

    def reference(self, policy: Policy) -> Score:
        """Score a policy that is only compared with."""
        score = self.asker.score(policy, self.items)
        row = {"key": f"reference|{policy.name}", "kind": "reference", "name": policy.name, "score": asdict(score)}
        self.run.append(row)
        return score

    def front(self) -> list[tuple[str, Score]]:
        return pareto([(name, score) for name, score in self.scored.values()])


def run_search(config: SearchConfig, folder: Path, sources: Sources | None = None) -> Outcome:
    """See ``codefend.training.prompt_search.optimize_prompt``."""
    check(config)
    described = {"optimize": "prompt", **plain(config)}
    check_run(folder, described)
    sources = sources or Sources()
    stock = load_stock(config, sources)
    with open_run(folder, described) as run:  # a misspelt name has left nothing behind
        search_items, selection = make_items(config, run, stock)
        asker = Asker(stock.victim, run, batch=config.batch)
        found = Candidates(run, asker, selection)
        with progress("baselines", 2 * len(selection)) as advance:
            asker.watch = advance
            baseline = found.reference(prompts.PromptPolicy("none"))
            found.reference(prompts.load(HAND_WRITTEN))
        asker.watch = lambda count: None
        METHODS[config.method](config, run, search_items, found, sources)
        return conclude(config, run, found, baseline)


def load_stock(config: SearchConfig, sources: Sources) -> Stock:
    """Everything that has a name, the cheap things first. Raises CodefendError for what no search can have."""
    bank = config.bank
    search_tasks = [sources.task(name, "train", bank.search_scenes) for name in bank.tasks]
    selection = [sources.task(name, "val", bank.selection_scenes) for name in bank.tasks]
    purifier = None if bank.purifier == BARE else sources.purifier(bank.purifier)
    victim = sources.victim(config.victim)
    if config.method == "soft":
        open_weight(victim)  # fails now, not after the attacks
    return Stock(victim, white_box(victim, config.surrogate, sources), purifier, search_tasks, selection)


def make_items(config: SearchConfig, run: Run, stock: Stock) -> tuple[list[Item], list[Item]]:
    """The items of search (as asked, with unpurified ones) and of selection, attacked now or in an earlier sitting."""
    bank = config.bank
    behind = {bank.purifier: stock.purifier}
    kitchens = {"search": behind | ({BARE: None} if bank.unpurified else {}), "selection": behind}
    plans: dict[str, tuple[list[Task], Sequence[str], Sequence[str]]] = {
        "search": (stock.search, bank.seen, bank.says),
        "selection": (stock.selection, bank.held_out, ()),
    }
    made: dict[str, list[Item]] = {}
    with progress("examples", len(plans) * len(bank.tasks)) as advance:
        for part, (tasks, families, says) in plans.items():
            kitchen = Kitchen(stock.attacked, kitchens[part], run.dir / "bank", bank.attack, says=says)
            made[part] = []
            for task in tasks:
                made[part] += kitchen.items(part, task, families)
                advance()
    return made["search"], made["selection"]


def _gepa(config: SearchConfig, run: Run, items: list[Item], found: Candidates, sources: Sources) -> None:
    with progress("gepa", config.gepa.evaluations) as advance:
        found.asker.watch = lambda count: advance(count, _note(found))
        search(
            found.asker,
            run,
            items,
            found.items,
            seed_policy(config),
            proposer(config, sources),
            config.gepa,
            found.judge,
            seed=config.seed,
        )


def proposer(config: SearchConfig, sources: Sources) -> Proposer:
    """Who proposes: edit operators, or the shipped small model or an endpoint with the operators to spare."""
    spare = EditOperators(config.seed)
    if config.gepa.proposer == "operators":
        return spare
    if config.gepa.proposer == "local":
        return Resilient(WriterProposer(sources.writer(), config.seed), spare)
    return Resilient(ModelProposer(Endpoint(config.gepa.proposer, config.gepa.model), "endpoint"), spare)


def _soft(config: SearchConfig, run: Run, items: list[Item], found: Candidates, sources: Sources) -> None:
    with progress("soft prefix", config.soft.steps) as advance:
        path = run.dir / "checkpoint.safetensors"
        train_soft(found.asker.victim, items, config.soft, path, found.judge, seed=config.seed, advance=advance)


def _generator(config: SearchConfig, run: Run, items: list[Item], found: Candidates, sources: Sources) -> None:
    writer, path = sources.writer(), run.dir / "checkpoint.safetensors"
    with progress("generator", config.generator.steps) as advance:
        train_generator(
            found.asker.victim,
            writer,
            items,
            config.generator,
            path,
            found.judge,
            says=config.bank.says,
            seed=config.seed,
            advance=advance,
        )


METHODS: dict[str, Callable[[SearchConfig, Run, list[Item], Candidates, Sources], None]] = {
    "gepa": _gepa,
    "soft": _soft,
    "generator": _generator,
}


def _note(found: Candidates) -> str:
    front = found.front()
    return f"{len(found.scored)} judged, best robust {front[0][1].robust:.2f}" if front else ""


def conclude(config: SearchConfig, run: Run, found: Candidates, baseline: Score) -> Outcome:
    """Choose, and write ``policy/`` and ``result.json``. Where nothing helps, the best in sum is kept, marked so."""
    keyed = [(key, score) for key, (_, score) in found.scored.items()]
    chosen = choose(keyed, baseline, clean_cost=config.clean_cost, more_refusals=config.more_refusals)
    key, score = chosen or max(keyed, key=lambda pair: pair[1].clean + pair[1].robust - pair[1].refusal)
    source, name = found.folder(key), found.scored[key][0]
    settings = json.loads((source / "policy.json").read_text(encoding="utf-8"))
    run.write("policy/README.md", card(config, settings, score, baseline, chosen is not None, found.front()))
    for path in sorted(source.iterdir(), key=lambda path: path.name == "policy.json"):  # last: then the folder is whole
        if not path.name.startswith("."):
            run.write(f"policy/{path.name}", path.read_bytes())
    outcome = Outcome(run.dir / "policy", name, score, baseline, chosen is not None)
    run.write("result.json", json.dumps(plain(outcome), indent=2) + "\n")
    return outcome
