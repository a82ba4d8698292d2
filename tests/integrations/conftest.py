"""A real Ray cluster of one node, for all tests of a session."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Read by Ray when it is imported: a token for the clusters of this process, instead of one in the home folder.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_USAGE_DISABLED": "1"}
_PORTS = {  # name of the file that a node waits for -> option of `ray start`
    "metrics_agent_port": "dashboard-agent-grpc-port",
    "metrics_export_port": "metrics-export-port",
    "dashboard_agent_listen_port": "dashboard-agent-listen-port",
    "runtime_env_agent_port": "runtime-env-agent-port",
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster that this process is connected to.

    A node waits 15 s for its agents to write their ports into files, then ends; on a busy machine they need longer.
    Ports are chosen and written here.
    """
    import ray

    port, *others = _free_ports(1 + len(_PORTS))
    ports, node = dict(zip(_PORTS, others, strict=True)), secrets.token_hex(28)
    with tempfile.TemporaryDirectory(
        prefix="ray", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:  # paths of sockets are short
        process = _start(Path(folder), node, port, ports)
        try:
            log = Path(folder) / "log"
            _wait_for((Path(folder) / "session_latest").exists, process, log)
            for name, number in ports.items():
                ray._raylet.persist_port(str((Path(folder) / "session_latest").resolve()), node, name, number)
            _wait_for(lambda: "Ray runtime started" in log.read_text(), process, log)
            ray.init(address=f"127.0.0.1:{port}", logging_level="warning", log_to_driver=False)
            yield f"127.0.0.1:{port}"
            ray.shutdown()
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # workers end with their node; asked to end, it takes half a minute
            process.wait()


def _start(folder: Path, node: str, port: int, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--include-dashboard=false", "--num-cpus=4"]
    command += ["--disable-usage-stats", "--include-log-monitor=false", f"--object-store-memory={100 << 20}"]
    command += [f"--{_PORTS[name]}={number}" for name, number in ports.items()]
    patience = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node, "RAY_raylet_start_wait_time_s": "120"}
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # with the folders that pytest has added
    env = {**os.environ, **patience, **path}
    with (folder / "log").open("wb") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1800):
        if condition():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())
