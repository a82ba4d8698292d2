"""Shell blocks and scripts of README and docs, run as their reader runs them: page by page, with small limits."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codefend.cli import main
from codefend.core.assets import asset

ROOT = Path(__file__).parent.parent
PAGES = [  # without generated ones and history
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.name != "figures.md" and not {"notebook", "notebooks", "reference"} & set(path.parts)
]
BLOCK = re.compile(r'^ *```(\w*)(?: title="([^"]*)")?[^\n]*\n(.*?)^ *```$', re.DOTALL | re.MULTILINE)
SHELL = ("", "bash", "sh", "console")

ELSEWHERE = {  # in a line -> why it does not run here
    "git clone": "this is the clone",
    "make demo": "CI runs it",
    "source .venv": "the environment of the tests",
    "pip install": "tests/test_packages.py",
    "-m build": "tests/test_packages.py",
    "s3://": "an object store; tests/purifiers have a file system in memory",
    "ray://": "a cluster; tests/integrations start one on this machine",
    "serve run": "Ray Serve; tests/integrations start it",
    "export CODEFEND": "for Ray Serve",
    "docker ": "no daemon; tests/test_deploy.py reads the Dockerfile",
    "kubectl ": "no cluster; tests/test_deploy.py checks the manifests",
    "--from-literal": "continues kubectl",
    "curl ": "asks a server; tests/gateway",
    "vllm serve": "vLLM is not installed",
    "-m lmms_eval": "lmms-eval is not installed",
    "mcp-proxy": "starts others' servers; tests/integrations have one",
}
SCRIPTS_ELSEWHERE = {
    "purify_dataset.py": "datasets is not installed",
    "serve_gateway.py": "Ray Serve; tests/integrations start it",
}
_EVAL = "--limit 1 --set tasks=vqa --set steps=1 --set eot=1 --set panels=0 --set resubmissions=1 --set attacks"
_SCENES = "--set natural.canvases=2 --set natural.cache= --set steps=1 --set warmup=1"
_BRIDGE = "--set steps=1 --set batch=2 --set warmup=1 --set mined=0"
SMALL = {  # how a command begins -> what makes it short; the longest beginning counts
    "codefend attack": "--steps 1",
    "codefend certify": "--limit 1 --set samples=20 --set selection=10 --set defenses=bridge:sigma=0.15",
    "codefend challenge write": "--set limit=1",
    "codefend eval": f"{_EVAL}=feature",
    "codefend eval outside": f"{_EVAL}=feature,foolbox-pgd --set defenses=none,bridge",
    "codefend eval standard": f"{_EVAL}=feature --set defenses=none,bridge",
    "codefend pairs": "--set count=32 --set shard=16 --set steps=1",
    "codefend calibrate": "--set clean=20 --set rate=0.2",
    "codefend train bridge": _BRIDGE,
    "codefend train own-bridge": _BRIDGE,
    "codefend train encoder": f"{_SCENES} --set images=16 --set batch=4",
    "codefend train robust": f"{_SCENES} --set sides=64 --set batches=2 --set shares=1 --set words_batch=1",
    "codefend train pocket": "--set grounding_scenes=8 --set grounding_shapes=8 --set grounding_epochs=9 --set steps=1",
    "codefend train prior": "--set steps=1 --set batch=2 --set warmup=1",
    "codefend train smolvlm-pocket": "--set scenes=8 --set shapes=8 --set distill_steps=1 --set steps=1 --set warmup=1",
}
PLACES = {  # what a reader fills in
    "hf:ID_OR_FOLDER": "hf:checkpoint",
    "--upstream URL": "--upstream http://localhost:8000/v1",
    "s3://bucket/in/": "tables",
    "s3://bucket/clean/": "purified-tables",
    "eps=8 / 255)": "eps=8 / 255, steps=1)",
    "eps=8 / 255, eot=4)": "eps=8 / 255, steps=1, eot=1)",
    "steps=40, eot=4)": "steps=1, eot=1)",
}


def fill_in(text: str) -> str:
    for place, value in PLACES.items():
        text = text.replace(place, value)
    return text


def commands(block: str) -> Iterator[tuple[str, str]]:
    """The lines of a shell block as (command, output shown below it, empty where the block shows none)."""
    if block.lstrip().startswith("$ "):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output.strip()
    else:
        for line in block.replace("\\\n", " ").splitlines():
            if command := re.sub(r"(^| +)#.*", "", line).strip():
                yield command, ""


def listed(command: str) -> bool:
    return any(word in command for word in ELSEWHERE)


def shorten(command: str) -> str:
    beginnings = [beginning for beginning in SMALL if command.startswith(beginning)]
    return f"{fill_in(command)} {SMALL[max(beginnings, key=len)] if beginnings else ''}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    for name in ("docs", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(asset("weights/bridge"), tmp_path / "my" / "weights")
    scene = ROOT / "docs" / "assets" / "scene.png"
    for name in ("photo.png", "page.png", "photos/a.png", "photos/inner/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scene, tmp_path / name)
    Image.open(scene).convert("RGB").save("more.jpg")
    Image.open(scene).resize((448, 448)).save("large.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)).save("hidden-224.png")
    (tmp_path / "shards").mkdir()
    with tarfile.open("shards/0.tar", "w") as archive:
        archive.add("photo.png")
    write_table(tmp_path / "data.parquet", scene.read_bytes())
    write_table(tmp_path / "tables" / "0.parquet", scene.read_bytes())
    return tmp_path


def write_table(path: Path, image: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": [{"bytes": image, "path": "a.png"}]}), path)


@contextmanager
def server(command: str) -> Iterator[str]:
    """Run ``codefend serve`` in a process on a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "codefend.cli", *shlex.split(command)[1:], "--port", str(port), "--workers", "1"]
    secret = "the same noise in every run of the tests"
    process = subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "CODEFEND_NOISE_SECRET": secret}
    )
    try:
        end = time.monotonic() + 600
        while not ready(port):
            assert process.poll() is None, "the server has stopped"
            assert time.monotonic() < end, "the server does not get ready"
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
            return True
    except OSError:
        return False


def run_script(name: str, code: str) -> str:
    """Run a script of a page in its own process and return what it prints."""
    Path(name).write_text(fill_in(code), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, name], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start_without_serving(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build the gateway that ``command`` serves, up to the moment when it would answer."""
    import codefend.gateway.serve as module

    words = shlex.split(fill_in(command))
    start = words.index("codefend")

    def stop(server: object, **_: object) -> None:
        vars(server)["started"] = True

    with monkeypatch.context() as patch:
        patch.setattr(module._Server, "run", stop)
        patch.setattr(module, "_listen", lambda host, port: socket.create_server((host, 0)))
        patch.setattr(module, "configure_logging", lambda level: None)
        for name, _, value in (word.partition("=") for word in words[:start]):
            patch.setenv(name, value)
        assert main(words[start + 1 :]) == 0


def run_command(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    code = main(shlex.split(command)[1:])
    output, messages = capsys.readouterr()
    measured = "--max-asr" in command  # exits with 1 above the rate
    assert code == 0 or (measured and code == 1), f"{command}: {messages}"
    return output


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text(encoding="utf-8")
    if "hf:ID_OR_FOLDER" in text:
        run_command("codefend build-victim smolvlm-pocket -o checkpoint", capsys)
    for language, title, code in BLOCK.findall(text):
        if language == "python" and title == "client.py" and ":8800" in code:
            clean = run_command("codefend ask docs/assets/scene.png 'Describe the image.'", capsys)
            with server("codefend serve --upstream pocket") as address:
                assert run_script(title, code.replace("127.0.0.1:8800", address)) == clean
        elif language == "python" and title and title not in SCRIPTS_ELSEWHERE:
            run_script(title, code)
        elif language in SHELL:
            for command, shown in commands(code):
                run_line(command, shown, monkeypatch, capsys)


def run_line(command: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if listed(command):
        return
    if "codefend serve" in command:
        start_without_serving(command, monkeypatch)
        return
    output = run_command(shorten(command), capsys)
    assert not shown or output.strip() == shown


def test_every_command_runs_or_is_listed_with_the_reason() -> None:
    blocks = [block for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
    lines = [command for language, _, code in blocks if language in SHELL for command, _ in commands(code)]
    assert [line for line in lines if not re.match(r"(\w+=\S+ +)*codefend ", line) and not listed(line)] == []
    assert [word for word in ELSEWHERE if not any(word in line for line in lines)] == []
    assert {title for _, title, _ in blocks} >= SCRIPTS_ELSEWHERE.keys()


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_commands_and_scripts_of_a_page_run(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(page, monkeypatch, capsys)
