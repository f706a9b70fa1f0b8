# SPDX-License-Identifier: Apache-2.0
"""Clones that are refused, and steps that fail: what is left of them, and of others."""

import shutil
import types
from collections.abc import Callable
from typing import Any

import pytest

from tests.functional import cloneworld
from tests.functional.cloneworld import MAC, RISK, Fake, dummy, new
from tests.functional.conftest import World
from tests.functional.guestdisk import byte, write
from virtmigrate import (
    consistency,
    domainstate,
    errors,
    instance,
    journal,
    storagepool,
)
from virtmigrate.backends import making
from virtmigrate.clone import apart, memory
from virtmigrate.model import CloneState
from virtmigrate.progress import Progress
from virtmigrate.snapshot import Kind, Memory, Return, Wanted
from virtmigrate.units import GiB, KiB, MiB


@pytest.fixture
def source(world: World) -> Any:
    """A running guest that may be cloned; nobody in it has to be asked."""
    cloneworld.allow(world.a, Fake())
    made = dummy(world, mac=MAC)
    write(world.a, made, 7)
    return made


def clone(world: World, source: Any, twins: list[Any], **more: Any) -> Any:
    return world.a.driver.clone(None, source, twins, **more)


def expect_as_before(world: World, source: Any, before: list[str]) -> None:
    assert world.a.driver.settle() == []
    assert consistency.check(world.a.driver.node) == []
    assert world.a.state_of(source) == "running"
    assert byte(world, source) == 7
    assert world.a.driver.snapshots.all(source.uuid) == ((), None)
    assert [name for name in world.a.files() if "rec" not in name] == [
        name for name in before if "rec" not in name
    ]
    assert len(world.a.driver.list_instances()) == 1


def test_off_by_default(world: World) -> None:
    source = dummy(world)
    before = world.a.files()
    with pytest.raises(errors.CloneRefused, match="enable_live_clone"):
        clone(world, source, new(1), risk=RISK)
    assert world.a.files() == before


def test_refused(world: World, source: Any) -> None:
    before, twins = world.a.files(), new(2)
    twins[1].project_id = "another"
    with pytest.raises(errors.CloneRefused, match="another project"):
        clone(world, source, twins)
    (twin,) = new(1)
    same = types.SimpleNamespace(uuid=twin.uuid, name=twin.name)
    with pytest.raises(errors.CloneRefused, match="same uuid; two clones have the sam"):
        clone(world, source, [twin, same])
    with pytest.raises(errors.CloneRefused, match="max_clones"):
        clone(world, source, new(17))
    with pytest.raises(errors.CloneRefused, match="max_clones"):
        clone(world, source, [])
    with pytest.raises(errors.CloneRefused, match="UUID of its source"):
        clone(world, source, [types.SimpleNamespace(uuid=source.uuid, name="x")])
    vif = {"address": MAC, "type": "bridge", "network": {"bridge": "br0"}}
    with pytest.raises(errors.CloneRefused, match="a MAC is used twice"):
        clone(world, source, [twin], network_info={twin.uuid: [vif]})
    two = [{**vif, "address": f"52:54:00:00:00:0{n}"} for n in range(2)]
    with pytest.raises(errors.CloneRefused, match="2 interfaces, and the source has 1"):
        clone(world, source, [twin], network_info={twin.uuid: two})
    ovs = [{**two[0], "type": "ovs", "id": twin.uuid}]
    with pytest.raises(errors.CloneRefused, match="not onto Open vSwitch"):
        clone(world, source, [twin], network_info={twin.uuid: ovs})
    assert world.a.files() == before


def test_its_own_interfaces(world: World, source: Any) -> None:
    """A clone is plugged in as the caller says, also after it was turned off."""
    (twin,) = new(1)
    network = {"bridge": "br0"}
    vif = {"address": "52:54:00:AA:BB:01", "type": "bridge", "network": network}
    vif["devname"] = "tapclone"
    clone(world, source, [twin], network_info={twin.uuid: [vif]})
    for _ in range(2):
        text = world.a.xml(twin)
        assert "52:54:00:aa:bb:01" in text
        assert "bridge='br0'" in text
        assert "virtmigrate-apart" not in text
        world.a.driver.reboot(None, twin, None, "HARD")


def test_one_that_is_there(world: World, source: Any) -> None:
    """It is left as it is, and the other clone is made."""
    there = dummy(world)
    (twin,) = new(1)
    found = clone(world, source, [there, twin])
    assert [each.state for each in found] == [None, CloneState.READY]
    assert "has a domain" in found[0].reason
    assert world.a.state_of(there) == "running"
    assert world.a.driver.node.entitled(there.uuid).cloned is None
    called = types.SimpleNamespace(uuid=new(1)[0].uuid, name=there.name)
    with pytest.raises(errors.CloneFailed, match=f"called {there.name}"):
        clone(world, source, [called])


def test_not_somebody_else(world: World, source: Any) -> None:
    """One that cannot be told from its source goes; the others live."""
    twins = new(3)
    world.a.driver.clones.identities = Fake(fails=[twins[1].name])
    found = clone(world, source, twins)
    ready = CloneState.READY
    assert [each.state for each in found] == [ready, None, ready]
    assert "as it was told" in found[1].reason
    assert world.a.state_of(twins[1]) is None
    for each in (twins[0], twins[2]):
        assert world.a.state_of(each) == "running"
        assert byte(world, each) == 7
        world.a.driver.destroy(None, each)
    assert world.a.state_of(source) == "running"


def test_risk_of_one_step(world: World, source: Any) -> None:
    """A clone with an identity that nobody changed runs, off the network."""
    world.a.driver.clones.identities = Fake("ssh: no keygen", "clock: none")
    with pytest.raises(errors.CloneRefused, match="of: ssh: no keygen"):
        clone(world, source, new(1), risk=["clock"])
    (twin,) = new(1)
    (found,) = clone(world, source, [twin], risk=["clock", "ssh"])
    assert found.state is CloneState.APART
    assert found.reason == "clock, ssh"
    assert "link state='down'" in world.a.xml(twin)
    assert world.a.driver.settle() == []
    assert world.a.state_of(twin) == "running"
    # What may not reach a network does not by another host, either.
    with pytest.raises(errors.MigrationRefused, match="apart"):
        world.migrate(twin)
    with pytest.raises(errors.CloneRefused, match="a clone itself, and apart"):
        clone(world, twin, new(1), risk=["clock", "ssh"])


STEPS: dict[str, tuple[Any, str, str]] = {
    "memory": (domainstate.States, "freeze", ""),
    "commit": (instance.Domains, "define", '"clone-'),
    "begun": (journal.Journal, "done", ""),
    "snapshot": (journal.Journal, "done", "snapshot"),
    "kept": (journal.Journal, "done", "head"),
    "layer": (making.Making, "overlay", "clone"),
    "domain": (instance.Domains, "define", "clone-of"),
    "head": (memory, "_write", ""),
    "restore": (instance.Domains, "restore_from", ""),
    "hold": (apart.Apart, "hold", ""),
    "put-back": (journal.Journal, "done", "whole"),
    "resume": (instance.Domains, "unpause", "clone"),
    "release": (apart.Apart, "release", ""),
}
"""What fails, the first time that its arguments name something: a clone is "clone"."""


@pytest.mark.parametrize("step", STEPS)
def test_a_step_fails(
    world: World, source: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Each step that can be undone, with the next one failing: nothing is left."""
    before, (twin,) = world.a.files(), new(1)
    owner, name, about = STEPS[step]
    about = twin.uuid if about == "clone" else about
    real: Callable[..., Any] = getattr(owner, name)
    calls: list[str] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        # What undoing does of the same kind goes on.
        if not calls and about in str(args):
            calls.append(step)
            raise errors.StorageError(host="a", pool="-", reason="as it was told")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(errors.Error, match="as it was told"):
        clone(world, source, [twin])
    monkeypatch.undo()
    assert calls == [step]
    expect_as_before(world, source, before)


@pytest.mark.parametrize("failing", [0, 1, 3], ids=["none", "a-clone", "all"])
def test_nobody_comes_between(
    world: World, source: Any, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """From its snapshot until its memory's head is back the source is held.

    Also when that fails in the call, and settling does it.
    """
    cloneworld.allow(world.a, Fake(), lock_timeout=1)
    before, twins = world.a.files(), new(2)
    node, write_head, done = world.a.driver.node, memory._write, journal.Journal.done
    held: dict[str, list[bool]] = {"head": [], "snapshot": []}

    def hear(what: str) -> None:
        with node.locks.only(f"instance-{source.uuid}") as is_free:
            held[what].append(not is_free)

    def noted(log: journal.Journal, step: str, **facts: object) -> None:
        if step == "snapshot":
            hear(step)
        done(log, step, **facts)

    def written(*args: Any) -> None:
        hear("head")
        if failing and len(held["head"]) == 1:
            # So that no other clone is tried.
            raise errors.Cancelled
        if len(held["head"]) <= failing:
            raise errors.StorageError(host="a", pool="-", reason="as it was told")
        write_head(*args)

    monkeypatch.setattr(journal.Journal, "done", noted)
    monkeypatch.setattr(memory, "_write", written)
    if failing:
        with pytest.raises(errors.Cancelled):
            clone(world, source, twins)
        with node.claimed(source.uuid):
            # What is left, if anything, waits for its other operation.
            assert world.a.driver.settle() == []
        expect_as_before(world, source, before)
        assert journal.load_all(world.a.state / "clones") == []
    else:
        clone(world, source, twins)
    # Both clones', and the source's again; what failed is done once more.
    assert len(held["head"]) == {0: 3, 1: 2, 3: 4}[failing]
    assert all(held["head"])
    assert held["snapshot"] == [True]


def test_a_network_that_leads_out(world: World, source: Any) -> None:
    """One of the name that is not isolated is not used, and not changed."""
    before = world.a.files()
    bad = (
        "<network><name>leads-out</name><forward mode='bridge'/>"
        "<bridge name='br0'/></network>"
    )
    with world.a.libvirt() as conn:
        network = conn.networkDefineXML(bad)
        try:
            world.a.overrides["clone_apart_network"] = "leads-out"
            cloneworld.restart(world.a, Fake())
            with pytest.raises(errors.ConfigurationError, match="is not isolated"):
                clone(world, source, new(1))
            assert "br0" in network.XMLDesc(0)
        finally:
            if network.isActive():
                network.destroy()
            network.undefine()
    expect_as_before(world, source, before)


def test_cancelled(world: World, source: Any) -> None:
    before = world.a.files()

    class Impatient(Progress):
        def phase(self, name: str, total: int = 0) -> None:
            super().phase(name, total)
            if name == "freezing":
                self.cancel()

    world.a.progress = Impatient()
    with pytest.raises(errors.Cancelled):
        clone(world, source, new(1))
    world.a.progress = Progress()
    expect_as_before(world, source, before)


def test_its_snapshots_stay(world: World, source: Any) -> None:
    """The memory of a checkpoint of the source is its own, before and after."""
    known = world.a.driver.snapshots
    wanted = Wanted("mine", kind=Kind.CHECKPOINT, memory=Memory.EXTERNAL)
    known.create(source.uuid, wanted)
    write(world.a, source, 8)
    (twin,) = new(1)
    clone(world, source, [twin])
    assert byte(world, twin) == 8
    known.revert(source.uuid, Return("mine"))
    assert byte(world, source) == 7
    assert byte(world, twin) == 8
    assert world.a.state_of(source) == world.a.state_of(twin) == "running"


@pytest.mark.timeout(300)
def test_full_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage fills up while the memory is written: nothing half-alive stays."""
    world.a.clear()
    world.a.host.mount_storage(48 * MiB)
    try:
        cloneworld.allow(world.a, Fake())
        source = dummy(world, mac=MAC)
        write(world.a, source, 7)
        before, filler = world.a.files(), world.a.path / "filler"
        with pytest.raises(errors.CloneRefused, match="its memory needs"):
            clone(world, source, new(2))
        # It looked as if there were room.
        roomy = storagepool.Room(capacity=GiB, free=GiB)
        monkeypatch.setattr(world.a.driver.node.files, "room", lambda: 256 * MiB)
        monkeypatch.setattr(world.a.driver.node, "room", lambda _: roomy)
        freeze = domainstate.States.freeze

        def filled(*args: Any) -> None:
            free = shutil.disk_usage(world.a.path).free
            filler.write_bytes(bytes(free - 128 * KiB))
            try:
                freeze(*args)
            finally:
                filler.unlink()

        monkeypatch.setattr(domainstate.States, "freeze", filled)
        with pytest.raises(errors.SnapshotFailed):
            clone(world, source, new(2))
        monkeypatch.undo()
        expect_as_before(world, source, before)
    finally:
        world.a.clear()
        world.a.host.unmount_storage()
