# SPDX-License-Identifier: Apache-2.0
"""What runs a guest, told by the kernel: of real processes, that run no guest."""

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtmigrate import emulator
from virtmigrate.emulator import Emulator


@contextlib.contextmanager
def process(program: Path, guest: str) -> Iterator[Path]:
    """A process that has a guest's UUID on its command line; its entry in /proc."""
    waiting = "import sys; print(1, flush=True); sys.stdin.read()"
    argv = [str(program), "-S", "-c", waiting, "-uuid", guest]
    env = {**os.environ, "PYTHONHOME": sys.base_prefix}
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=env) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"1\n"
        yield Path(f"/proc/{child.pid}")
        child.stdin.close()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    copy = tmp_path / "qemu"
    shutil.copy(Path(sys.executable).resolve(), copy)
    return copy


def test_found_by_its_uuid(program: Path) -> None:
    guest = str(uuid.uuid4())
    with process(program, guest):
        assert emulator.running()[guest] == Emulator(version="", replaced=False)
    assert guest not in emulator.running()


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_another_program_in_its_place(program: Path, how: str) -> None:
    guest = str(uuid.uuid4())
    with process(program, guest):
        program.unlink()
        if how == "replaced":
            program.write_bytes(b"another one")
        assert emulator.running()[guest].replaced


def test_its_version_is_what_it_says(tmp_path: Path) -> None:
    """The kernel runs what /proc/PID/exe is; a script is enough to see what is read."""
    script = tmp_path / "exe"
    script.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian 1:7.2)'\n")
    script.chmod(0o755)
    assert emulator._version(script) == "7.2.22"
    script.write_text("#!/bin/sh\nexit 1\n")
    assert emulator._version(script) == ""


@pytest.mark.parametrize(
    "version, replaced, older",
    [
        ("7.2.9", False, True),
        ("7.2.22", False, False),
        ("10.0.0", False, False),
        ("7.2.22", True, True),
        ("", False, False),
    ],
)
def test_is_older(version: str, replaced: bool, older: bool) -> None:
    assert emulator.is_older(Emulator(version, replaced), "7.2.22") == older
