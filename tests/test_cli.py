"""The verbs, run in this process with toys behind them: what they print, write and return."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import codefend
from codefend import cli, images
from codefend.settings import override
from codefend.types import UserError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line and return its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Replace the module ``codefend.<name>`` for this test, whether or not it could be imported."""
    module = ModuleType(f"codefend.{name}")
    module.__path__ = [str(Path(codefend.__file__).parent / name)]  # submodules are the real ones
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(codefend, name, module, raising=False)


class Brighten:
    """A purifier whose effect is easy to see: half way to white."""

    name = "brighten"

    def __call__(self, batch: Tensor, *, generator: Generator | None = None) -> Tensor:
        return (batch + 1) / 2


class Toy:
    """A white-box victim that tells dark pictures from bright ones."""

    name = "toy"

    def generate(self, batch: Tensor, prompts: Sequence[str]) -> list[str]:
        return [
            f"{prompt} {'bright' if float(pixels.mean()) > 0.5 else 'dark'}"
            for pixels, prompt in zip(batch, prompts, strict=True)
        ]

    def loss(self, batch: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        brightness = batch.flatten(1).mean(1)
        signs = torch.tensor([-1.0 if target.endswith("bright") else 1.0 for target in targets])
        return signs * brightness

    def features(self, batch: Tensor) -> Tensor:
        return batch.flatten(2).transpose(1, 2)


class BlackBox:
    name = "black"

    def generate(self, batch: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["something"] * len(prompts)


class Steps:
    """A purifier without a gradient, as it says itself."""

    name, differentiable = "steps", False

    def __call__(self, batch: Tensor, *, generator: Generator | None = None) -> Tensor:
        return (batch.detach() * 500).round() / 500


def load_purifier(name: str) -> Brighten | Steps:
    if name == "steps":
        return Steps()
    if name != "brighten":
        raise UserError(f"unknown purifier {name!r}; did you mean 'brighten'?")
    return Brighten()


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "purifiers", load=load_purifier, PURIFIERS={"brighten": SimpleNamespace(summary="to white")})
    victims = {"pocket": Toy, "black": BlackBox}
    stand_in(monkeypatch, "victims", load=lambda name: victims[name](), VICTIMS={"pocket": (Toy, "a toy")})


@pytest.fixture
def dark(tmp_path: Path) -> Path:
    images.save(tmp_path / "dark.png", torch.full((3, 8, 8), 125 / 255))
    return tmp_path / "dark.png"


# --- the front -------------------------------------------------------------------------------------------------------


def test_help_version_and_no_arguments(run: Run) -> None:
    for arguments in (["--help"], ["-h"], []):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert all(f"  {verb} " in out for verb in ("list", "purify", "ask", "caption", "attack", "pairs", "train"))
        assert all(f"  {verb} " in out for verb in ("eval", "report", "demo", "optimize-prompt", "prompts"))
    assert run("--version") == (0, f"codefend {codefend.__version__}\n", "")


@pytest.mark.parametrize(
    "verb", ["list", "purify", "ask", "caption", "attack", "pairs", "train", "eval", "report", "demo"]
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


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a\nline too many"), 2, "error: a line too many\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n"),
        (ModuleNotFoundError("x", name="matplotlib.pyplot"), 2, "error: this needs matplotlib.pyplot, which is not"),
    ],
)
def test_what_goes_wrong_inside_a_verb(
    error: BaseException, code: int, text: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "demo", run_demo=raising(error))
    got, out, err = run("demo")
    assert (got, out) == (code, "")
    assert err.startswith(text)


def test_bugs_are_not_dressed_up_as_user_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a bug"), ModuleNotFoundError("x", name="codefend.gone")):
        stand_in(monkeypatch, "demo", run_demo=raising(error))
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


# --- purify ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
def test_purify_writes_the_picture(dark: Path, run: Run) -> None:
    out_path = dark.parent / "out.png"
    code, out, err = run("purify", dark, "-o", out_path, "--purifier", "brighten")
    assert (code, out, err) == (0, f"purified 1 -> {out_path}\n", "")
    torch.testing.assert_close(images.load(out_path).pixels, torch.full((3, 8, 8), 190 / 255))


@pytest.mark.usefixtures("toys")
def test_purify_says_what_failed_last_and_exits_with_1(dark: Path, run: Run) -> None:
    (dark.parent / "bad.png").write_bytes(b"no")
    (dark.parent / "big.png").write_bytes(images.encode(torch.zeros(3, 20, 20)))
    command = ("purify", dark.parent, "-o", dark.parent / "out", "--purifier", "brighten", "--max-pixels", 100)
    code, out, err = run(*command)
    assert code == 1
    assert out == f"purified 1 -> {dark.parent / 'out'}\n"
    assert err.splitlines()[-1] == "error: 2 of 3 failed: bad.png, big.png"
    assert "failed: big.png:" in err
    assert "--max-pixels 400" in err
    assert run(*command)[1] == f"purified 0, 1 done before -> {dark.parent / 'out'}\n"


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none.png", "-o", "x.png"], "no such file"),
        (["dark.png", "-o", "dark.png"], "exists already"),
        (["dark.png", "-o", "x.png", "--purifier", "brigthen"], "did you mean 'brighten'"),
        (["dark.png", "-o", "x.png", "--max-pixels", "10"], "limit of 10; raise it with --max-pixels 64"),
        (["moving.gif", "-o", "x.png"], "--first-frame"),
        (["cut.png", "-o", "x.png"], "damaged, cut short"),
    ],
)
def test_purify_refuses_with_one_line(
    arguments: list[str], text: str, dark: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dark.parent)
    frames = [images.to_pil(torch.full((3, 4, 4), float(level))) for level in (0, 1)]
    frames[0].save("moving.gif", save_all=True, append_images=frames[1:])
    Path("cut.png").write_bytes(dark.read_bytes()[:40])
    before = sorted(path.name for path in dark.parent.iterdir())
    code, out, err = run("purify", "--purifier", "brighten", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err
    assert sorted(path.name for path in dark.parent.iterdir()) == before


# --- ask, caption, attack --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
def test_ask_and_caption_print_only_the_answer(dark: Path, run: Run) -> None:
    assert run("ask", dark, "how is it?") == (0, "how is it? dark\n", "")
    assert run("ask", dark, "how is it?", "--defense", "brighten") == (0, "how is it? bright\n", "")
    code, out, err = run("caption", dark, "--defense", "brighten")
    assert (code, err) == (0, "")
    assert out.endswith("bright\n")


@pytest.mark.usefixtures("toys")
def test_attack_stays_in_its_budget_and_shows_both_answers(dark: Path, run: Run) -> None:
    out_path = dark.parent / "adv.png"
    command = ("attack", dark, "--attack", "pgd", "--question", "how?", "--eps", "4/255", "--steps", 3, "-o", out_path)
    code, out, err = run(*command)
    assert (code, out, err) == (0, "clean:    how? dark\nattacked: how? bright\n", "")
    difference = images.load(out_path).pixels - images.load(dark).pixels
    torch.testing.assert_close(difference, torch.full((3, 8, 8), 4 / 255))
    assert run(*command)[0] == 2
    assert run(*command, "--overwrite")[0] == 0


@pytest.mark.usefixtures("toys")
def test_attack_with_a_target_sentence_and_through_a_defense(dark: Path, run: Run) -> None:
    for number, defense in enumerate(("none", "brighten", "steps")):
        out_path = dark.parent / f"{number}.png"
        options = ("--attack", "pgd-targeted", "--target", "so bright", "--steps", 3, "--defense", defense)
        code, _, err = run("attack", dark, *options, "-o", out_path)
        assert (code, err) == (0, "")
        assert float((images.load(out_path).pixels - images.load(dark).pixels).min()) > 7.5 / 255


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--attack", "apdg"], "did you mean 'apgd"),
        (["--attack", "apgd-targeted"], "needs --target"),
        (["--attack", "feature-target"], "needs --target-image"),
        (["--eps", "8"], "write it as 8/255"),
        (["--eps", "a"], "not a number"),
        (["--norm", "l1"], "choose linf or l2"),
        (["--question", "q", "--caption"], "not both"),
        (["-o", "adv.jpg"], "would lose the perturbation"),
        (["-o", "dark.png"], "exists already"),
        (["--victim", "black"], "black box"),
    ],
)
def test_attack_refuses_with_one_line(
    options: list[str], text: str, dark: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dark.parent)
    code, out, err = run("attack", "dark.png", "-o", "adv.png", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err
    assert not Path("adv.png").exists()


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
        def call(*arguments: Any) -> Any:
            calls.append((verb, *arguments))
            return arguments[-1] or "report.html"

        return call

    preset = SimpleNamespace(summary="a toy", build=lambda settings: override(Config(), settings))
    other = SimpleNamespace(summary="not for pairs or eval", build=lambda settings: override(Inner(), settings))
    stand_in(monkeypatch, "presets", PRESETS={"pairs": preset, "tiny": preset, "quick": preset, "other": other})
    stand_in(monkeypatch, "pairs", make_pairs=reached("pairs"), PairsConfig=Config)
    stand_in(monkeypatch, "training", train=lambda config, folder, *, tracker: reached("train")(config, folder))
    stand_in(monkeypatch, "evaluate", evaluate=reached("eval"), EvalConfig=Config)
    stand_in(monkeypatch, "report", write_report=reached("report"), print_summary=lambda *_: print("tables"))
    return calls


def test_run_verbs_hand_over_config_and_folder(presets: list[tuple[Any, ...]], tmp_path: Path, run: Run) -> None:
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
        ([row | {"success_any": {"untargeted": None}} for row in attacked(0, 4)], 1, "no image is answered right"),
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
    stand_in(monkeypatch, "evaluate", evaluate=lambda *_: rows, EvalConfig=Config)
    found, out, err = run("eval", "--run", tmp_path, "--max-asr", 0.25)
    assert (found, out) == (code, f"{tmp_path}\n")
    assert words in err
    assert run("eval", "--run", tmp_path)[0] == 0  # nobody asked


def test_max_asr_wants_a_share_and_an_attack(
    presets: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    assert run("eval", "--run", tmp_path, "--max-asr", 25)[0] == 2
    stand_in(monkeypatch, "evaluate", evaluate=lambda *_: [], EvalConfig=Config)
    code, _, err = run("eval", "--run", tmp_path, "--max-asr", 0.25)
    assert (code, "nothing was attacked" in err) == (2, True)


def test_rows_and_leaderboard_verbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    calls: list[tuple[Any, ...]] = []

    def called(*arguments: Any) -> Any:
        calls.append(arguments)
        return arguments[-1]

    verbs = {"write_report": lambda *_: "r.html", "export_rows": called, "write_leaderboard": called}
    stand_in(monkeypatch, "report", print_summary=lambda *_: None, **verbs)
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
        (["eval", "other", "--run", "r"], "preset 'other' is for another verb"),
        (["pairs", "other", "--run", "r"], "preset 'other' is for another verb"),
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


def test_a_report_on_what_is_no_run(run: Run, tmp_path: Path) -> None:
    code, out, err = run("report", tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "not a run folder" in err


def test_demo_returns_its_own_code(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, "demo", run_demo=lambda folder: 0 if folder == tmp_path else 1)
    assert run("demo", "--run", tmp_path)[0] == 0
    assert run("demo")[0] == 1
