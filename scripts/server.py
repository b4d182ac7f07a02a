"""Starts a ComfyUI server on a free loopback port, and surely stops it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests
import torch

from scripts.client import Client, ServerError
from scripts.environment import Host

START_SECONDS = 180.0
STOP_SECONDS = 10.0
LOG_TAIL_LINES = 40


@contextmanager
def running_server(
    host: Host, extra_args: Sequence[str] = (), log_path: Path | None = None, folder: Path | None = None
) -> Iterator[Client]:
    """Run a server for the length of a with block and give a client for it. It works in `folder`, or in ComfyUI's own.

    Several servers can run at once: each has its own port, temporary folder and in-memory database.
    """
    log_path = log_path or host.base / "user" / "server.log"
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="comfyui-") as temporary, log_path.open("wb") as log:
        process = _start([*_command(host, port, temporary), *extra_args], folder or host.comfyui, log)
        try:
            client = Client(f"http://127.0.0.1:{port}")
            _wait_until_answering(client, process, log_path)
            yield client
        finally:
            _stop(process)


def log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _command(host: Host, port: int, temporary: str) -> list[str]:
    command = [str(host.python), str(host.comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(host.base), "--temp-directory", temporary]
    command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
    return command if torch.accelerator.is_available() else [*command, "--cpu"]


def _start(command: list[str], folder: Path, log) -> subprocess.Popen:
    own_group = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        **own_group,
    )


def _wait_until_answering(client: Client, process: subprocess.Popen, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"The server ended with code {process.returncode}. Its log:\n{log_tail(log_path)}")
        try:
            client.get("/system_stats")
            return
        except requests.ConnectionError:
            time.sleep(0.25)
    raise ServerError(f"The server did not answer within {START_SECONDS:.0f} s. Its log:\n{log_tail(log_path)}")


def _stop(process: subprocess.Popen) -> None:
    _signal(process, force=False)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    _signal(process, force=True)
    process.wait()


def _signal(process: subprocess.Popen, force: bool) -> None:
    """Signal the whole process group, so that nothing that the server started is left."""
    if os.name == "nt":
        process.kill() if force else process.terminate()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)
    except ProcessLookupError:
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
