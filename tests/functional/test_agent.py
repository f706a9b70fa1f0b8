# SPDX-License-Identifier: Apache-2.0
"""Real guests, frozen by their real agents, and thawed whatever happens.

The guest writes to a file system each second, and beats when it has. Its agent is
hurt by itself: it starts a script that stops it, or kills it, a little later.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest

from sandbox import Host as SandboxHost
from sandbox import guest
from tests.functional.conftest import World
from tests.functional.test_sandbox import domain
from virtmigrate import agent, domainxml, errors
from virtmigrate.host import Host
from virtmigrate.units import MiB

LIMITS = agent.Limits(answer=2, frozen=20.0)
QUIET = 2.5
"""Seconds in which a guest that is not frozen beats."""
KILL = "kill -9 $(pidof qemu-ga)"
START = "qemu-ga --daemonize -m virtio-serial -p $(ls -d /dev/vport* | head -1) -t /run"


class Guest:
    """A running guest with a file system, and its domain."""

    def __init__(self, host: SandboxHost, state: Path, *, channel: bool = True) -> None:
        name = f"frozen-{uuid.uuid4().hex[:6]}"
        self.console = host.storage / f"{name}.log"
        self.state = state
        self.host = Host(host.local_uri, name=host.name)
        self.agents = agent.Agents(self.host, state, LIMITS)
        self.files = [host.storage / f"{name}{end}" for end in (".raw", ".ext", ".log")]
        guest.image().copy(self.files[0])
        self._conn = libvirt.open(host.local_uri)
        self.domain = self._conn.createXML(self._xml(host, name, channel=channel))
        self.uuid = self.domain.UUIDString()

    def close(self) -> None:
        self.agents.close()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain.destroy()
        self._conn.close()
        self.host.close()
        for path in self.files:
            path.unlink(missing_ok=True)

    def wait(self, seconds: float = 40.0) -> None:
        """Wait until it beats, and its agent is there."""
        wait_for(self.beats, seconds)
        self.wait_for_agent()

    def wait_for_agent(self, state: str = "connected") -> None:
        wait_for(lambda: domainxml.agent_state(self.domain.XMLDesc(0)) == state)

    def beats(self) -> int:
        return len(guest.beats(self.console)) if self.console.exists() else 0

    def is_frozen(self) -> bool:
        """Tell whether it writes nothing."""
        # What was written before may still be told.
        time.sleep(0.5)
        before = self.beats()
        time.sleep(QUIET)
        return self.beats() == before

    def sh(self, script: str) -> None:
        """Have the agent start a script."""
        arguments = {"path": "/bin/sh", "arg": ["-c", f"({script}) &"]}
        command = {"execute": "guest-exec", "arguments": arguments}
        libvirt_qemu.qemuAgentCommand(self.domain, json.dumps(command), 10, 0)

    def notes(self) -> list[str]:
        return [path.name for path in self.state.glob("frozen/*")]

    def with_limits(self, answer: int, frozen: float) -> agent.Agents:
        return agent.Agents(self.host, self.state, agent.Limits(answer, frozen))

    def _xml(self, host: SandboxHost, name: str, *, channel: bool) -> str:
        disk = self.files[1]
        with disk.open("wb") as file:
            file.truncate(16 * MiB)
        argv = ["mkfs.ext4", "-q", "-L", "beats", str(disk)]
        subprocess.run(argv, check=True, timeout=30)
        xml = domain(host, name).replace(
            "<interface",
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
            f"<source file='{disk}'/><target dev='vdb' bus='virtio'/></disk><interface",
            1,
        )
        return xml if channel else xml.replace("org.qemu.guest_agent.0", "other.0")


@pytest.fixture
def made(
    pair: tuple[SandboxHost, SandboxHost], tmp_path: Path
) -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def make(*, channel: bool = True) -> Guest:
        guests.append(Guest(pair[0], tmp_path / "state", channel=channel))
        return guests[-1]

    yield make
    for each in guests:
        each.close()


@pytest.fixture
def running(made: Callable[..., Guest]) -> Guest:
    found = made()
    found.wait()
    return found


def wait_for(call: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not call():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def stop(seconds: float, after: float = 0.0) -> str:
    """A script that stops the agent, which hears nothing, for a while."""
    it = "$(pidof qemu-ga)"
    return f"sleep {after}; kill -STOP {it}; sleep {seconds}; kill -CONT {it}"


def expect_thawed(found: Guest) -> None:
    assert not found.is_frozen()
    assert found.notes() == []
    # Whoever comes next can freeze it.
    with found.agents.frozen(found.uuid):
        pass


def test_a_frozen_guest_writes_nothing(running: Guest) -> None:
    for _ in range(2):
        with running.agents.frozen(running.uuid):
            assert running.notes() == [running.uuid]
            assert running.is_frozen()
        assert running.notes() == []
        assert not running.is_frozen()


def test_what_the_body_raises_goes_on(running: Guest) -> None:
    with pytest.raises(ZeroDivisionError), running.agents.frozen(running.uuid):
        _ = 1 / 0
    expect_thawed(running)


def test_without_a_channel_nothing_is_frozen(made: Callable[..., Guest]) -> None:
    found = made(channel=False)
    wait_for(found.beats, 40)
    entered = False
    with (
        pytest.raises(errors.AgentNotThere, match="no channel"),
        found.agents.frozen(found.uuid),
    ):
        entered = True
    assert not entered and not found.is_frozen() and found.notes() == []


def test_without_an_agent_nothing_is_frozen(running: Guest) -> None:
    running.sh(KILL)
    running.wait_for_agent("disconnected")
    with (
        pytest.raises(errors.AgentNotThere, match="no agent runs"),
        running.agents.frozen(running.uuid),
    ):
        pass
    assert not running.is_frozen() and running.notes() == []
    running.domain.suspend()
    with (
        pytest.raises(errors.AgentNotThere, match="does not run"),
        running.agents.frozen(running.uuid),
    ):
        pass


def test_no_file_system_is_not_quiesced(running: Guest) -> None:
    running.sh("umount -l /files")
    wait_for(lambda: "/files" not in mounts(running))
    with (
        pytest.raises(errors.QuiesceFailed, match=r"no file system.*It is thawed"),
        running.agents.frozen(running.uuid),
    ):
        pass
    assert running.notes() == []


def mounts(found: Guest) -> str:
    command = '{"execute": "guest-get-fsinfo"}'
    return str(libvirt_qemu.qemuAgentCommand(found.domain, command, 10, 0))


def test_an_agent_that_hangs_freezes_nothing_for_good(running: Guest) -> None:
    """What it was asked meanwhile it does when it goes on: all is undone then."""
    running.sh(stop(12))
    time.sleep(1)
    with (
        pytest.raises(errors.QuiesceFailed, match="may be frozen"),
        running.agents.frozen(running.uuid),
    ):
        pass
    assert running.notes() == [running.uuid]
    with pytest.raises(errors.InstanceBusy), running.agents.frozen(running.uuid):
        pass
    # By the thread that goes on, and nobody else.
    wait_for(lambda: running.notes() == [])
    expect_thawed(running)


def test_an_agent_that_freezes_late_is_undone(running: Guest) -> None:
    """libvirt gave up, and the agent did it all the same."""
    running.sh(
        "printf '#!/bin/sh\\n[ $1 = thaw ] || sleep 6\\necho HOOK $1 >/dev/ttyS0\\n' "
        f">/run/hook; chmod +x /run/hook; {KILL}; sleep 1; {START} -F/run/hook"
    )
    running.wait_for_agent("disconnected")
    running.wait_for_agent()
    with (
        pytest.raises(errors.QuiesceFailed, match="may be frozen"),
        running.agents.frozen(running.uuid),
    ):
        pass
    assert "HOOK" not in running.console.read_text()
    wait_for(lambda: running.notes() == [])
    told = re.findall(r"HOOK (\w+)", running.console.read_text())
    assert told == ["freeze", "thaw"]
    assert not running.is_frozen()


def test_an_agent_that_hangs_in_the_freeze_thaws_later(running: Guest) -> None:
    running.sh(stop(10, after=1.5))
    with (
        pytest.raises(errors.QuiesceFailed, match="may be frozen"),
        running.agents.frozen(running.uuid),
    ):
        time.sleep(2.5)
    assert running.notes() == [running.uuid]
    wait_for(lambda: running.notes() == [])
    expect_thawed(running)


def test_an_agent_that_dies_thaws_when_it_is_back(running: Guest) -> None:
    """It left a file that says that it froze all."""
    running.sh(f"sleep 2; {KILL}; sleep 7; {START}")
    with (
        pytest.raises(errors.QuiesceFailed, match="may be frozen"),
        running.agents.frozen(running.uuid),
    ):
        time.sleep(3)
    assert running.is_frozen()
    wait_for(lambda: running.notes() == [])
    expect_thawed(running)


def test_a_body_that_hangs_does_not_hold_the_guest(running: Guest) -> None:
    agents = running.with_limits(2, 3.0)
    with (
        pytest.raises(errors.QuiesceFailed, match=r"more than 3 s. It is thawed"),
        agents.frozen(running.uuid),
    ):
        time.sleep(4)
        assert not running.is_frozen()
    expect_thawed(running)


def test_who_else_thaws_it_is_found_out(running: Guest) -> None:
    with (
        pytest.raises(errors.QuiesceFailed, match="0 were so at the end"),
        running.agents.frozen(running.uuid),
    ):
        running.domain.fsThaw()
    expect_thawed(running)


def test_a_guest_that_ends_while_it_is_frozen(running: Guest) -> None:
    with (
        pytest.raises(errors.QuiesceFailed, match="it stopped"),
        running.agents.frozen(running.uuid),
    ):
        running.domain.destroy()
    assert running.notes() == []


def test_one_at_a_time(running: Guest) -> None:
    with running.agents.frozen(running.uuid):
        with pytest.raises(errors.InstanceBusy), running.agents.frozen(running.uuid):
            pass
        # Its thread lives: nobody thaws it behind its back.
        assert running.agents.recover() == []
        assert running.is_frozen()
    expect_thawed(running)


def test_what_a_killed_process_froze_is_settled(world: World, running: Guest) -> None:
    killed(world, running)
    assert running.is_frozen()
    world.a.new_driver()
    assert not running.is_frozen()
    assert not list(world.a.state.glob("frozen/*"))


def test_a_note_of_a_run_that_is_over_goes(world: World, running: Guest) -> None:
    killed(world, running)
    running.domain.destroy()
    assert world.a.driver.settle() == []
    assert not list(world.a.state.glob("frozen/*"))


def test_a_torn_note_counts(world: World, running: Guest) -> None:
    killed(world, running)
    (world.a.state / "frozen" / running.uuid).write_text("")
    assert world.a.driver.settle() == []
    assert not running.is_frozen()


def test_settle_says_who_may_be_frozen(world: World, running: Guest) -> None:
    killed(world, running)
    world.a.overrides["freeze_timeout"] = 1
    running.domain.suspend()
    world.a.new_driver()
    (left,) = world.a.driver.settle()
    assert f"instance {running.uuid} may be frozen" in left
    running.domain.resume()
    assert world.a.driver.settle() == []
    assert not running.is_frozen()


def killed(world: World, running: Guest) -> None:
    """Have another process freeze it and be killed."""
    argv = [sys.executable, "-m", __name__, str(world.a.state)]
    argv += [world.a.host.local_uri, running.uuid]
    done = subprocess.run(argv, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert (world.a.state / "frozen" / running.uuid).exists()


def main() -> None:
    """Freeze a guest, and be killed."""
    state, uri, found = sys.argv[1:]
    agents = agent.Agents(Host(uri, name="killed"), Path(state), LIMITS)
    with agents.frozen(found):
        threading.Event().wait(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
