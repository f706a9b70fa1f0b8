# SPDX-License-Identifier: Apache-2.0
"""An etcd of one member on the loopback, for locks. It ends with whoever started it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0


class Etcd:
    """One that runs."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self.url = f"etcd3+http://127.0.0.1:{port}"

    def freeze(self) -> None:
        """Let it answer nobody."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Etcd]:
    """Yield one whose data lies in a directory."""
    clients, peers = (_free_port() for _ in range(2))
    argv = ["etcd", "--data-dir", str(directory / "data"), "--log-level", "error"]
    for what, port in (("client", clients), ("peer", peers)):
        argv += [f"--listen-{what}-urls", f"http://127.0.0.1:{port}"]
    argv += ["--advertise-client-urls", f"http://127.0.0.1:{clients}"]
    argv += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{peers}"]
    argv += ["--initial-cluster", f"default=http://127.0.0.1:{peers}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            _wait(process, f"http://127.0.0.1:{clients}/health", directory / "log")
            yield Etcd(process, clients)
        finally:
            process.kill()
            process.wait(STOP_TIMEOUT)


# Private


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.1)
    raise RuntimeError(f"etcd does not answer: {log.read_text()}")
