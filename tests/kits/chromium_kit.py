"""Headless Chromium over its debugging pipe (the DevTools protocol, a JSON message and a null byte at a time)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
)


class Browser:
    """One tab. ``folder`` is its empty profile; `events` are the messages of the browser between answers."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        from_us, self._out = os.pipe()
        self._in, to_us = os.pipe()
        # The protocol reads file 3 and writes file 4: a shell can put them there, whatever their numbers are here.
        pipes = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        command = ["bash", "-c", pipes, CHROMIUM, *_FLAGS.split(), f"--user-data-dir={folder}"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(from_us, to_us), stdout=quiet, stderr=quiet)
        os.close(from_us)
        os.close(to_us)
        self._count, self._buffer, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            assert data, "the browser is gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"waited too long for {condition}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState == 'complete' && location.href.startsWith('{url}')")

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def choose(self, selector: str, file: Path) -> None:
        """Give a file to an ``<input type=file>``."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def problems(self) -> list[Any]:
        """Errors of scripts and of the content policy so far, without requests that the gateway refused."""
        problems = [event["params"] for event in self.events if event.get("method") in _PROBLEMS]
        return [p for p in problems if p.get("entry", {}).get("source") != "network"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


_PROBLEMS = ("Log.entryAdded", "Runtime.exceptionThrown")
