"""The verbs of the prompt side: optimize-prompt, and prompts list, show, apply and table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from codefend.types import CodefendError

app = typer.Typer()
prompts = typer.Typer(help="Prompt policies: look at them, apply one, compare them beside purifiers.")
app.add_typer(prompts, name="prompts")

RunFolder = Annotated[Path, typer.Option("--run", help="Run folder; the same command goes on with it.")]
Settings = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the config and stop.")]
VictimName = Annotated[str, typer.Option("--victim", help="Name, weights folder, or openai:URL#model.")]
PolicyName = Annotated[
    str, typer.Argument(metavar="POLICY", help="Name, JSON file, or folder of a policy.", show_default=False)
]


@app.command("optimize-prompt")
def optimize_prompt(
    run: RunFolder,
    method: Annotated[str, typer.Option("--method", help="gepa, soft or generator.")] = "gepa",
    victim: VictimName = "pocket",
    settings: Settings = [],  # noqa: B006  (Typer copies it)
    dry_run: DryRun = False,
) -> None:
    """Search a prompt policy that helps under attack and costs nothing else; RUN/policy is the result.

    Attacks a few training pictures, judges every candidate on other pictures under other attacks, and chooses the most
    robust one that costs at most 1% of the clean score and 1% more refusals.
    """
    from codefend.training import prompt_search
    from codefend.training.prompt_search.config import SearchConfig

    config = _config(SearchConfig(), [f"victim={victim}", f"method={method}", *settings])
    if _shown(config, dry_run):
        return
    outcome = prompt_search.optimize_prompt(config, run)
    _show_run(run)
    if not outcome.helps:
        print("nothing found is more robust than no prompt at the allowed cost; the card says so", file=sys.stderr)
    print(outcome.folder)


@prompts.command("list")
def list_() -> None:
    """Show the policies that can be named."""
    from codefend.prompts import PROMPTS

    width = max(map(len, PROMPTS))
    for name, spec in PROMPTS.items():
        print(f"{name:{width}}  {spec.summary}")


@prompts.command()
def show(
    name: Annotated[str, typer.Argument(metavar="POLICY|RUN", help="A policy, or the run folder of a search.")],
) -> None:
    """Show a policy's words and card, or the Pareto front of a search, also of one under way."""
    if (Path(name) / "rows.jsonl").is_file():
        _show_run(Path(name), to=sys.stdout)
        return
    folder = _folder(name)
    data = json.loads((folder / "policy.json").read_text(encoding="utf-8")) if folder else _words(name)
    for key, value in data.items():
        if value:
            print(f"{key}: {value if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)}")
    if folder and (folder / "README.md").is_file():
        print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}", end="")


@prompts.command()
def apply(
    name: PolicyName,
    prompt: Annotated[str, typer.Argument(help="The user's words; - reads them from standard input.")],
) -> None:
    """Print what a model gets to read when the policy is applied to a prompt."""
    from codefend.prompts import load

    print(load(name)(sys.stdin.read().strip() if prompt == "-" else prompt))


@prompts.command()
def table(
    run: RunFolder,
    victim: VictimName = "pocket",
    settings: Settings = [],  # noqa: B006
    purifiers: Annotated[list[str], typer.Option("--purifier", help="NAME or NAME:key=value,...; repeat.")] = [],  # noqa: B006
    policies: Annotated[list[str], typer.Option("--prompt", help="A policy to compare; repeat.")] = [],  # noqa: B006
    dry_run: DryRun = False,
) -> None:
    """Compare purifiers and policies, alone and together, on the test pictures; table.json and table.md in RUN."""
    from dataclasses import replace

    from codefend.core.files import write_atomic
    from codefend.training.prompt_search.table import TableConfig, make_table, markdown

    config = _config(TableConfig(), [f"victim={victim}", *settings])
    if purifiers:
        config = replace(config, purifiers=tuple(dict.fromkeys(["none", *purifiers])))
    if policies:
        config = replace(config, prompts=tuple(dict.fromkeys(["none", *policies])))
    if _shown(config, dry_run):
        return
    text = markdown(make_table(config, run))
    write_atomic(run / "table.md", text)
    print(text, end="")


def _config(default: Any, items: Sequence[str]) -> Any:
    from codefend.core.settings import override
    from codefend.core.specs import parse_options

    return override(default, parse_options(items))


def _shown(config: Any, dry_run: bool) -> bool:
    from codefend.core.runs import plain

    if dry_run:
        print(json.dumps(plain(config), indent=2, ensure_ascii=False))
    return dry_run


def _folder(name: str) -> Path | None:
    """The folder of a policy that has one."""
    from codefend.prompts import PROMPTS

    spec = PROMPTS.get(name)
    folder = spec.folder if spec else Path(name)
    return folder if folder is not None and (folder / "policy.json").is_file() else None


def _words(name: str) -> dict[str, Any]:
    from codefend.prompts import PromptPolicy, load_any

    policy = load_any(name)
    assert isinstance(policy, PromptPolicy)  # the other kinds are folders
    return asdict(policy)


def _show_run(run: Path, to: Any = None) -> None:
    """The references and the Pareto front of a search, most robust first."""
    from rich.console import Console
    from rich.table import Table

    from codefend.core.runs import read_rows
    from codefend.prompts.items import Score, pareto

    rows = [row for row in read_rows(run) if row.get("kind") in ("candidate", "reference")]
    if not rows:
        raise CodefendError(f"{run} holds no judged policy yet; run codefend optimize-prompt --run {run}")
    scored = {
        kind: [(r["name"], Score(**r["score"])) for r in rows if r["kind"] == kind]
        for kind in ("reference", "candidate")
    }
    front = pareto(scored["candidate"])
    shown = Table(
        "policy",
        "clean",
        "robust",
        "refusals",
        "look-alikes",
        title=f"{len(scored['candidate'])} judged; the Pareto front",
    )
    for name, score in [*scored["reference"], *front]:
        numbers = (score.clean, score.robust, score.refusal, score.benign)
        shown.add_row(name, *(f"{number:.3f}" for number in numbers))
    Console(file=to or sys.stderr).print(shown)
