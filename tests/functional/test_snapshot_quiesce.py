# SPDX-License-Identifier: Apache-2.0
"""Snapshots of guests whose agent freezes their file systems, or fails to."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import guest as guests
from tests.functional import test_agent
from tests.functional.conftest import World
from tests.functional.test_agent import KILL, wait_for
from virtmigrate import domainstate, domainxml, errors
from virtmigrate.snapshot import Kind, Memory, Return, Wanted
from virtmigrate.snapshottree import Consistency

FILES = Wanted("q", quiesce=True)


class Guest:
    """An instance that writes to a file system on its second disk, each second."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.node = world.a
        self.node.overrides = {"freeze_timeout": 5, "freeze_limit": 20.0}
        self.node.new_driver()
        self.instance = world.instance(memory_mb=128, ephemeral_gb=1)
        meta = {"path": str(guests.image().path), "disk_format": "raw"}
        self.node.driver.spawn(None, self.instance, meta, power_on=False)
        disk = self.node.disk(self.instance, "vdb")
        argv = ["mkfs.ext4", "-q", "-L", "beats", str(disk)]
        subprocess.run(argv, check=True, timeout=60)
        self.node.driver.power_on(None, self.instance, None)
        name = f"qemu/virtmigrate-{self.instance.uuid}.log"
        self.console = self.node.host.logs / name
        self.wait()

    @property
    def snapshots(self) -> Any:
        return self.node.driver.snapshots

    def take(self, wanted: Wanted) -> Any:
        return self.snapshots.create(self.instance.uuid, wanted)

    def wait(self) -> None:
        wait_for(lambda: self.beats() > 1, 60)
        wait_for(lambda: self.agent() == "connected", 30)

    def beats(self) -> int:
        return len(guests.beats(self.console)) if self.console.exists() else 0

    def agent(self) -> str | None:
        return domainxml.agent_state(self.node.xml(self.instance))

    def expect_it_goes_on(self) -> None:
        before = self.beats()
        wait_for(lambda: self.beats() > before + 1)

    def is_clean(self, snapshot: Any) -> bool:
        """Tell whether nothing of the file system is in its journal only."""
        (frozen,) = [each for each in snapshot.disks if each.target == "vdb"]
        path = Path(self.node.path) / "disks" / frozen.volume
        argv = ["dumpe2fs", "-h", str(path)]
        said = subprocess.run(argv, check=True, timeout=60, capture_output=True)
        return b"needs_recovery" not in said.stdout


@pytest.fixture
def guest(world: World) -> Iterator[Guest]:
    yield Guest(world)


def test_quiesced(guest: Guest) -> None:
    crash = guest.take(Wanted("crash"))
    assert crash.consistency is Consistency.CRASH
    assert not guest.is_clean(crash)
    guest.expect_it_goes_on()
    frozen = guest.take(FILES)
    assert frozen.consistency is Consistency.FILES
    guest.expect_it_goes_on()
    guest.snapshots.revert(guest.instance.uuid, Return("q", power="off"))
    # What the guest finds then is clean as well.
    guest.snapshots.delete(guest.instance.uuid, "crash")
    tree, _ = guest.snapshots.all(guest.instance.uuid)
    assert guest.is_clean(tree[0])


def test_without_an_agent_nothing_is_done(guest: Guest) -> None:
    with guest.node.libvirt() as conn:
        shell = test_agent.Guest.__new__(test_agent.Guest)
        shell.domain = conn.lookupByUUIDString(guest.instance.uuid)
        shell.sh(KILL)
        wait_for(lambda: guest.agent() == "disconnected")
    before = guest.node.files()
    with pytest.raises(errors.AgentNotThere):
        guest.take(FILES)
    assert guest.snapshots.all(guest.instance.uuid) == ((), None)
    after = [name.rpartition(".rec.")[0] or name for name in guest.node.files()]
    assert after == [name.rpartition(".rec.")[0] or name for name in before]
    guest.expect_it_goes_on()


def test_a_freeze_that_did_not_hold_is_a_failure(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest was thawed before QEMU had gone on in its layers, or after."""
    guest.node.overrides["freeze_limit"] = 2.0
    guest.node.new_driver()
    freeze = domainstate.States.freeze

    def slow(*args: Any) -> None:
        freeze(*args)
        time.sleep(3)

    monkeypatch.setattr(domainstate.States, "freeze", slow)
    with pytest.raises(errors.QuiesceFailed, match="It is thawed"):
        guest.take(FILES)
    monkeypatch.undo()
    guest.expect_it_goes_on()
    assert guest.snapshots.all(guest.instance.uuid) == ((), None)
    assert guest.node.driver.settle() == []
    found = guest.node.driver.node.entitled(guest.instance.uuid)
    assert [ref.volume for ref in found.disks] == [
        name.removeprefix("disks/")
        for name in sorted(guest.node.files())
        if name.startswith("disks/")
    ]


def test_memory_is_not_quiesced(guest: Guest) -> None:
    wanted = Wanted("m", Kind.CHECKPOINT, Memory.EXTERNAL, quiesce=True)
    with pytest.raises(errors.SnapshotRefused, match="come back frozen"):
        guest.take(wanted)
