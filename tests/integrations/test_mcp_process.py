"""``codefend mcp-proxy`` as a desktop client starts it: a process of its own, with workers in others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from mcp import Client, MCPError, StdioServerParameters, stdio_client

from codefend.integrations import mcp as proxy
from gateway_kit import b64, png, run
from mcp_kit import SERVER, Script, Wire, engine

COMMAND = [sys.executable, "-c", "import sys; from codefend.cli import main; sys.exit(main())", "mcp-proxy"]
A = png(1, height=64, width=64)


def environment(folder: Path) -> dict[str, str]:
    (folder / "a.png").write_bytes(A)
    return os.environ | {
        "MCP_TEST_IMAGE": str(folder / "a.png"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }


def processes(word: str) -> list[psutil.Process]:
    """The processes below this one whose command line holds ``word``."""
    below = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [process for process in below if any(word in argument for argument in process.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_desktop_client_gets_purified_images_or_errors_whatever_dies(tmp_path: Path) -> None:
    async def work() -> None:
        arguments = [*COMMAND[1:], "--purifier", "blur", "--", *SERVER]
        parameters = StdioServerParameters(command=COMMAND[0], args=arguments, env=environment(tmp_path))
        async with Client(stdio_client(parameters), mode="legacy") as client:
            for _ in range(2):
                shot = await client.call_tool("screenshot", {})
                assert shot.content[0].text == "a page"  # type: ignore[union-attr]
                assert shot.content[1].data != b64(A)  # type: ignore[union-attr]
            workers = [process for process in processes("multiprocessing") if "tracker" not in str(process.cmdline())]
            assert workers
            for process in workers:
                process.send_signal(signal.SIGKILL)
            (tmp_path / "a.png").write_bytes(png(2, height=64, width=64))  # not in the cache
            with contextlib.suppress(MCPError):  # an error, or a purified image from a worker started anew
                shot = await client.call_tool("screenshot", {})
                assert shot.content[1].data != b64(png(2, height=64, width=64))  # type: ignore[union-attr]
            assert (await client.call_tool("echo", {"text": "on"})).structured_content == {"result": "on"}
            with pytest.raises(MCPError, match="has ended"):
                await client.call_tool("leave", {})
        await asyncio.sleep(1)
        assert not processes("mcp_server.py")

    run(work(), 200)


def test_a_client_that_closes_does_not_wait_for_workers_that_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started, wire = engine(), Wire()
    wire.queue.put_nowait(b"")
    wait = threading.Event()
    monkeypatch.setattr(started.worker, "warm_up", wait.wait)
    monkeypatch.setattr(proxy, "StandardStreams", lambda max_bytes: wire)
    serving = threading.Thread(target=lambda: asyncio.run(proxy._serve(started, Script(), 1 << 20, "refuse")))
    serving.start()
    serving.join(10)
    ended = not serving.is_alive()
    wait.set()
    assert ended


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_process_ends_by_itself_soon_after_an_official_client_has_closed_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp.client.stdio.PROCESS_TERMINATION_TIMEOUT", 60)  # when the client would kill it

    async def work() -> float:
        arguments = [*COMMAND[1:], "--", *SERVER]
        parameters = StdioServerParameters(command=COMMAND[0], args=arguments, env=environment(tmp_path))
        async with Client(stdio_client(parameters), mode="legacy") as client:
            await client.list_tools()  # answered while the workers start
            closed = time.monotonic()
        return time.monotonic() - closed

    assert run(work(), 200) < 10
    assert not processes("mcp_server.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give the server's command after --, or --url"),
        (["--url", "http://x", "--", "y"], "give the server's command after --, or --url"),
        (["--url", "localhost:3000"], "--url is the http(s) address"),
        (["--purifier", "brigde", "--", "y"], "did you mean 'bridge'"),
        (["--purifier", "blur", "--policy", "block", "--", "y"], "policy block needs a threshold"),
        (["--purifier", "blur", "--", "no-such-command"], "cannot run 'no-such-command'"),
    ],
)
def test_a_wrong_start_is_one_line_and_exit_code_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        COMMAND + arguments,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
