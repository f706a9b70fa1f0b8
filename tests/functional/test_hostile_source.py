# SPDX-License-Identifier: Apache-2.0
"""A source that writes what it likes into its peer's mailbox and incoming pools."""

import contextlib
import os
import subprocess
import time
import types
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import Node, World, digest
from tests.functional.test_delta import add_image, move, stand_on
from virtmigrate import errors, model
from virtmigrate.formats import DiskFormat
from virtmigrate.migration import arrival, ticket
from virtmigrate.model import (
    InstanceState,
    Proof,
    Role,
    TransferState,
    VolumeState,
)
from virtmigrate.units import MiB

OPERATION = "fedcba9876543210"
EVIL = "00000000-0000-4000-8000-00000000000e"


def transfer(uuid: str, state: TransferState, **changes: Any) -> model.Transfer:
    made = model.Transfer(
        operation=OPERATION,
        request="-",
        instance=uuid,
        source="alpha",
        peer="beta",
        state=state,
        generation=1,
        volumes=(),
        created=time.time(),
    )
    return msgspec.structs.replace(made, **changes)


def post(node: Node, body: model.Transfer, name: str = OPERATION) -> None:
    """Write a transfer's record as anybody can who may write there."""
    transfers = node.driver.node.mailbox.transfers
    stored = transfers.find(name)
    transfers.publish(name, body, after=stored.generation if stored else 0)


def volume(**changes: Any) -> model.TransferVolume:
    made = model.TransferVolume(
        name=f"vda.{OPERATION}",
        backend="local",
        source="x",
        target="vda",
        role=Role.ROOT,
        format=DiskFormat.RAW,
        size=8 * MiB,
        length=8 * MiB,
        room=0,
    )
    return msgspec.structs.replace(made, **changes)


def state_at(node: Node, operation: str = OPERATION) -> TransferState | None:
    stored = node.driver.node.mailbox.transfers.find(operation)
    return stored.body.state if stored else None


# Giving back


@pytest.mark.parametrize("state", ["returning", "taken", "settled"])
@pytest.mark.parametrize("name", [OPERATION, "0000000000000001"])
def test_a_settle_stops_no_local_guest(world: World, state: str, name: str) -> None:
    victim = world.spawn(world.b)
    own = world.b.driver.node.entitled(victim.uuid)
    said = TransferState(state)
    post(world.b, transfer(victim.uuid, said, operation=OPERATION), name)
    world.b.driver.settle()
    assert world.b.state_of(victim) == "running"
    assert world.b.driver.node.entitled(victim.uuid) == own


def test_a_record_under_another_name_is_passed_over(world: World) -> None:
    """It says the operation by which the instance came, and is not its record."""
    made = world.spawn(world.a)
    world.finish(made, world.migrate(made))
    operation = world.b.driver.node.entitled(made.uuid).operation
    forged = transfer(made.uuid, TransferState.RETURNING, operation=operation)
    post(world.b, forged)
    world.b.driver.settle()
    assert world.b.state_of(made) == "running"


@pytest.mark.parametrize("state", ["taken", "settled"])
def test_destroy_of_a_local_guest_destroys_it(world: World, state: str) -> None:
    victim = world.spawn(world.b)
    post(world.b, transfer(victim.uuid, TransferState(state)))
    world.b.driver.destroy(None, victim)
    assert world.b.state_of(victim) is None
    assert [name for name in world.b.files() if name.startswith("disks/")] == []


def test_what_was_taken_and_not_noted_is_given_back(world: World) -> None:
    """The process died between the two: there is no domain, and the source waits."""
    made = world.spawn(world.a)
    world.migrate(made)
    transfers = world.b.driver.node.mailbox.transfers
    (stored,) = world.b.driver.node.mailbox.open_transfers()
    taken = msgspec.structs.replace(stored.body, state=TransferState.TAKEN)
    transfers.publish(stored.name, taken, after=stored.generation)
    world.revert(made)
    world.expect_one(made, world.a)


def test_what_is_said_gone_is_given_back(world: World) -> None:
    """The process died between GONE in its own record and RETURNED."""
    made = world.spawn(world.a)
    world.finish(made, world.migrate(made))
    here = world.b.driver.node
    (stored,) = here.mailbox.open_transfers()
    returning = msgspec.structs.replace(stored.body, state=TransferState.RETURNING)
    here.mailbox.transfers.publish(stored.name, returning, after=stored.generation)
    here.domains.kill(made.uuid)
    here.domains.undefine(made.uuid)
    gone = msgspec.structs.replace(here.entitled(made.uuid), state=InstanceState.GONE)
    here.publish_instance(gone)
    world.b.new_driver()
    assert state_at(world.b, stored.name) is TransferState.RETURNED
    world.a.driver.finish_revert_migration(None, made)
    world.expect_one(made, world.a)


# Taking


def accept_moves(node: Node) -> None:
    node.overrides["accept_moves"] = True
    node.new_driver()


def test_a_move_of_what_is_here_is_refused(world: World) -> None:
    accept_moves(world.b)
    victim = world.spawn(world.b)
    before = world.b.driver.node.entitled(victim.uuid)
    wanted = msgspec.structs.replace(
        before, disks=(), operation=OPERATION, domain_xml=world.b.xml(victim)
    )
    post(world.b, transfer(victim.uuid, TransferState.GIVEN, record=wanted))
    with pytest.raises(errors.Error):
        world.a.driver.peer(world.b.host.name).finish(OPERATION)
    assert world.b.driver.node.instances.read(victim.uuid).body == before
    assert state_at(world.b) is TransferState.GIVEN


def test_a_move_over_a_domain_without_a_record_is_refused(world: World) -> None:
    made = world.spawn(world.a)
    ticket = world.migrate(made)
    with world.b.libvirt() as conn:
        conn.defineXML(
            "<domain type='qemu'><name>other</name><memory unit='MiB'>16</memory>"
            f"<uuid>{made.uuid}</uuid><os><type>hvm</type></os></domain>"
        )
    with pytest.raises(errors.NotEntitled):
        world.finish(made, ticket)
    with world.b.libvirt() as conn:
        conn.lookupByUUIDString(made.uuid).undefine()
    world.finish(made, ticket)


def test_a_ticket_brings_no_other_instance(world: World) -> None:
    """The caller wants one, its source's ticket says so, and the record another."""
    wanted = world.spawn(world.a)
    own = world.a.driver.node.entitled(wanted.uuid)
    other = msgspec.structs.replace(
        own,
        uuid=EVIL,
        disks=(),
        operation=OPERATION,
        domain_xml=f"<domain type='qemu'><name>evil</name><uuid>{EVIL}</uuid>"
        "<memory unit='MiB'>16</memory><vcpu>1</vcpu><os><type>hvm</type></os>"
        "<devices/></domain>",
    )
    given = transfer(EVIL, TransferState.GIVEN, record=other)
    post(world.b, given)
    forged = msgspec.structs.replace(ticket.of(given), instance=wanted.uuid)
    with pytest.raises(errors.TicketDamaged):
        world.finish(wanted, ticket.write(forged))
    assert world.b.driver.list_instances() == []
    assert state_at(world.b) is TransferState.GIVEN


def evil(
    world: World, sent: model.TransferVolume, disk: str, firmware: str = ""
) -> Path:
    """Give b an instance that has, by its record, a disk; return the victim's."""
    accept_moves(world.b)
    victim = world.spawn(world.b)
    own = world.b.driver.node.entitled(victim.uuid)
    (ref,) = own.disks
    world.b.driver.power_off(victim)
    path = world.b.disk(victim)
    if sent.shared:
        sent = msgspec.structs.replace(sent, name=ref.volume)
    xml = world.b.xml(victim).replace(victim.uuid, EVIL).replace(victim.name, "evil")
    xml = xml.replace("</os>", f"{firmware}</os>")
    wanted = msgspec.structs.replace(
        own,
        uuid=EVIL,
        name="evil",
        operation=OPERATION,
        domain_xml=xml,
        power="running",
        disks=(msgspec.structs.replace(ref, volume=disk or ref.volume),),
    )
    given = transfer(EVIL, TransferState.GIVEN, volumes=(sent,), record=wanted)
    post(world.b, given)
    return path


def finish_evil(world: World) -> list[str]:
    """Let b's receiver finish it; return the domains that b has then."""
    with contextlib.suppress(errors.Error):
        world.a.driver.peer(world.b.host.name).finish(OPERATION)
    return world.b.driver.list_instances()


def test_another_instances_disk_is_not_shared(world: World) -> None:
    evil(world, volume(shared=True), "")
    assert "evil" not in finish_evil(world)
    assert state_at(world.b) is TransferState.GIVEN


def test_another_instances_disk_is_not_the_disk(world: World) -> None:
    evil(world, volume(), "")
    (world.b.path / "incoming" / f"vda.{OPERATION}").write_bytes(bytes(8 * MiB))
    assert "evil" not in finish_evil(world)


def test_another_instances_file_is_not_its_variables(world: World) -> None:
    victim = world.tmp / "victim"
    victim.write_bytes(bytes(4096))
    firmware = (
        "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        f"<nvram>{victim}</nvram>"
    )
    evil(world, volume(), f"vda.{OPERATION}", firmware)
    (world.b.path / "incoming" / f"vda.{OPERATION}").write_bytes(bytes(8 * MiB))
    assert "evil" not in finish_evil(world)


def test_another_instances_disk_is_not_below(world: World) -> None:
    victim = world.spawn(world.b)
    (ref,) = world.b.driver.node.entitled(victim.uuid).disks
    world.b.driver.power_off(victim)
    evil(world, volume(format=DiskFormat.QCOW2, backing=ref.volume), f"vda.{OPERATION}")
    path = world.b.path / "incoming" / f"vda.{OPERATION}"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", path, "8M"], check=True)
    assert "evil" not in finish_evil(world)


def test_a_header_that_names_a_data_file_is_refused(world: World) -> None:
    """QEMU would open it, whatever the domain says of the chain."""
    disk = evil(world, volume(format=DiskFormat.QCOW2), f"vda.{OPERATION}")
    path = world.b.path / "incoming" / f"vda.{OPERATION}"
    options = f"data_file={disk},data_file_raw=on"
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", options, path, "8M"], check=True
    )
    assert "evil" not in finish_evil(world)
    assert state_at(world.b) is TransferState.GIVEN


def test_a_header_that_is_changed_after_the_take_is_refused(world: World) -> None:
    """The source can write to it until it is imported."""
    disk = evil(world, volume(format=DiskFormat.QCOW2), f"vda.{OPERATION}")
    path = world.b.path / "incoming" / f"vda.{OPERATION}"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", path, "8M"], check=True)
    demanded = arrival.Arrival.demand_whole

    def then_changed(self: arrival.Arrival) -> None:
        demanded(self)
        header = bytearray(path.read_bytes())
        header[79] |= 4
        path.write_bytes(header)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrival.Arrival, "demand_whole", then_changed)
        assert "evil" not in finish_evil(world)
    assert state_at(world.b) is TransferState.TAKEN
    assert disk.exists()
    world.b.driver.destroy(None, types.SimpleNamespace(uuid=EVIL))
    assert state_at(world.b) is TransferState.RETURNED
    assert not [n for n in world.b.files() if OPERATION in n and "mailbox" not in n]


def test_what_is_no_qcow2_is_not_imported_as_one(world: World) -> None:
    evil(world, volume(format=DiskFormat.QCOW2), f"vda.{OPERATION}")
    (world.b.path / "incoming" / f"vda.{OPERATION}").write_bytes(bytes(8 * MiB))
    assert "evil" not in finish_evil(world)
    assert state_at(world.b) is TransferState.GIVEN


# Reservations


def huge(**changes: Any) -> model.Transfer:
    return transfer(EVIL, TransferState.RESERVED, generation=0, **changes)


def test_a_reservation_larger_than_the_pool_keeps_nobody_out(world: World) -> None:
    post(world.b, huge(volumes=(volume(room=2**60),)))
    made = world.spawn(world.a)
    world.finish(made, world.migrate(made))
    assert world.b.state_of(made) == "running"


def test_a_reservation_of_the_future_is_reclaimed(world: World) -> None:
    post(world.b, huge(created=1e15))
    world.b.driver.settle()
    assert state_at(world.b) is TransferState.RESERVED
    age = world.b.driver.node.options.reclaim_age + 10
    for path in (world.b.path / "mailbox").rglob(f"{OPERATION}.rec.*"):
        os.utime(path, (time.time() - age,) * 2)
    world.b.driver.node.mailbox.pool.refresh()
    world.b.driver.settle()
    assert state_at(world.b) is TransferState.WITHDRAWN


# Images


IMAGES: list[dict[str, Any]] = [
    {"format": DiskFormat.QCOW2},
    {"size": 64 * MiB},
    {"backing": "other"},
    {"proof": Proof.SAMPLED},
]


@pytest.mark.parametrize("changes", IMAGES, ids=["format", "size", "backing", "proof"])
def test_an_image_is_the_one_that_was_meant(
    world: World, changes: dict[str, Any]
) -> None:
    """Between the hold and the arrival it became another, of the same digest."""
    content = os.urandom(32 * MiB)
    image = add_image(world.a, content, "image-here")
    theirs = add_image(world.b, content, "image-there")
    made = world.spawn(world.a)
    stand_on(world, world.a, made, image)
    ticket = world.migrate(made)
    (stored,) = world.b.driver.node.mailbox.open_transfers()
    assert any(each.held for each in stored.body.volumes)
    backend = world.b.driver.node.backend("local")
    backend.update(
        msgspec.structs.replace(backend.volumes.read(theirs.name).body, **changes)
    )
    with pytest.raises(errors.RecordBroken, match="not the image"):
        world.finish(made, ticket)


# Merging


def test_nothing_is_merged_into_an_image(world: World) -> None:
    image = add_image(world.b, os.urandom(8 * MiB), "image-b")
    victim = world.spawn(world.b)
    stand_on(world, world.b, victim, image)
    world.b.driver.power_on(None, victim)
    top, before = world.b.disk(victim), digest(Path(image.path))
    operation = world.b.driver.node.entitled(victim.uuid).operation
    layer = volume(
        name="vda.overlay", format=DiskFormat.QCOW2, backing=image.name, shared=True
    )
    # One that knows nothing, and one that knows how the instance came to be.
    for each in (OPERATION, operation):
        forged = transfer(victim.uuid, TransferState.CONFIRMED, operation=each)
        post(world.b, msgspec.structs.replace(forged, volumes=(layer,)), each)
    world.b.driver.settle()
    assert world.b.disk(victim) == top
    assert digest(Path(image.path)) == before


def arrived_on_a_layer(world: World) -> tuple[Any, str]:
    """An instance that came by a shared move; and the move's operation."""
    world.share()
    made = world.spawn(world.a)
    world.finish(made, world.migrate(made))
    return made, world.b.driver.node.entitled(made.uuid).operation


def test_a_shared_base_that_is_not_frozen_is_refused(world: World) -> None:
    world.share()
    made = world.spawn(world.a)
    ticket = world.migrate(made)
    backend = world.a.driver.node.backend("local")
    (base,) = [
        stored.body
        for name in backend.volumes.names()
        if (stored := backend.volumes.find(name)) and not stored.body.backing
    ]
    backend.update(msgspec.structs.replace(base, state=VolumeState.USABLE))
    with pytest.raises(errors.RecordBroken, match="not the instance's"):
        world.finish(made, ticket)


@pytest.mark.parametrize("dies_in", ["update", "remove"])
def test_a_merge_that_died_is_gone_on_with(world: World, dies_in: str) -> None:
    made, _ = arrived_on_a_layer(world)
    world.confirm(made)
    backend = world.b.driver.node.backend("local")

    def die(*_: object) -> None:
        raise OSError("died")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, dies_in, die)
        assert world.b.driver.settle() != []
    assert world.b.driver.settle() == []
    (ref,) = world.b.driver.node.entitled(made.uuid).disks
    (disk,) = backend.chain(ref.volume)
    assert disk.state is VolumeState.USABLE
    assert [n for n in world.b.files() if n.startswith("disks/")] == [
        f"disks/{disk.name}"
    ]


def test_a_layer_is_merged_into_its_own_disk_only(world: World) -> None:
    """The source that gave it says at last that the layer is another disk's."""
    made, operation = arrived_on_a_layer(world)
    stored = world.b.driver.node.mailbox.transfers.find(operation)
    assert stored is not None
    top = world.b.disk(made)
    (layer,) = stored.body.volumes
    forged = msgspec.structs.replace(
        stored.body,
        state=TransferState.CONFIRMED,
        volumes=(msgspec.structs.replace(layer, target="vdb"),),
    )
    post(world.b, forged, operation)
    world.b.driver.settle()
    assert world.b.disk(made) == top


# What lies in the mailbox


def make_directory(node: Node, pool: str, name: str) -> Path:
    with node.libvirt() as conn:
        found = conn.storagePoolLookupByName(pool)
        made = found.createXML(
            f"<volume><name>{name}</name><capacity>0</capacity>"
            "<target><format type='dir'/></target></volume>"
        )
        return Path(made.path())


@pytest.mark.parametrize("name", ["deadbeefdeadbeef.rec.1", f"{OPERATION}.rec.9"])
def test_a_directory_in_the_mailbox_stops_nobody(world: World, name: str) -> None:
    made = world.spawn(world.b)
    post(world.b, transfer(EVIL, TransferState.WITHDRAWN))
    path = make_directory(world.b, "virtmigrate-mailbox", name)
    try:
        assert state_at(world.b) is TransferState.WITHDRAWN
        assert world.b.driver.settle() == []
        world.b.driver.destroy(None, made)
    finally:
        path.rmdir()
    assert world.b.state_of(made) is None


# What a destroyed instance left


def test_retired_disks_go_with_the_instance(world: World) -> None:
    for node in (world.a, world.b):
        node.overrides["keep_retired"] = True
        node.new_driver()
    made = world.spawn(world.a)
    move(world, made, world.a, world.b)
    world.b.driver.destroy(None, made)
    assert any(name.startswith("disks/") for name in world.a.files())
    world.a.driver.destroy(None, made)
    assert [n for n in world.a.files() if n.startswith(("disks/", "records/"))] == []
