"""Verbs for prompt policies: optimize-prompt, and prompts list, show, apply and table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from codefend.cli.options import DryRun, RunFolder, Settings, VictimName, print_config
from codefend.types import CodefendError

app = typer.Typer()
prompts = typer.Typer(help="Prompt policies: list, show, apply, and compare them with purifiers.")
app.add_typer(prompts, name="prompts")

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
    """Search for a prompt policy with higher robust accuracy at no clean cost; the result is RUN/policy.

    Candidates are proposed on attacked training images and selected on validation images under other attacks: the most
    robust one that costs at most 1% of the clean score and adds at most 1% refusals.

    Example: codefend optimize-prompt --method soft --run runs/soft
    """
    from codefend.training import prompt_search
    from codefend.training.prompt_search.config import SearchConfig

    config = _config(SearchConfig(), [f"victim={victim}", f"method={method}", *settings])
    if dry_run:
        print_config(config)
    outcome = prompt_search.optimize_prompt(config, run)
    _show_run(run)
    if not outcome.helps:
        print("no candidate beats the empty prompt at the allowed cost; see the card", file=sys.stderr)
    print(outcome.folder)


@prompts.command("list")
def list_() -> None:
    """List the prompt policies.

    Example: codefend prompts list
    """
    from codefend.prompts import PROMPTS

    width = max(map(len, PROMPTS))
    for name, spec in PROMPTS.items():
        print(f"{name:{width}}  {spec.summary}")


@prompts.command()
def show(
    name: Annotated[str, typer.Argument(metavar="POLICY|RUN", help="A policy, or the run folder of a search.")],
) -> None:
    """Show a policy's text and card, or the Pareto front of a search, finished or not.

    Example: codefend prompts show text-is-data
    """
    if (Path(name) / "rows.jsonl").is_file():
        _show_run(Path(name), to=sys.stdout)
        return
    folder = _folder(name)
    data = json.loads((folder / "policy.json").read_text(encoding="utf-8")) if folder else _policy_fields(name)
    for key, value in data.items():
        if value:
            print(f"{key}: {value if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)}")
    if folder and (folder / "README.md").is_file():
        print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}", end="")


@prompts.command()
def apply(
    name: PolicyName,
    prompt: Annotated[str, typer.Argument(help="The user's prompt; - reads it from standard input.")],
) -> None:
    """Print a prompt with the policy applied, as the model receives it.

    Example: codefend prompts apply text-is-data "Describe the image."
    """
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
    """Compare purifiers and policies, alone and combined, on the test images; writes table.json and table.md to RUN.

    Example: codefend prompts table --run runs/table --purifier bridge --prompt text-is-data
    """
    from dataclasses import replace

    from codefend.core.files import write_atomic
    from codefend.training.prompt_search.table import TableConfig, make_table, markdown

    config = _config(TableConfig(), [f"victim={victim}", *settings])
    if purifiers:
        config = replace(config, purifiers=tuple(dict.fromkeys(["none", *purifiers])))
    if policies:
        config = replace(config, prompts=tuple(dict.fromkeys(["none", *policies])))
    if dry_run:
        print_config(config)
    text = markdown(make_table(config, run))
    write_atomic(run / "table.md", text)
    print(text, end="")


def _config(default: Any, items: Sequence[str]) -> Any:
    from codefend.core.settings import override
    from codefend.core.specs import parse_options

    return override(default, parse_options(items))


def _folder(name: str) -> Path | None:
    """The folder of a learned policy; None for one without a folder."""
    from codefend.prompts import PROMPTS

    spec = PROMPTS.get(name)
    folder = spec.folder if spec else Path(name)
    return folder if folder is not None and (folder / "policy.json").is_file() else None


def _policy_fields(name: str) -> dict[str, Any]:
    from codefend.prompts import PromptPolicy, load_any

    policy = load_any(name)
    assert isinstance(policy, PromptPolicy)  # all other kinds have a folder
    return asdict(policy)


def _show_run(run: Path, to: Any = None) -> None:
    """Print the references and the Pareto front of a search, most robust first."""
    from rich.console import Console
    from rich.table import Table

    from codefend.core.runs import read_rows
    from codefend.prompts.items import Score, pareto

    rows = [row for row in read_rows(run) if row.get("kind") in ("candidate", "reference")]
    if not rows:
        raise CodefendError(f"{run} holds no evaluated policy yet; run codefend optimize-prompt --run {run}")
    scored = {
        kind: [(r["name"], Score(**r["score"])) for r in rows if r["kind"] == kind]
        for kind in ("reference", "candidate")
    }
    front = pareto(scored["candidate"])
    table = Table(
        "policy",
        "clean",
        "robust",
        "refusals",
        "look-alikes",
        title=f"{len(scored['candidate'])} evaluated; the Pareto front",
    )
    for name, score in [*scored["reference"], *front]:
        numbers = (score.clean, score.robust, score.refusal, score.benign)
        table.add_row(name, *(f"{number:.3f}" for number in numbers))
    Console(file=to or sys.stderr).print(table)
