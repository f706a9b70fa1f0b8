# SPDX-License-Identifier: Apache-2.0
"""Namespaces, each held open by one process: end it, and they are gone.

Nothing is mounted and no interface is made outside of them, so nothing but the
process has to be found again after a crash.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sandbox import errors, process

INIT = Path(__file__).with_name("init.py")
PYTHON = "/usr/bin/python3"
START_TIMEOUT = 15.0
PROGRAMS = (
    "ip",
    "mount",
    "nsenter",
    "setpriv",
    "unshare",
    "libvirtd",
    "virtlogd",
    "virsh",
    "qemu-system-x86_64",
)


class Namespace:
    """A set of namespaces with its first process.

    Arguments:
      directory: where record, specification and log of the first process lie.
      kinds: namespaces it has of its own, as unshare's long options name them
        (mount, net, uts, pid).

    Not safe for use by several threads at once.
    """

    def __init__(self, directory: Path, kinds: Sequence[str]) -> None:
        self.directory = directory
        self._kinds = list(kinds)
        self._record = directory / "init.json"

    @property
    def pid(self) -> int:
        """The first process's pid. Raises SandboxError when it does not run."""
        record = process.Record.load(self._record)
        if record is None or not record.is_alive():
            raise errors.SandboxError(f"{self.directory.name} is not up")
        return record.pid

    def is_up(self) -> bool:
        """Return whether the first process runs."""
        record = process.Record.load(self._record)
        return record is not None and record.is_alive()

    def start(
        self,
        mounts: Sequence[Sequence[str]],
        *,
        hostname: str | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        """Start the first process and wait until its mounts are made.

        Arguments:
          mounts: arguments for mount, one list per call.
          hostname: needs the namespace uts.
          inside: a command that leads into the namespaces to start from.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._record.unlink(missing_ok=True)
        spec = self.directory / "init-spec.json"
        spec.write_text(
            json.dumps(
                {
                    "record": str(self._record),
                    "hostname": hostname,
                    "mounts": [list(arguments) for arguments in mounts],
                }
            )
        )
        options = [f"--{kind}" for kind in self._kinds]
        if "pid" in self._kinds:
            options.append("--fork")
        unshare = ["unshare", "--propagation", "slave", *options]
        init = [PYTHON, "-I", "-S", str(INIT), str(spec)]
        self._launch(["setsid", "--fork", *inside, *unshare, "--", *init])

    def stop(self) -> None:
        """End everything in the namespaces."""
        record = process.Record.load(self._record)
        if record is not None:
            process.end([record])
        self._record.unlink(missing_ok=True)

    def enter(self, *kinds: str) -> list[str]:
        """Return a command that runs another one in the namespaces.

        Arguments:
          kinds: those to enter; without any, all that are held here.
        """
        options = [f"--{kind}" for kind in kinds or self._kinds]
        return ["nsenter", "--target", str(self.pid), *options, "--"]

    # Private

    def _launch(self, argv: Sequence[str]) -> None:
        log = self.directory / "init.log"
        with log.open("w") as output:
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output
            )
        assert child.stdout is not None
        with child.stdout as answer:
            text = read_line(answer.fileno(), START_TIMEOUT)
        child.wait(START_TIMEOUT)
        if text.strip() != b"ready":
            self.stop()
            raise errors.SandboxError(
                f"{self.directory.name} did not start: {log.read_text().strip()}"
            )


def read_line(fd: int, timeout: float) -> bytes:
    """Return what arrives in one piece, or nothing after timeout seconds."""
    readable, _, _ = select.select([fd], [], [], timeout)
    return os.read(fd, 100) if readable else b""


def check_machine() -> None:
    """Raise SandboxError, saying what is missing, where no sandbox can be."""
    if os.geteuid() != 0:
        raise errors.SandboxError(
            "the sandbox needs root (network and mount namespaces): run it by sudo"
        )
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise errors.SandboxError(
            f"these programs are missing: {', '.join(missing)}; run `make setup`"
        )
    kinds = ["--mount", "--net", "--pid", "--uts", "--fork"]
    test = process.run(["unshare", *kinds, "--", "true"], check=False)
    if test.returncode != 0:
        raise errors.SandboxError(
            "this machine lets root make no mount, network and PID namespaces "
            f"({test.stderr.strip()}); in a container, start it privileged"
        )
