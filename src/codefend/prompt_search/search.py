"""``codefend optimize-prompt``: examples, baseline, one of three optimizers, the Pareto front, the chosen policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codefend import prompts
from codefend.prompt_search.bank import BARE, Kitchen, Sources, white_box
from codefend.prompt_search.card import card
from codefend.prompt_search.config import SearchConfig, check, seed_policy
from codefend.prompts.asking import Asker, Policy
from codefend.prompts.generator import train_generator
from codefend.prompts.gepa_search import search
from codefend.prompts.items import Item, Score, choose, pareto
from codefend.prompts.operators import EditOperators
from codefend.prompts.proposers import Endpoint, ModelProposer, Proposer, Resilient
from codefend.prompts.soft import open_weight, train_soft
from codefend.runs import Run, check_run, make_generator, open_run, plain, progress
from codefend.types import Victim

HAND_WRITTEN = "adashield-static"


@dataclass(frozen=True)
class Outcome:
    """The chosen policy's folder, its score and that of no policy; ``helps``: whether it is admissible and better."""

    folder: Path
    name: str
    score: Score
    baseline: Score
    helps: bool


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
    """See ``codefend.prompt_search.optimize_prompt``."""
    check(config)
    described = {"optimize": "prompt", **plain(config)}
    check_run(folder, described)
    sources = sources or Sources()
    victim = sources.victim(config.victim)
    if config.method == "soft":
        open_weight(victim)  # fails now, not after the attacks
    with open_run(folder, described) as run:
        search_items, selection = make_items(config, run, victim, sources)
        asker = Asker(victim, run, batch=config.batch)
        found = Candidates(run, asker, selection)
        with progress("baselines", 2 * len(selection)) as advance:
            asker.watch = advance
            baseline = found.reference(prompts.PromptPolicy("none"))
            found.reference(prompts.load(HAND_WRITTEN))
        asker.watch = lambda count: None
        METHODS[config.method](config, run, search_items, found, sources)
        return conclude(config, run, found, baseline)


def make_items(config: SearchConfig, run: Run, victim: Victim, sources: Sources) -> tuple[list[Item], list[Item]]:
    """The items of search (as asked, with unpurified ones) and of selection, attacked now or in an earlier sitting."""
    bank = config.bank
    purifier = None if bank.purifier == BARE else sources.purifier(bank.purifier)
    attacked = white_box(victim, config.surrogate, sources)
    behind = {bank.purifier: purifier}
    kitchens = {"search": behind | ({BARE: None} if bank.unpurified else {}), "selection": behind}
    plans: dict[str, tuple[str, int, Sequence[str], Sequence[str]]] = {
        "search": ("train", bank.search_scenes, bank.seen, bank.says),
        "selection": ("val", bank.selection_scenes, bank.held_out, ()),
    }
    made: dict[str, list[Item]] = {}
    with progress("examples", len(plans) * len(bank.tasks)) as advance:
        for part, (split, limit, families, says) in plans.items():
            kitchen = Kitchen(attacked, kitchens[part], run.dir / "bank", bank.attack, says=says)
            made[part] = []
            for name in bank.tasks:
                made[part] += kitchen.items(part, sources.task(name, split, limit), families)
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
        writer, noise = sources.writer(), make_generator(config.seed, "proposals")
        return Resilient(ModelProposer(lambda text: writer.complete(text, generator=noise), "local"), spare)
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
    for path in sorted(source.iterdir(), reverse=True):  # policy.json last: a folder that has one is whole
        if not path.name.startswith("."):
            run.write(f"policy/{path.name}", path.read_bytes())
    outcome = Outcome(run.dir / "policy", name, score, baseline, chosen is not None)
    run.write("result.json", json.dumps(plain(outcome), indent=2) + "\n")
    return outcome
