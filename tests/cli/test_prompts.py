"""The verbs for prompts on toys: output, files and exit codes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_kit import Run
from codefend.core.runs import read_rows
from codefend.prompts import PROMPTS, PromptPolicy, save_folder, save_policy
from codefend.prompts.soft import SoftPolicy
from codefend.types import CodefendError
from prompts_kit import HELP, Killed, Suggestible, search_loaders
from toys import purifier

SET = ["bank.tasks=questions", "bank.purifier=none", "bank.search_scenes=4", "bank.selection_scenes=4"]
SET += ["bank.seen=pgd", "bank.held_out=apgd", "bank.attack.steps=6", "gepa.evaluations=200"]
SEARCH = [part for item in SET for part in ("--set", item)]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Victims by name; tests may add some."""
    known: dict[str, Any] = {"toy": Suggestible()}
    loaders = search_loaders()

    def victim(name: str) -> Any:
        if name not in known:
            raise CodefendError(f"unknown victim {name!r}")
        return known[name]

    monkeypatch.setattr("codefend.victims.load", victim)
    monkeypatch.setattr("codefend.tasks.load", lambda name, *, split, limit: loaders.task(name, split, limit))
    monkeypatch.setattr("codefend.purifiers.load", lambda name, **options: loaders.purifier("smooth"))
    return known


def optimize(run: Run, folder: Path, *more: str) -> tuple[int, str, str]:
    return run("optimize-prompt", "--victim", "toy", "--run", folder, *SEARCH, *more)


def test_a_search_and_the_uses_of_its_policy(run: Run, toys: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, err = optimize(run, folder)
    assert code == 0
    assert out == f"{folder / 'policy'}\n"
    assert "the Pareto front" in err
    assert "adashield-static" in err
    assert "nothing found" not in err
    code, out, _ = run("prompts", "show", folder / "policy")
    assert code == 0
    assert "shapes" in out
    assert "# gepa policy for toy: more robust than no prompt" in out
    code, out, _ = run("prompts", "apply", folder / "policy", "left?")
    assert (code, "left?" in out, "shapes" in out) == (0, True, True)
    code, out, _ = run("prompts", "show", folder)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if "none" in line or "adashield" in line] == [
        "none",
        "adashield-static",
    ]


def test_an_interrupted_search_resumes_with_the_same_command(run: Run, toys: dict[str, Any], tmp_path: Path) -> None:
    toys["toy"] = Killed(100)
    code, out, err = optimize(run, tmp_path / "run")
    assert (code, out) == (130, "")
    assert err.endswith("interrupted; rerun the command to resume\n")
    code, out, _ = run("prompts", "show", tmp_path / "run")
    assert code == 0
    assert "evaluated; the Pareto front" in out
    before = len(read_rows(tmp_path / "run"))
    toys["toy"] = Suggestible()
    assert optimize(run, tmp_path / "run")[0] == 0
    assert len(read_rows(tmp_path / "run")) > before
    code, _, err = optimize(run, tmp_path / "run", "--set", "seed=1")
    assert code == 2
    assert "holds a run with another config: seed was 0, now 1" in err


def test_a_search_without_a_better_policy_reports_it(run: Run, toys: dict[str, Any], tmp_path: Path) -> None:
    code, out, err = optimize(run, tmp_path / "run", "--set", "gepa.evaluations=20")
    assert code == 0
    assert out
    assert "no candidate beats the empty prompt at the allowed cost" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "choose one of gepa, soft, generator"),
        (["--victim", "nobody"], "unknown victim 'nobody'"),
        (["--set", "gepa.proposer=http://host"], "--set gepa.model=NAME"),
        (["--set", "gepa.seed_policy=doupt"], "did you mean 'doubt'"),
        (["--set", "gepa.evaluatoins=3"], "evaluations"),
        (["--set", "bank.held_out=apdg"], "did you mean 'apgd'"),
    ],
)
def test_mistakes_create_no_folder(
    run: Run, toys: dict[str, Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = optimize(run, tmp_path / "run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_with_its_extra(
    run: Run, toys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gepa.api", None)
    monkeypatch.setitem(__import__("sys").modules, "gepa", None)
    code, _, err = optimize(run, tmp_path / "run")
    assert code == 2
    assert "pip install 'codefend[prompts]'" in err


def test_settings_are_shown_without_a_run(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("optimize-prompt", "--run", tmp_path / "x", "--method", "soft", "--dry-run")
    assert (code, json.loads(out)["method"]) == (0, "soft")
    code, out, _ = run("prompts", "table", "--run", tmp_path / "x", "--dry-run", "--purifier", "jpeg")
    assert (code, json.loads(out)["purifiers"]) == (0, ["none", "jpeg"])
    assert not (tmp_path / "x").exists()


def test_list_show_and_apply(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("prompts", "list")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, list(PROMPTS))
    assert run("prompts", "show", "none") == (0, 'name: "none"\n', "")
    assert run("prompts", "apply", "none", "What?") == (0, "What?\n", "")
    save_policy(PromptPolicy("mine", system="S", prefix="<"), tmp_path / "mine.json")
    assert run("prompts", "show", tmp_path / "mine.json")[1] == 'name: "mine"\nsystem: "S"\nprefix: "<"\n'
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert run("prompts", "apply", tmp_path / "mine.json", "-")[1] == "S\n\n<from a pipe\n"
    save_folder(SoftPolicy("soft", torch.zeros(2, 4), "toy"), tmp_path / "soft", "# a card\n")
    assert 'kind: "soft"' in run("prompts", "show", tmp_path / "soft")[1]
    code, _, err = run("prompts", "apply", tmp_path / "soft", "What?")
    assert code == 2
    assert "is a soft prefix" in err


@pytest.mark.parametrize("content", ["{", '{"name": "a", "prefix": "' + "x" * 20_001 + '"}', '{"name": 3}'])
def test_damaged_and_enormous_policies(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "policy.json").write_text(content)
    for arguments in (["show", tmp_path / "policy.json"], ["apply", tmp_path, "What?"]):
        code, out, err = run("prompts", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert len(err) < 400


def test_an_empty_run_has_no_front(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    code, _, err = run("prompts", "show", tmp_path)
    assert code == 2
    assert "holds no evaluated policy yet" in err


# --- the collaboration table -----------------------------------------------------------------------------------------

TABLE = ["tasks=questions,captions", "seen=pgd", "unseen=apgd", "joint=planted", "scenes=6", "attack.steps=6"]


def table(run: Run, folder: Path, *more: object) -> tuple[int, str, str]:
    settings = [part for item in TABLE for part in ("--set", item)]
    return run("prompts", "table", "--victim", "toy", "--run", folder, *settings, *more)


def test_the_table_measures_pairs_against_each_alone(run: Run, toys: dict[str, Any], tmp_path: Path) -> None:
    save_policy(PromptPolicy("mine", prefix=f"{HELP}\n"), tmp_path / "mine.json")
    compared = ["--purifier", "smooth", "--prompt", tmp_path / "mine.json"]
    code, out, _ = table(run, tmp_path / "run", *compared)
    assert code == 0
    assert out == (tmp_path / "run" / "table.md").read_text()
    result = json.loads((tmp_path / "run" / "table.json").read_text())
    cells = {(cell["purifier"], cell["prompt"] == "none"): cell["scores"]["questions"] for cell in result["cells"]}
    assert cells["none", True]["seen"]["mean"] == cells["none", True]["unseen"]["mean"] == 0
    assert cells["none", False]["unseen"]["mean"] == cells["smooth", True]["unseen"]["mean"] == 1
    rows = {(row["task"], row["group"]): row for row in result["interaction"]}
    unseen = rows["questions", "unseen"]
    assert (unseen["over_purifier"]["mean"], unseen["over_prompt"]["mean"]) == (0, 0)
    assert unseen["beyond_sum"]["mean"] == -1  # each alone does it all: together they do not do it twice
    assert unseen["over_purifier"]["low"] <= 0
    before = len(read_rows(tmp_path / "run"))
    assert table(run, tmp_path / "run", *compared)[0] == 0
    assert len(read_rows(tmp_path / "run")) == before


def test_a_changed_policy_is_refused(run: Run, toys: dict[str, Any], tmp_path: Path) -> None:
    save_policy(PromptPolicy("mine", prefix="a "), tmp_path / "mine.json")
    arguments = ["--purifier", "none", "--prompt", tmp_path / "mine.json", "--set", "tasks=questions"]
    assert table(run, tmp_path / "run", *arguments)[0] == 0
    save_policy(PromptPolicy("mine", prefix="b "), tmp_path / "mine.json")
    code, _, err = table(run, tmp_path / "run", *arguments)
    assert code == 2
    assert "frozen" in err


def test_refusals_caused_by_a_prompt_are_reported(run: Run, toys: dict[str, Any], tmp_path: Path) -> None:
    assert "altered" in str(PROMPTS["doubt"].policy)

    class Jumpy(Suggestible):
        def generate(self, images: torch.Tensor, prompts: Sequence[str], **more: Any) -> list[str]:
            answers = super().generate(images, prompts, **more)
            return ["I'm sorry." if "altered" in p else a for p, a in zip(prompts, answers, strict=True)]

    toys["toy"] = Jumpy()
    assert table(run, tmp_path, "--purifier", "none", "--prompt", "doubt", "--set", "tasks=questions")[0] == 0
    cells = {cell["prompt"]: cell for cell in json.loads((tmp_path / "table.json").read_text())["cells"]}
    assert (cells["none"]["refusals"], cells["doubt"]["refusals"]) == (0, 1)
    assert (cells["none"]["clean_cost"], cells["doubt"]["clean_cost"]) == (0, 1)


def test_purifiers_of_a_table_keep_their_options_and_unknown_ones_create_no_folder(
    run: Run, toys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, **options: object) -> Any:
        raise CodefendError(f"unknown purifier {name!r}")

    monkeypatch.setattr("codefend.purifiers.load", load)
    code, out, _ = table(run, tmp_path / "x", "--set", "purifiers=none,diffpure:t=0.1,steps=5,jpeg", "--dry-run")
    assert code == 0
    assert json.loads(out)["purifiers"] == ["none", "diffpure:t=0.1,steps=5", "jpeg"]
    code, _, err = table(run, tmp_path / "y", "--purifier", "nothing")
    assert code == 2
    assert "unknown purifier 'nothing'" in err
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tasks=questoins", "unknown task 'questoins'"),
        ("surrogate=nobody", "unknown victim 'nobody'"),
        ("purifiers=none,smooth+prompt=doubt", "names a prompt policy: list policies separately"),
        ("unseen=apgd,pgd", "attack 'pgd' is named twice"),
        ("joint=planted,planted", "attack 'planted' is named twice"),
        ("attack.eps=nan", "not a finite number"),
        ("attack.eps=0.03", "l-inf eps is counted in 1/255"),
        ("attack.steps=0", "attack.steps must be 1 or more, not 0"),
        ("attack.queries=0", "attack.queries must be 1 or more, not 0"),
    ],
)
def test_mistakes_of_a_table_create_no_folder(
    run: Run, toys: dict[str, Any], tmp_path: Path, setting: str, message: str
) -> None:
    code, _, err = table(run, tmp_path / "run", "--set", setting)
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_table_at_t2_attacks_each_cell_through_its_own_defense(
    run: Run, toys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codefend.purifiers.load", lambda name, **options: purifier(name))
    save_policy(PromptPolicy("mine", prefix="Well: "), tmp_path / "mine.json")
    arguments = ["--purifier", "leaky", "--prompt", tmp_path / "mine.json", "--set", "tasks=questions", "--set"]
    scores = {}
    for threat in ("T0", "T2"):
        code, _, err = table(run, tmp_path / threat, *arguments, f"threat={threat}")
        assert code == 0, err
        cells = json.loads((tmp_path / threat / "table.json").read_text())["cells"]
        scores |= {(threat, c["purifier"], c["prompt"] != "none"): c["scores"]["questions"] for c in cells}
    for policy in (False, True):
        assert scores["T0", "leaky", policy]["seen"]["mean"] == 1
        assert scores["T2", "leaky", policy]["seen"]["mean"] < 0.5
        assert scores["T2", "leaky", policy]["clean"]["mean"] == 1
