# SPDX-License-Identifier: Apache-2.0
"""Asking the guest agent of a machine, over its UNIX socket."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sandbox import errors

POLL_INTERVAL = 0.03
ANSWER_TIMEOUT = 10.0
START = b"\xff"  # after which the agent forgets what came before


class Agent:
    """A guest agent. It answers one caller at a time; others wait."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def wait(self, timeout: float) -> None:
        """Wait until it answers. Raises SandboxError after timeout seconds."""
        with self._session(time.monotonic() + timeout):
            pass

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and return it with its output.

        One that takes longer than timeout seconds is killed.
        """
        deadline = time.monotonic() + timeout
        with self._session(deadline) as session:
            arguments = {
                "path": argv[0],
                "arg": list(argv[1:]),
                "capture-output": True,
                "input-data": base64.b64encode(stdin.encode()).decode(),
            }
            pid = session.call("guest-exec", arguments)["pid"]
            status = session.call("guest-exec-status", {"pid": pid})
            while not status["exited"]:
                if time.monotonic() > deadline:
                    kill = {"path": "kill", "arg": ["-KILL", str(pid)]}
                    session.call("guest-exec", kill)
                    raise errors.SandboxError(
                        f"no end after {timeout} s: {' '.join(argv)}"
                    )
                time.sleep(POLL_INTERVAL)
                status = session.call("guest-exec-status", {"pid": pid})
        code = status.get("exitcode", -status.get("signal", 0))
        texts = [text(status.get(f"{name}-data", "")) for name in ("out", "err")]
        return subprocess.CompletedProcess(list(argv), code, *texts)

    @contextlib.contextmanager
    def _session(self, deadline: float) -> Iterator[Session]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(max(deadline - time.monotonic(), 0.1))
            try:
                connection.connect(os.fspath(self._path))
                session = Session(connection)
                session.synchronize()
                connection.settimeout(ANSWER_TIMEOUT)
                yield session
            except OSError as error:
                raise errors.SandboxError(
                    f"no answer from the agent at {self._path}: {error}"
                ) from error


class Session:
    """One connection to the agent."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""

    def synchronize(self) -> None:
        """Pass over what an earlier caller left unread."""
        number = random.getrandbits(31)
        self._send("guest-sync-delimited", {"id": number}, START)
        while json_or_none(self._line()) != {"return": number}:
            pass

    def call(self, command: str, arguments: dict[str, Any]) -> Any:
        """Return the agent's answer. Raises SandboxError when it is an error."""
        self._send(command, arguments)
        answer = json.loads(self._line())
        if "error" in answer:
            raise errors.SandboxError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def _send(
        self, command: str, arguments: dict[str, Any], before: bytes = b""
    ) -> None:
        message = {"execute": command, "arguments": arguments}
        self._socket.sendall(before + json.dumps(message).encode() + b"\n")

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionResetError("it hung up")
            self._rest += received
        line, _, self._rest = self._rest.partition(b"\n")
        return line.rpartition(START)[2]


def json_or_none(line: bytes) -> Any:
    """Return a value, None when the line is no JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def text(encoded: str) -> str:
    """Return output as the agent encodes it."""
    return base64.b64decode(encoded).decode(errors="replace")
