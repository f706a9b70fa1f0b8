# SPDX-License-Identifier: Apache-2.0
"""Snapshots of instances that have more than one plain disk."""

import types
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import World
from tests.functional.guestdisk import byte, power, write
from virtmigrate import consistency, errors
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted
from virtmigrate.units import MiB


def two_disks(world: World) -> Any:
    made = world.instance(ephemeral_gb=1)
    meta = {"path": str(world.image()), "disk_format": "raw"}
    world.a.driver.spawn(None, made, meta)
    return made


@pytest.mark.parametrize("state", ["running", "off"])
def test_two_disks(world: World, state: str) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    guest = two_disks(world)
    uuid = guest.uuid
    second = a.driver.node.entitled(uuid).disks[1]
    for number in (1, 2):
        write(a, guest, number)
        write(a, guest, number, disk=1)
        power(a, guest, state)
        snapshots.create(uuid, Wanted(f"s{number}"))
        a.driver.power_on(None, guest, None)
    snapshots.create(uuid, Wanted("one", left_out=frozenset({second.target})))
    write(a, guest, 3)
    write(a, guest, 3, disk=1)
    power(a, guest, state)
    # What was left out goes on.
    snapshots.revert(uuid, Return("one"))
    assert (byte(world, guest), byte(world, guest, target=second.target)) == (2, 3)
    snapshots.revert(uuid, Return("s1"))
    assert (byte(world, guest), byte(world, guest, target=second.target)) == (1, 1)
    snapshots.delete(uuid, "s1", children=True)
    assert (byte(world, guest), byte(world, guest, target=second.target)) == (1, 1)
    owned = [s for s in a.driver.node.files.catalog.all() if s.body.owner == uuid]
    assert len(owned) == 2
    assert consistency.check(a.driver.node) == []


def test_two_disks_inside(world: World) -> None:
    a, snapshots = world.a, world.a.driver.snapshots
    guest = two_disks(world)
    uuid = guest.uuid
    targets = [ref.target for ref in a.driver.node.entitled(uuid).disks]
    snapshots.create(uuid, Wanted("layers"))
    write(a, guest, 1)
    write(a, guest, 1, disk=1)
    places = dict.fromkeys(targets, Place.INTERNAL)
    inside = Wanted("in", Kind.CHECKPOINT, Memory.INTERNAL, places=places)
    snapshots.create(uuid, inside)
    write(a, guest, 2)
    write(a, guest, 2, disk=1)
    snapshots.revert(uuid, Return("layers"))
    snapshots.revert(uuid, Return("in"))
    assert [byte(world, guest, target=each) for each in targets] == [1, 1]
    snapshots.revert(uuid, Return("layers"))
    # Its volumes are not those that the guest runs with.
    snapshots.delete(uuid, "in")
    snapshots.delete(uuid, "layers")
    owned = [s for s in a.driver.node.files.catalog.all() if s.body.owner == uuid]
    assert len(owned) == 2
    assert consistency.check(a.driver.node) == []


def test_a_clone_of_an_image(world: World) -> None:
    """The image that many stand on is read only, whatever is merged."""
    a, snapshots = world.a, world.a.driver.snapshots
    image: Path = world.image()
    guest = types.SimpleNamespace(
        uuid=str(uuid.uuid4()), name="clone", flavor=world.flavor()
    )
    meta = {"path": str(image), "disk_format": "raw", "id": "image"}
    a.driver.spawn(None, guest, meta)
    (ref,) = a.driver.node.entitled(guest.uuid).disks
    chain = a.driver.node.files.chain(ref.volume)
    below = Path(chain[-1].path)
    before = below.read_bytes()
    for number in (1, 2, 3):
        write(a, guest, number)
        snapshots.create(guest.uuid, Wanted(f"s{number}"))
    write(a, guest, 4)
    snapshots.revert(guest.uuid, Return("s2", keep="last"))
    assert byte(world, guest) == 2
    snapshots.revert(guest.uuid, Return("last"))
    for name in ("s1", "s3", "s2", "last"):
        snapshots.delete(guest.uuid, name)
    assert byte(world, guest) == 4
    assert len(a.driver.node.files.chain(ref.volume)) == len(chain)
    if len(chain) > 1:
        assert below.read_bytes() == before
    assert consistency.check(a.driver.node) == []


def test_firmware_variables_and_a_config_drive(world: World) -> None:
    """No snapshot freezes them, and none loses them."""
    a, snapshots = world.a, world.a.driver.snapshots
    firmware = Path("/usr/share/OVMF")
    guest = world.instance()
    guest.config_drive_path = str(world.image(MiB, seed=7))
    meta = {
        "path": str(world.image()),
        "disk_format": "raw",
        "loader": str(firmware / "OVMF_CODE_4M.fd"),
        "nvram_template": str(firmware / "OVMF_VARS_4M.fd"),
    }
    a.driver.spawn(None, guest, meta)
    refs = a.driver.node.entitled(guest.uuid).disks
    assert len(refs) == 3
    write(a, guest, 1)
    snapshots.create(guest.uuid, Wanted("disk"))
    write(a, guest, 2)
    inside = Wanted("in", Kind.CHECKPOINT, Memory.INTERNAL, {"vda": Place.INTERNAL})
    with pytest.raises(errors.SnapshotRefused, match="firmware"):
        snapshots.create(guest.uuid, inside)
    snapshots.create(guest.uuid, Wanted("all", Kind.CHECKPOINT, Memory.EXTERNAL))
    for name, expected in {"disk": 1, "all": 2}.items():
        snapshots.revert(guest.uuid, Return(name))
        assert byte(world, guest) == expected
        assert a.state_of(guest) == "running"
    snapshots.delete(guest.uuid, "disk", children=True)
    now = a.driver.node.entitled(guest.uuid)
    assert {ref.role for ref in now.disks} == {ref.role for ref in refs}
    assert now.detached == ()
    assert consistency.check(a.driver.node) == []
    a.driver.destroy(None, guest, None)
    assert a.files() == []
