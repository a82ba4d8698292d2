"""Blocks of README and docs: untitled Python runs unchanged, commands are valid. `test_docs_run` runs the rest."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import typer
from PIL import Image

from codefend.attacks import ATTACKS
from codefend.cli import app, main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(codefend [^`]+)`")


def shell_blocks(text: str) -> list[str]:
    return [block for language, block in FENCE.findall(text) if language in ("", "bash", "sh", "console")]


def commands(text: str) -> list[str]:
    """The ``codefend`` commands in the shell blocks of a page, without comments."""
    blocks = "\n".join(shell_blocks(text)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in blocks.splitlines()]
    parts = [part for line in lines for part in shlex.join(shlex.split(line, comments=True)).split(" '&&' ")]
    return list(dict.fromkeys(part for part in parts if part.startswith("codefend ")))


GENERATED = ("figures.md", "cli.md", "configuration.md")
TEXTS = {  # the notebook is history, the others are generated
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in PAGES
    if not {"notebook", "notebooks"} & set(page.parts) and page.name not in GENERATED
}
COMMANDS = [pytest.param(command, id=f"{page}-{command}") for page, text in TEXTS.items() for command in commands(text)]
INLINES = {command for text in TEXTS.values() for command in INLINE.findall(text)}
MENTIONS = sorted(text for text in INLINES if re.match("codefend [a-z]", text))  # of a verb; may be incomplete
CHEAP = [  # of the commands above: they run, too
    "codefend purify photo.png -o clean.png",
    "codefend list purifiers",
    "codefend list attacks",
]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    Image.fromarray(np.full((32, 40, 3), 90, np.uint8)).save("photo.png")
    with patch.dict(ATTACKS):  # a page adds one
        exec(compile(code, "block", "exec"), {"__name__": "block"})


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    Image.fromarray(np.full((32, 40, 3), 90, np.uint8)).save("photo.png")
    for name in ("photos", "runs/quick", "runs/bridge/weights", "runs/own-bridge/weights", "my/weights"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def find_verb(words: list[str]) -> tuple[str, Any, list[str]]:
    """The verb that ``words`` begin with, as name and command, and the rest of them."""
    name, command, rest = "codefend", typer.main.get_command(app), words
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"there is no verb {rest[0]}"
        name, command, rest = rest[0], command.commands[rest[0]], rest[1:]
    return name, command, rest


def parse(words: list[str]) -> None:
    """Parse ``words`` as the program does, without running the verb. Raises its usage errors."""
    name, command, rest = find_verb(words)
    with command.make_context(name, rest):
        pass


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    parse(words)
    if words[0] in ("eval", "pairs", "train", "optimize-prompt"):  # settings, beyond options
        assert main([*words, "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("mention", MENTIONS)
def test_commands_in_sentences_have_these_verbs_and_options(mention: str) -> None:
    words = [word for word in shlex.split(mention)[1:] if word != "--help"]
    _, command, rest = find_verb(words)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if command.name != "serve":  # it hands its options on
        assert {word for word in rest if re.fullmatch(r"--[a-z].*|-[a-z]", word)} <= options


def test_every_extra_has_a_row() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = TEXTS["docs/install.md"]
    assert [name for name in project["optional-dependencies"] if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("command", CHEAP)
def test_cheap_commands_run(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert any(command == value for parameter in COMMANDS for value in parameter.values), "no page shows it"
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


def test_a_wrong_option_or_verb_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(shlex.split("purify photo.png --target-folder clean"))
    with pytest.raises(AssertionError, match="no verb"):
        parse(["purified"])
    assert commands("```\ncodefend eval quick --run a && codefend report a  # tables\n```") == [
        "codefend eval quick --run a",
        "codefend report a",
    ]
