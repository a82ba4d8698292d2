"""``codefend optimize-prompt``: examples, baselines, one of three optimizers, the Pareto front, the chosen policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from codefend import prompts
from codefend.bench.results import BARE
from codefend.core.progress import progress
from codefend.core.runs import Run, check_run, open_run, plain
from codefend.prompts.answers import AnswerCache
from codefend.prompts.gepa_search import search
from codefend.prompts.items import Item, Score, choose, pareto
from codefend.prompts.operators import EditOperators
from codefend.prompts.policy import Policy
from codefend.prompts.proposers import ChatEndpoint, FallbackProposer, ModelProposer, Proposer
from codefend.prompts.soft import open_weight
from codefend.purifiers.base import Purifier
from codefend.training.prompt_search.bank import ItemBuilder, SearchLoaders, load_crafter, load_purifiers
from codefend.training.prompt_search.card import card
from codefend.training.prompt_search.config import SearchConfig, check, seed_policy
from codefend.training.prompt_search.generator import generator_training
from codefend.training.prompt_search.policy_training import train_policy
from codefend.training.prompt_search.soft import soft_training
from codefend.types import Task, Victim

HAND_WRITTEN = "adashield-static"  # a baseline


@dataclass(frozen=True)
class SearchResult:
    """The chosen policy's folder, its score and that of no policy; ``helps``: whether it is more robust at its cost."""

    folder: Path
    name: str
    score: Score
    baseline: Score
    helps: bool


class SearchModels(NamedTuple):
    """Everything that a search loads by name, before its run folder exists."""

    victim: Victim
    crafter: Victim  # the white box that attacks are made on
    purifiers: dict[str, Purifier | None]
    search: list[Task]
    selection: list[Task]


class Candidates:
    """Policies that were evaluated on the selection set, in the run folder: a row and a folder each."""

    def __init__(self, run: Run, answers: AnswerCache, items: Sequence[Item]) -> None:
        self.run, self.answers, self.items = run, answers, items
        self.scored: dict[str, tuple[str, Score]] = {
            row["policy"]: (row["name"], Score(**row["score"])) for row in run.rows() if row.get("kind") == "candidate"
        }

    def folder(self, key: str) -> Path:
        return self.run.dir / "candidates" / key

    def add(self, policy: Any) -> None:
        """Evaluate and save a policy, unless it is there already."""
        if policy.key in self.scored:
            return
        on_answers, self.answers.on_answers = self.answers.on_answers, lambda count: None  # counted by the search
        score = self.answers.score(policy, self.items)
        self.answers.on_answers = on_answers
        prompts.save_folder(policy, self.folder(policy.key))
        row = {"key": f"candidate|{policy.key}", "kind": "candidate", "policy": policy.key, "name": policy.name}
        self.run.append({**row, "score": asdict(score)})
        self.scored[policy.key] = (policy.name, score)

    def reference(self, policy: Policy) -> Score:
        """Evaluate a policy for comparison."""
        score = self.answers.score(policy, self.items)
        row = {"key": f"reference|{policy.name}", "kind": "reference", "name": policy.name, "score": asdict(score)}
        self.run.append(row)
        return score

    def front(self) -> list[tuple[str, Score]]:
        return pareto(list(self.scored.values()))


def run_search(config: SearchConfig, folder: Path, loaders: SearchLoaders | None = None) -> SearchResult:
    """See ``codefend.training.prompt_search.optimize_prompt``."""
    check(config)
    recorded = {"optimize": "prompt", **plain(config)}
    check_run(folder, recorded)
    loaders = loaders or SearchLoaders()
    models = load_models(config, loaders)
    with open_run(folder, recorded) as run:
        search_items, selection = build_items(config, run, models)
        answers = AnswerCache(models.victim, run, batch=config.batch)
        candidates = Candidates(run, answers, selection)
        with progress("baselines", 2 * len(selection)) as advance:
            answers.on_answers = advance
            baseline = candidates.reference(prompts.PromptPolicy("none"))
            candidates.reference(prompts.load(HAND_WRITTEN))
        answers.on_answers = lambda count: None
        optimize(config, run, search_items, candidates, loaders)
        return choose_policy(config, run, candidates, baseline)


def load_models(config: SearchConfig, loaders: SearchLoaders) -> SearchModels:
    """Load everything, the cheap things first. Raises CodefendError for what the search cannot use."""
    bank = config.bank
    search_tasks = [loaders.task(name, "train", bank.search_scenes) for name in bank.tasks]
    selection = [loaders.task(name, "val", bank.selection_scenes) for name in bank.tasks]
    purifiers = load_purifiers([bank.purifier], loaders)
    victim = loaders.victim(config.victim)
    if config.method == "soft":
        open_weight(victim)
    attacks = {"bank.seen": bank.seen, "bank.held_out": bank.held_out}
    crafter = load_crafter(victim, config.surrogate, loaders, attacks)
    return SearchModels(victim, crafter, purifiers, search_tasks, selection)


def build_items(config: SearchConfig, run: Run, models: SearchModels) -> tuple[list[Item], list[Item]]:
    """The items of search (also unpurified ones, if the config says so) and of selection."""
    bank = config.bank
    items: list[list[Item]] = []
    bare: dict[str, Purifier | None] = {BARE: None} if bank.unpurified else {}
    parts: list[tuple[str, list[Task], Sequence[str], Sequence[str], dict[str, Purifier | None]]] = [
        ("search", models.search, bank.seen, bank.says, models.purifiers | bare),
        ("selection", models.selection, bank.held_out, (), models.purifiers),
    ]
    with progress("examples", len(parts) * len(bank.tasks)) as advance:
        for part, tasks, attacks, sentences, purifiers in parts:
            builder = ItemBuilder(models.crafter, purifiers, run.dir / "bank", bank.attack, sentences=sentences)
            items.append([])
            for task in tasks:
                items[-1] += builder.items(part, task, attacks)
                advance()
    return items[0], items[1]


def optimize(config: SearchConfig, run: Run, items: list[Item], candidates: Candidates, loaders: SearchLoaders) -> None:
    """Run the config's method on the search items; it adds policies to ``candidates``."""
    answers, seed = candidates.answers, config.seed
    match config.method:
        case "gepa":
            start, proposer = seed_policy(config), make_proposer(config, loaders)
            with progress("gepa", config.gepa.evaluations) as advance:
                answers.on_answers = lambda count: advance(count, _best(candidates))
                gepa, add = config.gepa, candidates.add
                search(answers, run, items, candidates.items, start, proposer, gepa, add, seed=seed)
        case "soft":
            soft = soft_training(answers.victim, items, config.soft, candidates.add, seed=seed)
            train_policy(soft, run.dir, "soft prefix", run.append)
        case "generator":
            writer, planted = loaders.writer(), config.bank.says
            generator = generator_training(
                answers.victim, writer, items, config.generator, candidates.add, planted=planted, seed=seed
            )
            train_policy(generator, run.dir, "generator", run.append)


def make_proposer(config: SearchConfig, loaders: SearchLoaders) -> Proposer:
    """Edit operators; or the local language model or an endpoint, with the operators as fallback."""
    operators = EditOperators(config.seed)
    if config.gepa.proposer == "operators":
        return operators
    if config.gepa.proposer == "local":
        return FallbackProposer(ModelProposer.local(loaders.writer(), config.seed), operators)
    return FallbackProposer(ModelProposer(ChatEndpoint(config.gepa.proposer, config.gepa.model), "endpoint"), operators)


def _best(candidates: Candidates) -> str:
    front = candidates.front()
    return f"{len(candidates.scored)} evaluated, best robust {front[0][1].robust:.2f}" if front else ""


def choose_policy(config: SearchConfig, run: Run, candidates: Candidates, baseline: Score) -> SearchResult:
    """Write the choice into ``policy/`` and ``result.json``; where no policy helps, the best in sum, marked so."""
    scored = [(key, score) for key, (_, score) in candidates.scored.items()]
    choice = choose(scored, baseline, clean_cost=config.clean_cost, more_refusals=config.more_refusals)
    key, score = choice or max(scored, key=lambda pair: pair[1].clean + pair[1].robust - pair[1].refusal)
    source, name = candidates.folder(key), candidates.scored[key][0]
    settings = json.loads((source / "policy.json").read_text(encoding="utf-8"))
    run.write("policy/README.md", card(config, settings, score, baseline, choice is not None, candidates.front()))
    # policy.json comes last, so that a folder with one is complete.
    for path in sorted(source.iterdir(), key=lambda path: path.name == "policy.json"):
        if not path.name.startswith("."):
            run.write(f"policy/{path.name}", path.read_bytes())
    result = SearchResult(run.dir / "policy", name, score, baseline, choice is not None)
    run.write("result.json", json.dumps(plain(result), indent=2) + "\n")
    return result
