# SPDX-License-Identifier: Apache-2.0
"""Moves between hosts that see the same directory, or only seem to."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import libvirt_qemu
import pytest

from tests.functional.conftest import Node, World, digest
from virtmigrate import errors
from virtmigrate.units import GiB, MiB


@pytest.fixture
def shared(world: World) -> World:
    world.share()
    return world


def test_nothing_is_copied(shared: World) -> None:
    instance = shared.spawn(shared.a)
    before = shared.a.disk(instance)
    ticket = shared.migrate(instance)
    assert shared.a.progress.sent == 0
    shared.finish(instance, ticket)
    assert shared.b.state_of(instance) == "running"
    assert before.exists()


def test_revert_gives_the_disk_as_it_was(shared: World) -> None:
    instance = shared.spawn(shared.a)
    disk = shared.a.disk(instance)
    before = digest(disk)
    shared.finish(instance, shared.migrate(instance, root_gb=1))
    written = overwrite(shared.b, instance)
    assert shared.read(shared.b, instance)[: len(written)] == written
    shared.revert(instance)
    assert shared.a.disk(instance) == disk
    assert digest(disk) == before
    assert disk.stat().st_size == 8 * MiB
    expect_owned(shared, shared.a, instance)


def test_confirm_merges_what_the_peer_wrote(shared: World) -> None:
    instance = shared.spawn(shared.a)
    disk = shared.a.disk(instance)
    shared.finish(instance, shared.migrate(instance, root_gb=1))
    written = overwrite(shared.b, instance)
    shared.confirm(instance)
    assert disk.exists()
    shared.b.driver.settle()
    assert shared.b.state_of(instance) == "running"
    assert shared.b.disk(instance) == disk
    assert disk.stat().st_size == GiB
    assert disk.read_bytes()[: len(written)] == written
    expect_owned(shared, shared.b, instance)
    # It moves on from there as any other.
    ticket = shared.b.driver.migrate_disk_and_power_off(None, instance, "alpha", None)
    shared.a.driver.finish_migration(None, None, instance, ticket, None)
    assert shared.a.state_of(instance) == "running"


def test_a_killed_destroy_waits_for_its_caller(shared: World) -> None:
    """Its layer is not merged any more, and nobody complains about that."""
    instance = shared.spawn(shared.a)
    shared.finish(instance, shared.migrate(instance))
    shared.confirm(instance)
    # What is done when it is killed before the first volume goes.
    shared.b.driver.node.domains.kill(instance.uuid)
    shared.b.driver.node.domains.undefine(instance.uuid)
    shared.b.new_driver()
    assert shared.b.driver.settle() == []
    shared.b.driver.destroy(None, instance, None)
    assert shared.b.driver.settle() == []
    assert not list(shared.b.driver.node.mailbox.open_transfers())
    assert not list((shared.b.path / "disks").glob("vda*"))


def test_destroy_at_the_peer_leaves_the_one_copy(shared: World) -> None:
    instance = shared.spawn(shared.a)
    disk = shared.a.disk(instance)
    shared.finish(instance, shared.migrate(instance))
    shared.b.driver.destroy(None, instance, None, destroy_disks=True)
    assert disk.exists()
    shared.a.driver.finish_revert_migration(None, instance)
    assert shared.a.state_of(instance) == "running"


@pytest.fixture
def twins(world: World) -> Iterator[World]:
    """Two separate pools of equal path, names and UUIDs: golden images."""
    world.close()
    path = world.tmp / "golden"
    path.mkdir()
    uuids: dict[str, str] = {}
    for node in (world.a, world.b):
        node.host.run(["mount", "-t", "tmpfs", "tmpfs", str(path)])
        node.path = path / "vm"
        define_pools(node, uuids)
        node.new_driver()
    yield world
    for node in (world.a, world.b):
        node.clear()
        node.host.run(["umount", str(path)])


def test_equal_paths_and_ids_prove_nothing(twins: World) -> None:
    instance = twins.spawn(twins.a)
    before = inside(twins.a, instance)
    twins.finish(instance, twins.migrate(instance))
    assert twins.a.progress.sent > 0
    assert inside(twins.b, instance) == before
    twins.b.driver.destroy(None, instance, None)
    twins.a.driver.finish_revert_migration(None, instance)
    assert inside(twins.a, instance) == before
    assert twins.a.state_of(instance) == "running"


def test_what_was_not_fsynced_is_not_confirmed(twins: World) -> None:
    """The process is not on the peer: it can't fsync there, and says so."""
    instance = twins.spawn(twins.a)
    twins.finish(instance, twins.migrate(instance))
    assert twins.b.state_of(instance) == "running"
    with pytest.raises(errors.NotConfirmable, match="durable"):
        twins.confirm(instance)
    assert inside(twins.a, instance, defined=False)


def define_pools(node: Node, uuids: dict[str, str]) -> None:
    for area in ("disks", "incoming", "records"):
        name = f"virtmigrate-local-{area}"
        number = uuids.setdefault(name, str(uuid.uuid4()))
        with node.libvirt() as conn:
            conn.storagePoolDefineXML(
                f"<pool type='dir'><name>{name}</name><uuid>{number}</uuid>"
                f"<target><path>{node.path}/{area}</path></target></pool>"
            )


def inside(node: Node, instance: Any, *, defined: bool = True) -> str:
    """Digest of the disk, as a process on the host reads it."""
    if defined:
        path = str(node.disk(instance))
    else:
        path = node.host.run(["sh", "-c", f"ls {node.path}/incoming/vda.*"]).stdout
    return node.host.run(["sha256sum", path.strip()]).stdout.split()[0]


def overwrite(node: Node, instance: Any) -> bytes:
    """Write to the running guest's first sectors through QEMU's own layer."""
    data = bytes([0x5A]) * 512
    with node.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        command = {
            "execute": "human-monitor-command",
            "arguments": {
                "command-line": "qemu-io -d /machine/peripheral/virtio-disk0/"
                'virtio-backend "write -f -P 0x5a 0 512"'
            },
        }
        answer = libvirt_qemu.qemuMonitorCommand(domain, json.dumps(command), 0)
    assert "error" not in json.loads(answer)
    return data


def expect_owned(world: World, node: Node, instance: Any) -> None:
    """Every volume of the shared directory belongs to the instance."""
    for each in (world.a, world.b):
        assert each.driver.settle() == []
        assert each.driver.open_operations() == []
    record = node.driver.node.entitled(instance.uuid)
    (ref,) = record.disks
    chain = node.driver.node.files.chain(ref.volume)
    found = {name for name in node.files() if name.startswith("disks/")}
    assert found == {f"disks/{volume.name}" for volume in chain}
    assert not [n for n in node.files() if n.startswith(("incoming/", "mailbox/"))]
