"""The command line and its verbs for runs: output, files and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import codefend
from cli_kit import Run, raising, stand_in
from codefend.bench.config import EvalConfig, check
from codefend.cli.presets import Preset, preset_config
from codefend.types import CodefendError

# --- the front -------------------------------------------------------------------------------------------------------


def test_help_version_and_no_arguments(run: Run) -> None:
    for arguments in (["--help"], ["-h"], []):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert all(f"  {verb} " in out for verb in ("list", "purify", "ask", "caption", "attack", "pairs", "train"))
        assert all(f"  {verb} " in out for verb in ("eval", "report", "demo", "optimize-prompt", "prompts"))
    assert run("--version") == (0, f"codefend {codefend.__version__}\n", "")


@pytest.mark.parametrize("module", ["codefend", "codefend.cli"])
def test_the_module_is_the_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"codefend {codefend.__version__}\n", "")


def test_nothing_is_collected_at_the_end_of_the_process() -> None:
    code = "import atexit, gc; from codefend.cli import main; main(['--version']); atexit._run_exitfuncs()"
    subprocess.run([sys.executable, "-c", f"{code}; assert gc.get_freeze_count()"], check=True)


@pytest.mark.parametrize(
    "verb",
    [
        *("list", "purify", "ask", "caption", "attack", "pairs", "train", "build-victim", "eval", "report", "demo"),
        "mcp-proxy",
    ],
)
def test_every_verb_has_help(verb: str, run: Run) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: codefend {verb} ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["purfy"], "No such command 'purfy'"),
        (["purify", "a.png"], "Missing option"),
        (["purify", "a.png", "-o", "b.png", "--bacth", "2"], "No such option"),
        (["purify", "a.png", "-o", "b.png", "--batch", "x"], "--batch"),
        (["list"], "Missing argument"),
        (["list", "purifers"], "did you mean 'purifiers'?"),
        (["list", "xyz"], "choose purifiers, attacks"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], text: str, run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert text in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CodefendError("a\nline too many"), 2, "error: a line too many\n"),
        (KeyboardInterrupt(), 130, "interrupted; rerun the command to resume\n"),
        (
            ModuleNotFoundError("x", name="matplotlib.pyplot"),
            2,
            "error: matplotlib.pyplot is not installed; run: pip install",
        ),
    ],
)
def test_errors_inside_a_verb_set_the_exit_code(
    error: BaseException, code: int, text: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "cli.demo", run_demo=raising(error))
    got, out, err = run("demo")
    assert (got, out) == (code, "")
    assert err.startswith(text)


def test_bugs_are_not_reported_as_user_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a bug"), ModuleNotFoundError("x", name="codefend.gone")):
        stand_in(monkeypatch, "cli.demo", run_demo=raising(error))
        with pytest.raises(type(error)):
            run("demo")


def test_lists_take_any_shape_of_entry(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def documented() -> None:
        """From the docstring.

        Not this.
        """

    entries = {"a": SimpleNamespace(summary="has one"), "long-name": (str, "in a tuple"), "c": documented, "d": "text"}
    stand_in(monkeypatch, "purifiers", PURIFIERS=entries)
    code, out, _ = run("list", "purifiers")
    assert code == 0
    assert out.splitlines() == [
        "a          has one",
        "long-name  in a tuple",
        "c          From the docstring.",
        "d          text",
    ]


def test_the_attacks_are_listed(run: Run) -> None:
    code, out, _ = run("list", "attacks")
    assert code == 0
    assert any(line.startswith("apgd ") for line in out.splitlines())


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    width: int = 8


@dataclass(frozen=True)
class Config:
    steps: int = 10
    limit: int | None = None
    eps: float = 8 / 255
    model: Inner = field(default_factory=Inner)


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Toy presets; returns the list of calls that reached the modules behind the verbs."""
    calls: list[tuple[Any, ...]] = []

    def reached(verb: str) -> Callable[..., Any]:
        def call(*arguments: Any, **_: Any) -> Any:
            calls.append((verb, *arguments))
            return arguments[-1] or "report.html"

        return call

    preset = Preset("a toy", f"{__name__}:Config")
    other = Preset("not for pairs or eval", f"{__name__}:Inner")
    toys = {"pairs": preset, "tiny": preset, "quick": preset, "other": other}
    monkeypatch.setattr("codefend.cli.presets.PRESETS", toys)
    stand_in(monkeypatch, "training", train=lambda config, folder, *, tracker: reached("train")(config, folder))
    stand_in(monkeypatch, "training.pairs", make_pairs=reached("pairs"), PairsConfig=Config)
    stand_in(monkeypatch, "bench", evaluate=reached("eval"), EvalConfig=Config, TransferConfig=Inner)
    stand_in(monkeypatch, "bench.report", write_report=reached("report"), print_summary=lambda *_: print("tables"))
    return calls


def test_run_verbs_pass_config_and_folder_on(presets: list[tuple[Any, ...]], tmp_path: Path, run: Run) -> None:
    settings = ("--set", "steps=3", "--set", "model.width=4")
    changed = Config(steps=3, model=Inner(4))
    assert run("train", "tiny", "--run", tmp_path, *settings) == (0, f"{tmp_path}\n", "")
    assert run("pairs", "--run", tmp_path, *settings)[0] == 0
    assert run("eval", "--run", tmp_path, "--limit", 5, *settings)[0] == 0
    assert run("report", tmp_path) == (0, "tables\nreport.html\n", "")
    assert run("report", tmp_path, "-o", "x.html") == (0, "tables\nx.html\n", "")
    assert presets == [
        ("train", changed, tmp_path),
        ("pairs", changed, tmp_path),
        ("eval", replace(changed, limit=5), tmp_path),
        ("report", tmp_path, None),
        ("report", tmp_path, Path("x.html")),
    ]


def test_a_config_file_comes_between_preset_and_settings(
    presets: list[tuple[Any, ...]], tmp_path: Path, run: Run
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("steps = 3\nlimit = 4\n[model]\nwidth = 4\n")
    for verb in (["train", "tiny"], ["pairs"], ["eval"]):
        assert run(*verb, "--run", tmp_path, "--config", file, "--set", "limit=9")[0] == 0
    assert [config for _, config, _ in presets] == [Config(steps=3, limit=9, model=Inner(4))] * 3
    file.write_text("stepz = 3")
    code, _, err = run("train", "tiny", "--run", tmp_path, "--config", file)
    assert (code, "did you mean 'steps'" in err) == (2, True)


def attacked(hits: int, n: int, *, defense: str = "bridge", threat: str = "T2") -> list[dict[str, Any]]:
    common = {"task": "vqa", "defense": defense, "threat": threat, "attack": "apgd", "eps": 8 / 255, "norm": "linf"}
    return [common | {"example": str(i), "success_any": {"untargeted": int(i < hits)}} for i in range(n)]


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        (attacked(1, 4), 0, "vqa bridge T2 8/255: 1/4 (25%) ok"),
        (attacked(2, 4), 1, "vqa bridge T2 8/255: 2/4 (50%) above 25%"),
        (attacked(0, 4, threat="T0") + attacked(3, 4), 1, "T2 8/255: 3/4"),  # the strongest threat counts
        (attacked(4, 4, defense="none", threat="T0") + attacked(0, 4), 0, "0/4 (0%) ok"),  # of what defends
        (attacked(4, 4, defense="none", threat="T0"), 1, "vqa none T0 8/255: 4/4"),  # unless nothing does
        (attacked(0, 4) + attacked(4, 4, defense="jpeg"), 1, "vqa jpeg T2 8/255: 4/4"),  # every one of them
        (
            [row | {"success_any": {"untargeted": None}} for row in attacked(0, 4)],
            1,
            "no clean image is answered correctly",
        ),
    ],
)
def test_max_asr_decides_the_exit_code(
    presets: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run: Run,
    rows: list[dict[str, Any]],
    code: int,
    words: str,
) -> None:
    stand_in(monkeypatch, "bench", evaluate=lambda *_, **__: rows, EvalConfig=Config, TransferConfig=Inner)
    exit_code, out, err = run("eval", "--run", tmp_path, "--max-asr", 0.25)
    assert (exit_code, out) == (code, f"{tmp_path}\n")
    assert words in err
    assert run("eval", "--run", tmp_path)[0] == 0  # without --max-asr


def test_max_asr_needs_a_share_and_an_attack(
    presets: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    assert run("eval", "--run", tmp_path, "--max-asr", 25)[0] == 2
    stand_in(monkeypatch, "bench", evaluate=lambda *_, **__: [], EvalConfig=Config, TransferConfig=Inner)
    code, _, err = run("eval", "--run", tmp_path, "--max-asr", 0.25)
    assert (code, "the run holds no attack" in err) == (2, True)


def test_an_unknown_precision_is_reported_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEFEND_PRECISION", "float16")
    code, out, err = run("list", "victims")
    assert (code, out) == (2, "")
    assert "'float16' is not one of 'float32'" in err


def test_rows_and_leaderboard_verbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    calls: list[tuple[Any, ...]] = []

    def called(*arguments: Any) -> Any:
        calls.append(arguments)
        return arguments[-1]

    verbs = {"write_report": lambda *_: "r.html", "export_rows": called, "write_leaderboard": called}
    stand_in(monkeypatch, "bench.report", print_summary=lambda *_: None, **verbs)
    assert run("report", tmp_path, "--rows", "r.parquet") == (0, "r.html\nr.parquet\n", "")
    assert run("leaderboard", "a", "b", "-o", "x.html") == (0, "x.html\n", "")
    assert calls == [(tmp_path, Path("r.parquet")), ([Path("a"), Path("b")], Path("x.html"))]


def test_dry_run_prints_the_config_and_does_nothing(presets: list[tuple[Any, ...]], tmp_path: Path, run: Run) -> None:
    for verb in ("train", "pairs", "eval"):
        code, out, _ = run(verb, "tiny", "--run", tmp_path / "new", "--set", "eps=4/255", "--dry-run")
        assert code == 0
        assert json.loads(out) == {"steps": 10, "limit": None, "eps": 4 / 255, "model": {"width": 8}}
    assert presets == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "tyni", "--run", "r"], "unknown preset 'tyni'; did you mean 'tiny'"),
        (["train", "tiny"], "Missing option '--run'"),
        (["train", "tiny", "--run", "r", "--set", "stesp=1"], "unknown setting 'stesp'; did you mean 'steps'"),
        (["train", "tiny", "--run", "r", "--set", "steps"], "expected key=value"),
        (["train", "tiny", "--run", "r", "--set", "steps=many"], "not a whole number"),
        (["eval", "tiny", "--run", "r", "--set", "model.widht=1"], "did you mean 'model.width'"),
        (["eval", "other", "--run", "r"], "preset 'other' belongs to another verb"),
        (["pairs", "other", "--run", "r"], "preset 'other' belongs to another verb"),
    ],
)
def test_run_verbs_refuse_with_one_line(
    arguments: list[str],
    text: str,
    presets: list[tuple[Any, ...]],
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err
    assert presets == []


def test_a_report_needs_a_run_folder(run: Run, tmp_path: Path) -> None:
    code, out, err = run("report", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "not a run folder" in err


def test_demo_returns_its_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, "cli.demo", run_demo=lambda folder: 0 if folder == tmp_path else 1)
    assert run("demo", "--run", tmp_path)[0] == 0
    assert run("demo")[0] == 1


def test_other_defenses_leave_the_presets_adaptive_attacks_on_those_that_remain() -> None:
    def adaptive(*items: str) -> tuple[str, ...]:
        config: EvalConfig = preset_config("quick", items, EvalConfig)
        return config.adaptive

    assert adaptive() == ("jpeg", "bridge")
    assert adaptive("defenses=none,bridge") == ("bridge",)
    assert adaptive("defenses=none,blur") == ()  # all of them
    with pytest.raises(CodefendError, match="not among the defenses"):
        check(preset_config("quick", ["defenses=none,bridge", "adaptive=jpeg"], EvalConfig))
