"""The black-box victim against a real server on this machine: requests, cache and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from codefend import victims
from codefend.core import images
from codefend.types import CodefendError, WhiteBox
from codefend.victims import openai as endpoint
from codefend.victims.answers import ResponseCache

Reply = tuple[int, dict[str, Any]]


class Server:
    """Answers the mean grey level of the image; ``script`` are replies to give first."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.script: list[Callable[[dict[str, Any]], Reply | None]] = []
        self.busy = self.most_busy = 0
        self.hold = 0.0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.requests.append(body)
                    outer.keys.append(self.headers["authorization"])
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                    turn = outer.script.pop(0) if outer.script else None
                time.sleep(outer.hold)
                status, reply = (turn(body) if turn else None) or (200, outer.answer(body))
                with lock:
                    outer.busy -= 1
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                if status in (429, 503):
                    self.send_header("retry-after-ms", "5")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        parts = {part["type"]: part for part in body["messages"][0]["content"]}
        grey = float(images.load(parts["image_url"]["image_url"]["url"]).pixels.mean()) * 255
        return completion(f"{parts['text']['text']} {grey:.0f}")


def completion(text: str | None, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def refusal(status: int, message: str) -> Callable[[dict[str, Any]], Reply]:
    return lambda body: (status, {"error": {"message": message, "type": "error"}})


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def ask(server: Server, tmp_path: Path) -> Callable[..., endpoint.OpenAIVictim]:
    def load(options: str = "", model: str = "llava:7b") -> endpoint.OpenAIVictim:
        return endpoint.OpenAIVictim(f"openai:{server.url}#{model}?cache={tmp_path / 'a.sqlite'}{options}")

    return load


def grey(*levels: int) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 4), level / 255) for level in levels])


Ask = Callable[..., endpoint.OpenAIVictim]


def test_images_are_sent_without_loss_and_answers_keep_their_order(server: Server, ask: Ask) -> None:
    levels = [7, 250, 31, 32, 33, 99]
    assert ask().generate(grey(*levels), ["grey?"] * 6) == [f"grey? {level}" for level in levels]
    body = server.requests[0]
    assert body["model"] == "llava:7b"
    assert (body["temperature"], body["max_tokens"]) == (0, 128)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_it_is_a_black_box_whose_name_holds_no_options(
    ask: Ask, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEFEND_CACHE", str(tmp_path))
    victim = ask()
    assert victim.name == f"openai:{server.url}#llava:7b"
    assert not isinstance(victim, WhiteBox)
    with pytest.raises(CodefendError, match="only answers text"):
        victims.load_white_box(victim.name)


def test_repeated_questions_are_answered_from_the_cache(server: Server, ask: Ask) -> None:
    first = ask().generate(grey(1, 2, 1), ["a", "a", "b"])
    assert ask().generate(grey(1, 2, 1), ["a", "a", "b"]) == first  # another victim on the same file
    assert len(server.requests) == 3
    ask(model="other").generate(grey(1), ["a"])
    ask("&max_tokens=5").generate(grey(1), ["a"])
    ask().generate(grey(3), ["a"])
    assert len(server.requests) == 6


def test_requests_to_busy_and_failing_servers_are_retried(server: Server, ask: Ask) -> None:
    server.script = [refusal(429, "slow down"), refusal(503, "starting"), refusal(429, "slow down")]
    assert ask("&concurrency=1").generate(grey(9), ["a"]) == ["a 9"]
    assert len(server.requests) == 4


def test_answers_before_an_error_are_cached(server: Server, ask: Ask) -> None:
    fine: Callable[[dict[str, Any]], Reply | None] = lambda body: None  # noqa: E731
    server.script = [fine, fine, refusal(429, "quota")]
    with pytest.raises(CodefendError, match=r"too many requests.*rerun the command"):
        ask("&concurrency=1&retries=0").generate(grey(1, 2, 3, 4), ["a"] * 4)
    count = len(server.requests)
    assert count == 3  # pending requests are not sent
    assert ask().generate(grey(1, 2, 3, 4), ["a"] * 4) == ["a 1", "a 2", "a 3", "a 4"]
    assert len(server.requests) == count + 2


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refused the key; set OPENAI_API_KEY"),
        (403, "refused the key"),
        (404, "knows no model 'llava:7b'"),
        (400, "no images please"),
        (500, "failed: .*no images please"),
    ],
)
def test_errors_name_the_remedy(server: Server, ask: Ask, status: int, words: str) -> None:
    server.script = [refusal(status, "no images please")]
    with pytest.raises(CodefendError, match=words):
        ask("&retries=0").generate(grey(1), ["a"])
    assert len(server.requests) == 1


def test_an_unreachable_or_slow_endpoint_is_an_error(server: Server, ask: Ask, tmp_path: Path) -> None:
    gone = endpoint.OpenAIVictim(f"openai:http://127.0.0.1:9/v1#m?retries=0&cache={tmp_path / 'b.sqlite'}")
    with pytest.raises(CodefendError, match=r"cannot reach http://127.0.0.1:9/v1 .*is it running"):
        gone.generate(grey(1), ["a"])
    server.hold = 1.5
    with pytest.raises(CodefendError, match=r"did not answer within 1 s; raise \?timeout="):
        ask("&timeout=1&retries=0").generate(grey(1), ["a"])


def test_a_reply_that_is_not_a_chat_completion_is_an_error(server: Server, ask: Ask) -> None:
    server.script = [lambda body: (200, {"hello": "world"})]
    with pytest.raises(CodefendError, match="did not answer with a chat completion"):
        ask("&retries=0").generate(grey(1), ["a"])


def test_empty_answers_and_refusals_are_answers(server: Server, ask: Ask) -> None:
    server.script = [lambda body: (200, completion(None)), lambda body: (200, completion(None, refusal="I won't."))]
    assert ask("&concurrency=1").generate(grey(1, 2), ["a", "a"]) == ["", "I won't."]


def test_parameters_are_adapted_to_the_model(server: Server, ask: Ask) -> None:
    def picky(body: dict[str, Any]) -> Reply | None:
        if "max_tokens" in body:
            return refusal(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")(body)
        if "temperature" in body:
            return refusal(400, "'temperature' does not support 0 with this model.")(body)
        return None

    server.script = [picky] * 4
    assert ask("&concurrency=1").generate(grey(1, 2), ["a", "a"]) == ["a 1", "a 2"]
    assert len(server.requests) == 4  # learnt once
    assert server.requests[-1]["max_completion_tokens"] == 128
    assert "temperature" not in server.requests[-1]


def test_concurrency_and_rate_are_limited(server: Server, ask: Ask) -> None:
    server.hold = 0.05
    ask("&concurrency=3").generate(grey(*range(9)), ["a"] * 9)
    assert server.most_busy == 3
    server.hold = 0.0
    start = time.monotonic()
    ask("&rpm=600&concurrency=8").generate(grey(*range(20, 25)), ["a"] * 5)
    assert time.monotonic() - start >= 0.4  # five requests, one every tenth of a second


def test_retries_count_for_the_rate(server: Server, ask: Ask) -> None:
    server.script = [refusal(429, "slow down")] * 4
    start = time.monotonic()
    ask("&rpm=600&concurrency=1").generate(grey(1), ["a"])
    assert time.monotonic() - start >= 0.4


def test_the_key_comes_from_the_environment(server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "first")
    monkeypatch.setenv("MY_KEY", "second")
    ask().generate(grey(1), ["a"])
    ask("&key=MY_KEY").generate(grey(2), ["a"])
    monkeypatch.delenv("OPENAI_API_KEY")
    ask().generate(grey(3), ["a"])
    assert server.keys == ["Bearer first", "Bearer second", "Bearer none"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("openai:", "names no endpoint"),
        ("openai:http://host/v1", "names no endpoint"),
        ("openai:host/v1#m", "names no endpoint"),
        ("openai:http://me:secret@host/v1#m", "keep the key out"),
        ("openai:http://host/v1#m?rmp=3", "did you mean 'rpm'"),
        ("openai:http://host/v1#m?retries=many", "whole number"),
        ("openai:http://host/v1#m?concurrency=0", "concurrency=0 is too small"),
    ],
)
def test_malformed_specs_are_errors(name: str, words: str) -> None:
    with pytest.raises(CodefendError, match=words) as caught:
        victims.load(name)
    assert "secret" not in str(caught.value)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(CodefendError, match=r"pip install 'codefend\[api\]'"):
        victims.load("openai:http://host/v1#m")


# The cache


def test_cache_survives_a_kill(tmp_path: Path) -> None:
    code = """
import os, pathlib, signal, sys
from codefend.victims.answers import ResponseCache
cache = ResponseCache(pathlib.Path(sys.argv[1]))
for i in range(20):
    cache.put(str(i), f"answer {i}")
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "a.sqlite"
    died = subprocess.run([sys.executable, "-c", code, str(path)], env=dict(os.environ))
    assert died.returncode == -signal.SIGKILL
    assert [ResponseCache(path).get(str(i)) for i in range(21)] == [*(f"answer {i}" for i in range(20)), None]


def test_an_unusable_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.sqlite").write_bytes(b"this is no database, and long enough not to pass for one" * 20)
    with pytest.raises(CodefendError, match="cannot use the answer cache"):
        ResponseCache(tmp_path / "no.sqlite")
    with pytest.raises(CodefendError, match="cannot use the answer cache"):
        ResponseCache(tmp_path / "no.sqlite" / "a.sqlite")
    path = tmp_path / "a.sqlite"
    cache = ResponseCache(path)
    for number in range(2000):
        cache.put(str(number), "x" * 50)
    cache._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    cache._db.close()
    content = bytearray(path.read_bytes())
    content[8192:] = b"?" * (len(content) - 8192)  # the header is whole, so that the file opens
    path.write_bytes(content)
    with pytest.raises(CodefendError, match="cannot read the answer cache"):
        ResponseCache(path).get("1")
