# SPDX-License-Identifier: Apache-2.0
"""Each line of the table of snapshots that files can have, on a real QEMU.

What it calls possible is taken, gone back to, branched and deleted; what it refuses is
refused for the reason that it gives. States that backends keep have tests of their own.
"""

import re
from typing import Any

import pytest

from tests.functional.conftest import Node, World
from tests.functional.guestdisk import byte, write
from tests.functional.test_snapshots import expect_volumes
from virtmigrate import errors
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted, rules
from virtmigrate.snapshottree import Taken

DISKS = ("vda", "vdb")


@pytest.mark.parametrize("taken", Taken, ids=lambda each: each.value)
def test_table_is_true(world: World, taken: Taken) -> None:
    guest = world.spawn(world.a, ephemeral_gb=1)
    # From here on the disks are qcow2.
    world.a.driver.snapshots.create(guest.uuid, Wanted("layers"))
    found = [each for each in rules.cases() if each.taken is taken]
    for case in (each for each in found if Place.OWN not in each.places):
        turn(world.a, guest, taken)
        if not rules.create(case).possible:
            expect_refused(world, guest, case)
        elif not case.quiesced:  # There is no system to freeze anything.
            go_there_and_back(world, guest, case)
    expect_volumes(world.a, guest, 4)


def expect_refused(world: World, guest: Any, case: rules.Case) -> None:
    snapshots = world.a.driver.snapshots
    before = snapshots.all(guest.uuid)
    reason = re.escape(rules.create(case).said)
    with pytest.raises(errors.SnapshotRefused, match=reason):
        snapshots.create(guest.uuid, wanted(case))
    assert snapshots.all(guest.uuid) == before


def go_there_and_back(world: World, guest: Any, case: rules.Case) -> None:
    a, snapshots, uuid = world.a, world.a.driver.snapshots, guest.uuid
    change(a, guest, 1, case.taken)
    made = snapshots.create(uuid, wanted(case))
    assert power(a, guest) is case.taken, case
    change(a, guest, 2, case.taken)
    snapshots.revert(uuid, Return("case", keep="beside"))
    assert (byte(world, guest), power(a, guest)) == (1, case.taken), case
    tree, current = snapshots.all(uuid)
    parents = {each.name: each.parent for each in tree}
    assert (parents["beside"], current) == (made.id, made.id)
    snapshots.revert(uuid, Return("beside"))
    assert byte(world, guest) == 2, case
    for name in ("case", "beside"):
        snapshots.delete(uuid, name)
    assert (byte(world, guest), power(a, guest)) == (2, case.taken), case


def wanted(case: rules.Case) -> Wanted:
    order = sorted(case.places, key=list(Place).index)
    places = dict(zip(DISKS, order * len(DISKS), strict=False))
    return Wanted(
        "case",
        kind=Kind.DISK if case.memory is Memory.NONE else Kind.CHECKPOINT,
        memory=case.memory,
        places=places,
        left_out=frozenset(DISKS) - frozenset(places),
        quiesce=case.quiesced,
    )


def power(node: Node, guest: Any) -> Taken:
    state = node.state_of(guest)
    return Taken.OFF if state == "shutoff" else Taken(state)


def turn(node: Node, guest: Any, to: Taken) -> None:
    """Bring the guest into a state."""
    now = power(node, guest)
    if now is to:
        return
    if to is Taken.OFF:
        node.driver.power_off(guest)
        return
    if now is Taken.OFF:
        node.driver.power_on(None, guest, None)
    if to is Taken.PAUSED:
        node.driver.pause(guest)
    else:
        node.driver.unpause(guest)


def change(node: Node, guest: Any, value: int, taken: Taken) -> None:
    """Have something else on the disk.

    A QEMU has to be there, and one that was paused when its memory was written has
    given its disks up until it goes on.
    """
    turn(node, guest, Taken.RUNNING)
    write(node, guest, value)
    turn(node, guest, taken)
