"""Black boxes, attacks made on another victim, the transfer matrix, and defenses with a prompt."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

import toys
from codefend.bench import EvalConfig, TransferConfig, evaluate
from codefend.bench.report import export_rows, print_summary, write_report
from codefend.bench.report.plots import heat_map
from codefend.bench.report.transfer import read_matrix
from codefend.bench.results import CLEAN
from codefend.bench.setup import Loaders, open_bench
from codefend.bench.transfer import pairs
from codefend.core.checkpoints import load_checkpoint
from codefend.core.runs import Row
from codefend.prompts import PromptPolicy
from codefend.types import CodefendError

CONFIG = EvalConfig(
    victim="box", craft_victim="toy", tasks=("questions",), defenses=("none", "smooth"), attacks=("apgd",), steps=6
)
CONFIG = replace(CONFIG, limit=6, panels=1)
MATRIX = TransferConfig(
    crafters=("toy", "striped"),
    judges=("box",),
    tasks=("questions",),
    defenses=("none", "smooth"),
    attacks=("apgd",),
    steps=6,
    limit=6,
    panels=0,
)


class Box:
    """The toy behind an interface that answers text only."""

    name = "box"

    def __init__(self) -> None:
        self.inner = toys.ToyVictim()

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return self.inner.generate(images, prompts)


def striped() -> toys.ToyVictim:
    """Reacts to another pattern than the toy."""
    evaluated = toys.ToyVictim(checker=0.0, striped=200.0)
    evaluated.name = "striped"
    return evaluated


VICTIMS: dict[str, Callable[[], Any]] = {"toy": toys.ToyVictim, "striped": striped, "box": Box}


class Calm:
    """A policy that changes what is asked, and so what the toy looks at."""

    def __call__(self, prompt: str) -> str:
        return prompt.replace("left", "LEFT") + " calmly"


def loaders() -> Loaders:
    return replace(toys.loaders(), victim=lambda name: VICTIMS[name](), policy=lambda name: POLICIES[name])


POLICIES: dict[str, Callable[[str], str]] = {"calm": Calm(), "twice": PromptPolicy("twice", suffix=" again")}


def run(folder: Path, config: EvalConfig = CONFIG) -> list[Row]:
    return evaluate(config, folder, loaders=loaders())


def mean(rows: list[Row], **where: object) -> float:
    chosen = [row["scores"][row["headline"]] for row in rows if all(row[k] == v for k, v in where.items())]
    assert chosen
    return float(sum(chosen) / len(chosen))


# A black box


def test_attacks_made_on_another_victim_are_judged_on_a_black_box(tmp_path: Path) -> None:
    rows = run(tmp_path)
    assert {(row["victim"], row["crafted_on"]) for row in rows} == {("box", "toy")}
    assert {row["threat"] for row in rows} == {"clean", "T1"}  # no gradients of the box
    assert mean(rows, attack=CLEAN) == 1
    assert mean(rows, attack="apgd", defense="none") == 0
    assert mean(rows, attack="apgd", defense="smooth") == 1
    attacked = [row for row in rows if row["attack"] == "apgd"]
    assert all(row["objective"]["defended"] is None and row["gradient_kind"] == "exact" for row in attacked)


def test_transferred_images_are_those_of_the_crafters_own_run(tmp_path: Path) -> None:
    run(tmp_path / "own", replace(CONFIG, victim="toy", craft_victim="", threats=("T0",)))
    run(tmp_path / "box")
    images = [load_checkpoint(next((tmp_path / name).rglob("*.safetensors")))[0]["images"] for name in ("own", "box")]
    assert bool((images[0] == images[1]).all())


def test_a_transfer_may_go_through_a_surrogate_defense(tmp_path: Path) -> None:
    rows = run(tmp_path, replace(CONFIG, surrogate="leaky", defenses=("leaky",)))
    assert mean(rows, attack="apgd", threat="T1") == 0  # as if it had been looked through


def test_a_black_box_alone_names_the_attacks_that_need_more() -> None:
    config = replace(CONFIG, craft_victim="", attacks=("square-text", "apgd", "feature"))
    with pytest.raises(
        CodefendError, match=r"'box' only answers text, and apgd, feature need a white box.*square-text"
    ):
        open_bench(config, loaders())


class LossOnly:
    name = "loss-only"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["no"] * len(images)

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


def test_a_victim_with_a_loss_alone_is_attacked_by_its_loss() -> None:
    lossy = replace(loaders(), victim=lambda name: LossOnly())
    config = replace(CONFIG, craft_victim="", attacks=("apgd",))
    open_bench(config, lossy)
    with pytest.raises(CodefendError, match="has a language-model loss and no features, which feature needs"):
        open_bench(replace(config, attacks=("apgd", "feature")), lossy)


def test_a_black_box_can_be_queried(tmp_path: Path) -> None:
    config = replace(CONFIG, craft_victim="", attacks=("square-text",), steps=3, limit=2)
    rows = run(tmp_path, config)
    attacked = [row for row in rows if row["attack"] != CLEAN]
    assert {(row["defense"], row["threat"]) for row in attacked} == {("none", "T0"), ("smooth", "T0"), ("smooth", "T2")}
    assert {row["access"] for row in attacked} == {"score"}


def test_crafting_on_the_victim_itself_is_no_transfer() -> None:
    with pytest.raises(CodefendError, match="is the victim 'box' itself"):
        open_bench(replace(CONFIG, craft_victim="box"), loaders())


# The matrix


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    folder = tmp_path_factory.mktemp("matrix")
    return folder, run(folder, MATRIX)


def test_matrix_has_every_pair(matrix: tuple[Path, list[Row]]) -> None:
    _, rows = matrix
    attacked = {(row["crafted_on"], row["victim"]): row["threat"] for row in rows if row["attack"] != CLEAN}
    own, transfer = ("toy", "striped"), ("box",)
    assert attacked == {(a, b): "T0" if a == b else "T1" for a in own for b in (*own, *transfer)}
    assert mean(rows, crafted_on="toy", victim="toy", attack="apgd", defense="none") == 0
    assert mean(rows, crafted_on="toy", victim="box", attack="apgd", defense="none") == 0
    assert mean(rows, crafted_on="striped", victim="box", attack="apgd", defense="none") == 1  # it ignores stripes
    assert mean(rows, crafted_on="toy", victim="striped", attack="apgd", defense="none") == 1


def test_matrix_makes_each_crafters_images_once(matrix: tuple[Path, list[Row]]) -> None:
    _, rows = matrix
    reused = {(row["crafted_on"] == row["victim"], bool(row.get("reused"))) for row in rows if row["attack"] != CLEAN}
    assert reused == {(True, False), (False, True)}


def test_matrix_resumes(matrix: tuple[Path, list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = matrix
    for victim in VICTIMS:
        monkeypatch.setitem(VICTIMS, victim, toys.BlackBox if victim == "box" else VICTIMS[victim])
    assert run(folder, MATRIX) == rows  # the other box isn't asked
    with pytest.raises(CodefendError, match="another config"):
        run(folder, replace(MATRIX, steps=7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crafters": ()}, "crafters is empty"),
        ({"crafters": ("toy",), "judges": ()}, "two victims or more"),
        ({"judges": ("toy",)}, "names? a victim twice"),
        ({"victim": "toy"}, "has no victim"),
        ({"threats": ("T2",)}, "has no threats"),
        ({"attacks": ("apdg",)}, "did you mean"),
        ({"eps": ()}, "eps is empty"),
        ({"crafters": ("toy", "box"), "judges": ()}, "only answers text"),
    ],
)
def test_malformed_matrices_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CodefendError, match=words):
        run(tmp_path / "run", replace(MATRIX, **change))


def test_pairs_come_after_the_runs_whose_images_they_reuse() -> None:
    listed = [(config.craft_victim, config.victim) for _, config in pairs(MATRIX)]
    assert listed[0] == ("", "toy")
    assert listed.index(("", "striped")) < listed.index(("striped", "toy"))


# Prompts in defenses


def test_prompt_defenses_are_attacked_through_the_prompt(tmp_path: Path) -> None:
    class Listens(toys.ToyVictim):
        """Records its prompts; prompted calmly, it ignores patterns."""

        asked: set[str] = set()  # noqa: RUF012

        def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
            self.asked |= {f"loss {p}" for p in prompts}
            self.checker = 0.0 if "calmly" in prompts[0] else 200.0
            return super().loss(images, prompts, targets)

        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            self.asked |= {f"generate {p}" for p in prompts}
            self.checker = 0.0 if "calmly" in prompts[0] else 200.0
            return super().generate(images, [p.replace("LEFT", "left") for p in prompts])

    config = replace(CONFIG, victim="toy", craft_victim="", defenses=("none", "none+prompt=calm", "leaky+prompt=calm"))
    rows = evaluate(config, tmp_path, loaders=replace(loaders(), victim=lambda name: Listens()))
    attacked = {(row["defense"], row["threat"]) for row in rows if row["attack"] == "apgd"}
    assert ("none+prompt=calm", "T2") in attacked  # a prompt is a defense, so it has rows of its own
    assert mean(rows, defense="none", threat="T0") == 0
    assert mean(rows, defense="none+prompt=calm", threat="T0") == 1
    assert {"loss left?", "loss LEFT? calmly", "generate LEFT? calmly"} <= Listens.asked
    kinds = {row["defense"]: row["gradient_kind"] for row in rows if row["threat"] == "T2"}
    assert kinds == {"none+prompt=calm": "exact", "leaky+prompt=calm": "exact"}
    assert {row["prompt"] for row in rows} == {"left?", "right?"}  # what the user asked


def test_unknown_prompts_are_found_before_a_folder_is_made(tmp_path: Path) -> None:
    config = replace(CONFIG, victim="toy", craft_victim="", defenses=("smooth+prompt=dout",))
    with pytest.raises(CodefendError, match="did you mean 'doubt'"):
        evaluate(config, tmp_path / "run", loaders=toys.loaders())
    assert not (tmp_path / "run").exists()


# The matrix as a report


def test_matrix_report_has_a_heat_map_with_denominators(matrix: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, _ = matrix
    cells, missing = read_matrix(folder)
    assert missing == 0
    hits = {(c.crafter, c.judge, c.defense): (c.success.hits, c.success.n) for c in cells}
    assert hits["toy", "box", "none"] == hits["toy", "toy", "none"] == (6, 6)
    assert hits["striped", "box", "none"] == hits["toy", "box", "smooth"] == (0, 6)
    svg = heat_map([cell for cell in cells if cell.defense == "none"])
    assert all(word in svg for word in ("evaluated on", "crafted on", "striped", "100%", "6/6", "0/6"))
    page = write_report(folder, tmp_path / "m.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2  # a heat map per defense
    assert "6/6 (100%)" in page
    assert "Unfinished" not in page
    text = (tmp_path / "m.md").read_text()
    assert "| toy | box | 6/6 (100%) |" in text


def test_matrix_report_on_a_terminal_and_as_rows(matrix: tuple[Path, list[Row]], tmp_path: Path) -> None:
    folder, rows = matrix
    console = Console(record=True, width=160, file=io.StringIO())
    print_summary(folder, console)
    assert "questions, defense none, 8/255" in console.export_text()
    lines = list(csv.DictReader(io.StringIO(export_rows(folder, tmp_path / "m.csv").read_text())))
    assert len(lines) == len(rows)
    assert {line["crafted_on"] for line in lines} == {"toy", "striped"}


def test_unfinished_matrix_says_so(matrix: tuple[Path, list[Row]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(matrix[0], copy)
    shutil.rmtree(copy / "striped--box")
    assert "Unfinished" in write_report(copy).read_text()
    for pair in copy.glob("*--*"):
        shutil.rmtree(pair)
    with pytest.raises(CodefendError, match="no results yet"):
        write_report(copy)
