# SPDX-License-Identifier: Apache-2.0
"""What a source may not have done at a peer by what it writes into the mailbox."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional import livehosts
from tests.functional.conftest import World
from virtmigrate import errors, model
from virtmigrate.livemigration.departure import Departure
from virtmigrate.model import TransferState
from virtmigrate.request import Verb

OTHER = str(uuid.UUID(int=7))


@pytest.fixture
def hosts(world: World) -> Iterator[World]:
    livehosts.accept(world)
    yield world


def planned(world: World, instance: Any) -> model.Transfer:
    """The transfer that a live move of an instance begins with."""
    live = world.a.driver.live
    transfer = live._plan(instance.uuid, world.b.host.name, _options()).transfer
    return msgspec.structs.replace(transfer, created=time.time())


def _options() -> Any:
    from virtmigrate.livemigration import Options

    return Options()


def write(world: World, transfer: model.Transfer) -> None:
    """Put a transfer into the peer's mailbox, over what is there of it."""
    store = world.b.driver.node.mailbox.transfers
    found = store.find(transfer.operation)
    store.publish(transfer.operation, transfer, after=found.generation if found else 0)


def there(world: World, operation: str) -> model.Transfer:
    return world.b.driver.node.mailbox.transfers.read(operation).body


def expect(world: World, transfer: model.Transfer) -> model.Transfer:
    """Have the peer wait for it."""
    write(world, transfer)
    world.b.driver.live.arrivals.expect(transfer)
    return there(world, transfer.operation)


def arrive(world: World, transfer: model.Transfer) -> None:
    write(world, transfer)
    world.b.driver.live.actions()[Verb.ARRIVE](transfer)


def test_a_path_for_a_uuid_removes_nothing(hosts: World) -> None:
    instance = hosts.spawn(hosts.a)
    victim = hosts.tmp / "victim"
    victim.touch()
    transfer = planned(hosts, instance)
    for state in (TransferState.WITHDRAWN, TransferState.RESERVED):
        hostile = msgspec.structs.replace(
            transfer, instance=str(victim), state=state, created=0.0
        )
        write(hosts, hostile)
        hosts.b.driver.settle()
        with pytest.raises(errors.NotEntitled):
            hosts.b.driver.live.arrivals.expect(hostile)
    assert victim.exists()


def test_volumes_of_another_stay(hosts: World) -> None:
    """Named as this operation's would be; the peer knows it from an earlier move."""
    victim, instance = hosts.spawn(hosts.b), hosts.spawn(hosts.a)
    disk = hosts.b.disk(victim)
    operation = disk.name.partition(".")[2]
    transfer = planned(hosts, instance)
    stolen = msgspec.structs.replace(transfer.volumes[0], name=disk.name)
    record = transfer.record
    assert record is not None
    refs = tuple(msgspec.structs.replace(ref, volume=disk.name) for ref in record.disks)
    hostile = msgspec.structs.replace(
        transfer,
        operation=operation,
        volumes=(stolen,),
        record=msgspec.structs.replace(record, disks=refs, operation=operation),
    )
    with pytest.raises(errors.RecordBroken, match="belongs to"):
        expect(hosts, hostile)
    write(hosts, msgspec.structs.replace(hostile, state=TransferState.WITHDRAWN))
    # Nothing of it is this operation's; it is said, and nothing is touched.
    hosts.b.driver.settle()
    assert disk.exists() and hosts.b.state_of(victim) == "running"


@pytest.mark.parametrize("state", [TransferState.WITHDRAWN, TransferState.TAKEN])
def test_what_was_noted_is_what_counts(hosts: World, state: TransferState) -> None:
    """A transfer that becomes another instance's, after it was waited for."""
    victim, instance = hosts.spawn(hosts.b), hosts.spawn(hosts.a)
    before = hosts.b.driver.node.instances.read(victim.uuid).body
    found = expect(hosts, planned(hosts, instance))
    assert found.record is not None
    record = msgspec.structs.replace(found.record, uuid=victim.uuid)
    hostile = msgspec.structs.replace(
        found, instance=victim.uuid, record=record, state=state
    )
    with contextlib.suppress(errors.Error):
        arrive(hosts, hostile)
    hosts.b.driver.settle()
    assert hosts.b.state_of(victim) == "running"
    assert hosts.b.driver.node.instances.read(victim.uuid).body == before


def test_only_the_noted_configuration_is_started(hosts: World) -> None:
    """Not one that the transfer says when the right is given."""
    instance = hosts.spawn(hosts.a)
    found = expect(hosts, planned(hosts, instance))
    assert found.record is not None
    text = str(found.record.domain_xml).replace("<vcpu", "<title>mine</title><vcpu")
    record = msgspec.structs.replace(found.record, domain_xml=text)
    taken = msgspec.structs.replace(found, record=record, state=TransferState.TAKEN)
    with pytest.raises(errors.NotEntitled, match="not what this host waits for"):
        arrive(hosts, taken)
    assert hosts.b.state_of(instance) is None


@pytest.mark.parametrize(
    "added",
    [
        "<disk type='block' device='disk'><driver name='qemu' type='raw'/>"
        "<source dev='/dev/loop0'/><backingStore/><target dev='vdz' bus='virtio'/>"
        "</disk>",
        "<hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/>"
        "<product id='0x2'/></source></hostdev>",
    ],
    ids=["disk", "device"],
)
def test_a_configuration_with_more_than_its_disks(hosts: World, added: str) -> None:
    transfer = planned(hosts, hosts.spawn(hosts.a))
    assert transfer.record is not None
    text = str(transfer.record.domain_xml).replace("</devices>", f"{added}</devices>")
    record = msgspec.structs.replace(transfer.record, domain_xml=text)
    with pytest.raises(errors.RecordBroken, match="its domain has disks"):
        expect(hosts, msgspec.structs.replace(transfer, record=record))


def test_what_failed_is_cleaned_up_before_the_next(
    hosts: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of one move does not end the guest that another brought."""
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    real = Departure.leave

    def fail(self: Departure) -> None:
        b.host.link(up=False)
        raise errors.MigrationError(
            instance=instance.uuid, operation="-", reason="as wished"
        )

    monkeypatch.setattr(Departure, "leave", fail)
    with pytest.raises(errors.MigrationError):
        a.driver.live.migrate(instance.uuid, b.host.name)
    monkeypatch.setattr(Departure, "leave", real)
    b.host.link(up=True)
    for transfer in b.driver.node.mailbox.open_transfers():
        withdrawn = TransferState.WITHDRAWN
        write(hosts, msgspec.structs.replace(transfer.body, state=withdrawn))
    a.driver.live.migrate(instance.uuid, b.host.name)
    assert livehosts.settle(hosts) == []
    hosts.expect_one(instance, b)


def test_a_lost_mailbox_costs_no_copy(
    hosts: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the peer has it, durable, it said before; or the source keeps its copy."""
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    disk: Path = a.disk(instance)
    monkeypatch.setattr(Departure, "finish", lambda self: "later")
    a.driver.live.migrate(instance.uuid, b.host.name)
    monkeypatch.undo()
    (found,) = b.driver.node.mailbox.open_transfers()
    b.driver.node.mailbox.transfers.remove(found.name)
    (owed,) = a.driver.live.recover()
    assert "its transfer is gone there" in owed
    assert disk.exists()


def test_a_consent_ends(world: World) -> None:
    """One to a move that never came: its instance is not awaited for ever."""
    instance, b = world.spawn(world.a), world.b
    b.driver.pre_live_migration(None, instance)
    (path,) = (b.state / "awaited").iterdir()
    os.utime(path, (0, 0))
    with pytest.raises(errors.MigrationRefused, match="does not await it"):
        world.a.driver.live.migrate(instance.uuid, b.host.name)
    assert livehosts.settle(world) == []
    assert not path.exists()
    b.driver.pre_live_migration(None, instance)
    world.a.driver.live.migrate(instance.uuid, b.host.name)
    world.expect_one(instance, b)
    assert not path.exists()
