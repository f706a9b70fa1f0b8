# SPDX-License-Identifier: Apache-2.0
"""What reads images has limits, ends, and says no more than it may."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from oslo_concurrency import processutils

from virtmigrate import door, errors
from virtmigrate.door import confined
from virtmigrate.units import MiB

LONG = 60.0
"""Seconds that nothing here takes, whatever else the machine does."""
SLEEP = "import time; time.sleep(600)"


def run(
    code: str,
    *,
    seconds: float = LONG,
    check: Callable[[], object] = lambda: None,
    **limits: int,
) -> confined.Ended:
    return confined.run(
        [sys.executable, "-c", code],
        limits=processutils.ProcessLimits(**limits),
        seconds=seconds,
        check=check,
    )


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Limits


def test_program_that_is_well() -> None:
    ended = run("import sys; print('out'); print('err', file=sys.stderr)")
    assert (ended.code, ended.output, ended.errors) == (0, b"out\n", b"err\n")
    assert ended.problem is None


def test_memory() -> None:
    ended = run("x = bytearray(600 << 20)", address_space=256 * MiB)
    assert ended.problem and b"MemoryError" in ended.errors


def test_processor_time() -> None:
    ended = run("while True: pass", cpu_time=1)
    assert ended.problem in [
        f"the process that read it was ended by signal {int(each)}"
        for each in (signal.SIGKILL, signal.SIGXCPU)
    ]


def test_size_of_files(tmp_path: Path) -> None:
    target = tmp_path / "file"
    ended = run(f"open({str(target)!r}, 'wb').write(bytes(1 << 20))", file_size=4096)
    assert ended.problem and target.stat().st_size <= 4096


def test_time_by_the_clock() -> None:
    ended = run(SLEEP, seconds=0.2)
    assert ended.is_late and ended.problem == "it took too long"


def test_output_is_bounded() -> None:
    ended = run(
        "import sys; sys.stdout.write('x' * 5_000_000); print(1, file=sys.stderr)"
    )
    assert ended.output == b"x" * confined.KEPT
    assert (ended.code, ended.errors) == (0, b"1\n")


def test_no_new_rights_and_niced() -> None:
    ended = run("import os; print(open('/proc/self/status').read(), os.nice(0))")
    assert b"NoNewPrivs:\t1" in ended.output
    assert int(ended.output.split()[-1]) >= 10


@pytest.fixture
def unasked() -> Iterator[None]:
    """Nobody has found out yet what this kernel gives."""
    confined._without_network.cache_clear()
    yield
    confined._without_network.cache_clear()


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("uid", [os.geteuid(), 1], ids=["this user", "not root"])
def test_no_network(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    if not confined._without_network():
        pytest.skip("this kernel gives no namespace without network")
    assert ("--user" in confined._without_network()) == (uid != 0)
    ended = run("import socket; print([name for _, name in socket.if_nameindex()])")
    assert ended.output == b"['lo']\n"


@pytest.mark.usefixtures("unasked")
def test_kernel_without_namespaces(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other walls stand; it is said once."""
    refused = subprocess.CompletedProcess[bytes]([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    for _ in range(2):
        assert run("print('well')").output == b"well\n"
    assert caplog.text.count("keeps the network") == 1


def test_program_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(errors.ConfigurationError, match="is not installed"):
        confined.require("qemu-img")


# Ending


def test_cancelled_leaves_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def check() -> None:
        if pid.exists() and pid.read_text():
            raise errors.Cancelled

    code = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid())); {SLEEP}"
    with pytest.raises(errors.Cancelled):
        run(code, check=check)
    assert not is_running(int(pid.read_text()))


def test_program_ends_with_who_started_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    inner = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid())); {SLEEP}"
    outer = (
        "import sys\n"
        "from oslo_concurrency import processutils\n"
        "from virtmigrate.door import confined\n"
        f"confined.run([sys.executable, '-c', {inner!r}], seconds=60, "
        "check=lambda: None, limits=processutils.ProcessLimits())"
    )
    with subprocess.Popen([sys.executable, "-c", outer]) as parent:
        wait_until(lambda: pid.exists() and bool(pid.read_text()))
        parent.kill()
    wait_until(lambda: not is_running(int(pid.read_text())))


# Answers that are none


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let a script of a shell look, instead of our process."""
    fake = tmp_path / "looks"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))


GOOD = {"format": "raw", "virtual_size": 4096}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "ended with 3"),
        ("kill -SEGV $$", f"signal {int(signal.SIGSEGV)}"),
        ("true", "gave no answer"),
        ("echo hello", "gave no answer"),
        ("head -c 100000 /dev/zero", "gave no answer"),
        (f"yes '{json.dumps(GOOD)}' | head -c 99999", "gave no answer"),
        ("echo '[]'", "gave no answer"),
        ("echo '{}'", "cannot be"),
        (f"echo '{json.dumps({**GOOD, 'surprise': 1})}'", "gave no answer"),
        (f"echo '{json.dumps({**GOOD, 'virtual_size': '1'})}'", "gave no answer"),
        (f"echo '{json.dumps({**GOOD, 'virtual_size': -1})}'", "cannot be"),
        (f"echo '{json.dumps({**GOOD, 'virtual_size': 1 << 60})}'", "cannot be"),
        (f"echo '{json.dumps({**GOOD, 'format': 'qcow2'})}'", "cannot be"),
        (f"echo '{json.dumps({**GOOD, 'refused': 'because'})}'", "because"),
        ("""printf '{"refused":"\\\\u001b[31m\\\\n"}'""", r"\\x1b\[31m\\n"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_answer_that_is_none_refuses(
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    reason: str,
) -> None:
    answering(tmp_path, monkeypatch, script)
    with pytest.raises(errors.ImageRefused, match=reason) as caught:
        door.inspect(image, "raw", door.Limits())
    assert str(caught.value).isprintable()


def test_good_answer(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others are measured by; and the image is on stdin, without a name."""
    nameless = f'[ $(wc -c) = 4096 ] && case "$*" in *{image}*) exit 9;; esac'
    answering(tmp_path, monkeypatch, f"{nameless} && echo '{json.dumps(GOOD)}'")
    assert door.inspect(image, "raw", door.Limits()).virtual_size == 4096


def test_look_that_takes_too_long(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(tmp_path, monkeypatch, "exec sleep 600")
    limits = door.Limits(look_seconds=1)
    with pytest.raises(errors.ImageRefused, match="it took too long"):
        door.inspect(image, "raw", limits)


def test_look_without_memory(image: Path) -> None:
    """Too little for Python itself: that is no image that comes in."""
    with pytest.raises(errors.ImageRefused, match="the look at it failed"):
        door.inspect(image, "raw", door.Limits(memory=16 * MiB))


def test_look_can_be_cancelled(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(tmp_path, monkeypatch, "exec sleep 600")

    def check() -> None:
        raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        door.inspect(image, "raw", door.Limits(), check)


def test_nothing_is_left_open(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    answering(tmp_path, monkeypatch, "exit 1")
    before = count()
    with pytest.raises(errors.ImageRefused):
        door.inspect(image, "raw", door.Limits())
    assert count() == before
