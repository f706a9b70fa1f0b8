# SPDX-License-Identifier: Apache-2.0
"""LVM: moves to a volume group and from it, and nobody sees anybody's old bytes.

One machine has one group; most moves are between it and a directory, and one, in full
runs, between the groups of two machines. The driver of a group runs outside, over TLS,
where only libvirt reaches it; what a process on its own host can do besides is shown
inside, by inside.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sandbox
from tests.functional import inside, places, sides, test_contract
from tests.functional.sides import Kinds, Side
from virtmigrate import errors
from virtmigrate.backends import lvm
from virtmigrate.model import VolumeState
from virtmigrate.units import KiB, MiB

SIZE = 8 * MiB
PATTERN = b"\xa5" * SIZE


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("lvm-alpha")
    box.remove_host("lvm-alpha")


@pytest.fixture(scope="module")
def kinds(
    alpha: sandbox.Host,
    machine: Callable[[], sandbox.Machine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Kinds]:
    """A directory on the one side, a volume group on the other."""
    tmp = tmp_path_factory.mktemp("lvm")
    gamma = machine()
    grace = places.GRACE["lvm"]
    group = {"kind": "lvm", "lvm_group": gamma.group}
    a = Side(alpha, tmp / "a", {"path": str(alpha.storage / tmp.name)}, "thedir", grace)
    b = Side(gamma, tmp / "b", group, "thelvm", grace)
    yield Kinds(a, b, tmp)
    b.close()
    a.close()


@pytest.fixture
def groups(
    kinds: Kinds, box: sandbox.Sandbox, tmp_path: Path
) -> Iterator[tuple[Kinds, sandbox.Machine]]:
    """Volume groups on both sides, and the machine of the second."""
    delta = box.add_machine("delta")
    try:
        places.free_group(delta)
        group = {"kind": "lvm", "lvm_group": delta.group}
        side = Side(delta, tmp_path / "c", group, "thegroup", places.GRACE["lvm"])
        try:
            yield Kinds(kinds.b, side, tmp_path), delta
        finally:
            side.close()
    finally:
        box.remove_machine(delta.name)


@pytest.fixture
def backend(kinds: Kinds) -> Iterator[lvm.LvmBackend]:
    found = kinds.b.driver.node.backend("thelvm")
    assert isinstance(found, lvm.LvmBackend)
    yield found
    assert found.drain(60)
    # LVM takes snapshots away with their origin: "vda" goes before "image".
    for name in sorted(found.disks.names(), reverse=True):
        found.disks.delete(name)


def nothing_stays(kinds: Kinds) -> bool:
    assert kinds.b.driver.node.backend(kinds.b.name).drain(60)
    return not [n for side in (kinds.a, kinds.b) for n in side.volumes() if "vda" in n]


# Old bytes


def dirt(machine: sandbox.Machine) -> bool:
    """Whether the pattern stands anywhere on the disk of the group, seen outside."""
    machine.run(["sync"])
    with machine.disk.open("rb") as disk:
        end, position = disk.seek(0, os.SEEK_END), 0
        while position < end:
            try:
                position = os.lseek(disk.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            if PATTERN[: 64 * KiB] in os.pread(disk.fileno(), MiB, position):
                return True
            position += MiB
    return False


@pytest.mark.parametrize("clear", ["zero", "discard", "none"])
def test_nobody_sees_old_bytes(
    backend: lvm.LvmBackend,
    machine: Callable[[], sandbox.Machine],
    clear: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "_clear", clear)
    made = backend.allocate(test_contract.volume(backend, size=SIZE))
    test_contract.fill(backend, made.name, PATTERN, tmp_path)
    backend.remove(made.name)
    if clear != "none":
        assert backend.drain(60)
    assert made.name not in backend.disks.names()
    assert backend.volumes.find(made.name) is None
    # From afar nothing can be discarded: zeros are written instead.
    assert dirt(machine()) == (clear == "none")
    backend.incoming.create_raw("new", SIZE)
    assert backend.incoming.read("new", limit=SIZE) == bytes(SIZE)


def test_nobody_sees_old_bytes_of_a_state(
    backend: lvm.LvmBackend, machine: Callable[[], sandbox.Machine], tmp_path: Path
) -> None:
    made = backend.allocate(test_contract.volume(backend, size=SIZE))
    test_contract.fill(backend, made.name, PATTERN, tmp_path)
    backend.keep_state(made.name, test_contract.OTHER)
    # What was there is in the snapshot now.
    test_contract.fill(backend, made.name, b"\x5a" * SIZE, tmp_path)
    assert dirt(machine())
    backend.drop_state(made.name, test_contract.OTHER)
    assert backend.drain(60)
    assert not dirt(machine())
    assert set(backend.volumes.names()) == {made.name}


KILLED = """
import sys, time
from virtmigrate import backends, conf, host
options = conf.load(__import__("pathlib").Path(sys.argv[1]))
here = host.Host(options.virtmigrate.uri, name="gamma")
backend = backends.load(options, here)["thelvm"]
backend.disks.wipe = lambda *_: (print("wiping", flush=True), time.sleep(600))
backend.remove(sys.argv[2])
backend.drain()
"""


def test_wiping_goes_on_after_a_kill(kinds: Kinds, backend: lvm.LvmBackend) -> None:
    made = backend.allocate(test_contract.volume(backend, size=SIZE))
    argv = [sys.executable, "-c", KILLED, str(kinds.b.config), made.name]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "wiping\n"
        child.kill()
    assert backend.volumes.read(made.name).body.state is VolumeState.DOOMED
    with pytest.raises(errors.VolumeNotFound):
        backend.layers(made.name)
    assert made.name in backend.disks.names()
    backend.sweep()
    assert backend.drain(60)
    assert backend.volumes.find(made.name) is None
    assert made.name not in backend.disks.names()


# Inside


@pytest.mark.parametrize("what", [each.__name__ for each in inside.SHOWN])
def test_what_the_groups_own_host_can_do(
    machine: Callable[[], sandbox.Machine], backend: lvm.LvmBackend, what: str
) -> None:
    text = (
        "[virtmigrate]\nenabled_backends = thelvm\n"
        f"record_grace = {places.GRACE['lvm']}\n"
        f"[thelvm]\nkind = lvm\nlvm_group = {backend.group}\n"
    )
    machine().write_file("/run/inside.conf", text)
    argv = [machine().python, "-m", "tests.functional.inside", "/run/inside.conf", what]
    try:
        told = machine().run(argv, timeout=240).stdout
    finally:
        # Another process renamed and made volumes behind this one's back.
        backend.disks.refresh()
    assert told.split()[0] == what


# Moves


SETTLE = """
import pathlib
from virtmigrate import conf, driver
made = driver.VirtMigrateDriver(conf=conf.load(pathlib.Path("/run/settle.conf")))
made.init_host("gamma")
print(made.settle())
made.cleanup_host("gamma")
"""


def settle_inside(side: Side, machine: sandbox.Machine) -> None:
    """Let the group's own host finish what a driver far away began."""
    text = side.config.read_text()
    text = text.replace(machine.uri, machine.local_uri, 1)
    machine.write_file("/run/settle.conf", text)
    code = SETTLE.replace("gamma", machine.name)
    print(machine.run([machine.python, "-c", code], timeout=90).stdout)


def test_moved_to_a_group_and_back(
    kinds: Kinds, machine: Callable[[], sandbox.Machine], tmp_path: Path
) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    kinds.move(instance)
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    assert kinds.b.disk(instance)[0] == "thelvm"
    # Fewer bytes than the disk has: a new volume is zeros.
    assert 0 < kinds.sent() < SIZE
    # From afar nothing is made durable, and the source keeps its own until it is.
    with pytest.raises(errors.NotConfirmable, match="durable"):
        kinds.a.driver.confirm_migration(None, None, instance, None)
    settle_inside(kinds.b, machine())
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.settle()
    returning = Kinds(kinds.b, kinds.a, tmp_path)
    returning.move(instance)
    assert kinds.a.root(instance) == before
    kinds.b.driver.confirm_migration(None, None, instance, None)
    kinds.a.driver.destroy(None, instance, None)
    assert nothing_stays(kinds)


def test_moved_from_a_group_and_reverted(kinds: Kinds, tmp_path: Path) -> None:
    there = Kinds(kinds.b, kinds.a, tmp_path)
    instance = there.spawn()
    before = kinds.b.root(instance)
    there.move(instance)
    assert kinds.a.root(instance) == before
    kinds.a.driver.destroy(None, instance, None)
    kinds.b.driver.finish_revert_migration(None, instance)
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    kinds.b.driver.destroy(None, instance, None)
    assert nothing_stays(kinds)


def test_layers_become_one_logical_volume(
    kinds: Kinds, machine: Callable[[], sandbox.Machine]
) -> None:
    instance = kinds.spawn(Kinds.flavor_of("thedir"))
    size = sides.SIZE + 8 * MiB
    sides.put_layer(kinds.a, instance, size, f"write -P 17 {sides.SIZE} {MiB}")
    before = kinds.a.root(instance)
    kinds.move(instance)
    assert kinds.b.root(instance) == before
    settle_inside(kinds.b, machine())
    kinds.a.driver.confirm_migration(None, None, instance, None)
    assert not [name for name in kinds.a.volumes() if "vda" in name]
    kinds.b.driver.settle()
    kinds.b.driver.destroy(None, instance, None)
    assert nothing_stays(kinds)


def test_resized_within_the_group(
    kinds: Kinds, machine: Callable[[], sandbox.Machine], tmp_path: Path
) -> None:
    """The disk is copied beside itself, which a kept state would not let grow."""
    there = Kinds(kinds.b, kinds.b, tmp_path)
    instance = there.spawn()
    before, volume = kinds.b.root(instance), kinds.b.disk(instance)[1]
    there.move(instance, memory_mb=80)
    assert kinds.b.disk(instance)[1].name != volume.name
    assert kinds.b.root(instance) == before
    kinds.b.driver.destroy(None, instance, None)
    kinds.b.driver.finish_revert_migration(None, instance)
    assert kinds.b.disk(instance)[1] == volume
    assert kinds.b.root(instance) == before
    there.move(instance, memory_mb=80)
    settle_inside(kinds.b, machine())
    kinds.b.driver.confirm_migration(None, None, instance, None)
    assert kinds.b.root(instance) == before
    kinds.b.driver.destroy(None, instance, None)
    assert nothing_stays(kinds)


def test_moved_between_two_groups(groups: tuple[Kinds, sandbox.Machine]) -> None:
    """Reverted, then moved for good."""
    kinds, delta = groups
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    kinds.move(instance)
    assert kinds.b.root(instance) == before
    assert kinds.b.disk(instance)[0] == "thegroup"
    assert 0 < kinds.sent() < SIZE
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    kinds.move(instance)
    settle_inside(kinds.b, delta)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.settle()
    assert kinds.a.state_of(instance) is None
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    assert kinds.a.driver.node.backend(kinds.a.name).drain(60)
    assert not [name for name in kinds.a.volumes() if "vda" in name]
    kinds.b.driver.destroy(None, instance, None)
    assert nothing_stays(kinds)
