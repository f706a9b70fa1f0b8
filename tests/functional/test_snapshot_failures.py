# SPDX-License-Identifier: Apache-2.0
"""Changes of snapshots that fail: all is as it was, and says why."""

from typing import Any

import pytest

from tests.functional.conftest import World
from tests.functional.guestdisk import byte, write
from virtmigrate import consistency, errors
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted


@pytest.fixture
def guest(world: World) -> Any:
    made = world.spawn(world.a)
    write(world.a, made, 1)
    return made


def checkpoint(name: str, **fields: Any) -> Wanted:
    return Wanted(name, kind=Kind.CHECKPOINT, memory=Memory.EXTERNAL, **fields)


@pytest.mark.parametrize("place", [Place.EXTERNAL, Place.INTERNAL], ids=str)
def test_memory_is_written_once_while_paused(
    world: World, guest: Any, place: Place
) -> None:
    a, snapshots, uuid = world.a, world.a.driver.snapshots, guest.uuid
    a.driver.pause(guest)
    snapshots.create(uuid, checkpoint("first"))
    files = a.files()
    with pytest.raises(errors.SnapshotFailed, match="let it run"):
        snapshots.create(uuid, checkpoint("second", places={"vda": place}))
    assert [n for n in a.files() if "instances" not in n] == [
        n for n in files if "instances" not in n
    ]
    assert a.state_of(guest) == "paused"
    assert consistency.check(a.driver.node) == []
    a.driver.unpause(guest)
    snapshots.create(uuid, checkpoint("second", places={"vda": place}))
    snapshots.revert(uuid, Return("first"))
    assert byte(world, guest) == 1
