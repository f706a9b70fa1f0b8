# SPDX-License-Identifier: Apache-2.0
"""A peer that hands over an instance with snapshots that are none of its own."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import World
from virtmigrate import errors, model
from virtmigrate.migration import departure
from virtmigrate.snapshot import Kind, Wanted
from virtmigrate.snapshottree import Snapshot

STRANGER = "00000000-0000-4000-8000-000000000000"
Change = Callable[[model.Instance, str], model.Instance]


def with_first(found: model.Instance, **changes: Any) -> model.Instance:
    first = msgspec.structs.replace(found.snapshots[0], **changes)
    return msgspec.structs.replace(found, snapshots=(first, *found.snapshots[1:]))


def another_volume(found: model.Instance, victim: str) -> model.Instance:
    (disk,) = found.snapshots[0].disks
    return with_first(found, disks=(msgspec.structs.replace(disk, volume=victim),))


def another_memory(found: model.Instance, victim: str) -> model.Instance:
    (disk,) = found.snapshots[0].disks
    return with_first(found, memory_volume=victim, memory_backend=disk.backend)


def another_disk(found: model.Instance, victim: str) -> model.Instance:
    text = found.snapshots[0].domain_xml
    more = "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
    more += "<source file='/etc/passwd'/><target dev='vdz' bus='virtio'/></disk>"
    return with_first(found, domain_xml=text.replace("<devices>", "<devices>" + more))


def another_instance(found: model.Instance, victim: str) -> model.Instance:
    text = found.snapshots[0].domain_xml
    return with_first(found, domain_xml=text.replace(found.uuid, STRANGER))


def another_main(found: model.Instance, victim: str) -> model.Instance:
    text = str(found.domain_xml).replace(found.uuid, STRANGER)
    return msgspec.structs.replace(found, domain_xml=text)


def circle(found: model.Instance, victim: str) -> model.Instance:
    return with_first(found, parent=found.snapshots[1].id)


def twice(found: model.Instance, victim: str) -> model.Instance:
    return with_first(found, id=found.snapshots[1].id)


def no_id(found: model.Instance, victim: str) -> model.Instance:
    return with_first(found, id="../../x")


@pytest.mark.parametrize(
    "change",
    [
        another_volume,
        another_memory,
        another_disk,
        another_instance,
        another_main,
        circle,
        twice,
        no_id,
    ],
    ids=lambda each: each.__name__,
)
def test_it_is_not_taken(
    world: World, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world.b.driver.node
    neighbour = world.spawn(world.b)
    (theirs,) = here.entitled(neighbour.uuid).disks
    instance = world.spawn(world.a)
    for number in range(2):
        wanted = Wanted(f"s{number}", kind=Kind.CHECKPOINT)
        made: Snapshot = world.a.driver.snapshots.create(instance.uuid, wanted)
        assert made.name == wanted.name
    honest = departure.Departure._at_peer

    def hostile(self: departure.Departure) -> model.Instance:
        return change(honest(self), theirs.volume)

    monkeypatch.setattr(departure.Departure, "_at_peer", hostile)
    ticket = world.migrate(instance)
    monkeypatch.undo()
    with pytest.raises(errors.RecordBroken):
        world.finish(instance, ticket)
    assert world.b.state_of(instance) is None
    assert here.instances.find(instance.uuid) is None
    # The source has it still.
    world.revert(instance)
    assert world.a.state_of(instance) == "running"
