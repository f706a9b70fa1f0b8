# SPDX-License-Identifier: Apache-2.0
"""Snapshots of instances that have more than one plain disk."""

import types
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import Node, World
from tests.functional.guestdisk import byte, power, write
from virtmigrate import consistency, domainstate, errors, model
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted
from virtmigrate.units import KiB, MiB


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


def with_firmware(world: World) -> Any:
    """An instance with UEFI variables, and a config drive."""
    firmware = Path("/usr/share/OVMF")
    guest = world.instance()
    guest.config_drive_path = str(world.image(MiB, seed=7))
    meta = {
        "path": str(world.image()),
        "disk_format": "raw",
        "loader": str(firmware / "OVMF_CODE_4M.fd"),
        "nvram_template": str(firmware / "OVMF_VARS_4M.fd"),
    }
    world.a.driver.spawn(None, guest, meta)
    return guest


def test_firmware_variables_and_a_config_drive(world: World) -> None:
    """No snapshot freezes them, and none loses them."""
    a, snapshots = world.a, world.a.driver.snapshots
    guest = with_firmware(world)
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


MARK = 300 * KiB
"""Where nobody but these tests writes to the variables."""


def variables(world: World, guest: Any, node: Node | None = None) -> Path:
    here = (node or world.a).driver.node
    refs = here.entitled(guest.uuid).disks
    (ref,) = (each for each in refs if each.role is model.Role.NVRAM)
    return Path(here.files.disks.volume_path(ref.volume))


def mark(world: World, guest: Any, value: int) -> None:
    """Change the variables, as the firmware would in the file."""
    with variables(world, guest).open("r+b") as file:
        file.seek(MARK)
        file.write(bytes([value]))


def marked(world: World, guest: Any, node: Node | None = None) -> int:
    return variables(world, guest, node).read_bytes()[MARK]


@pytest.mark.parametrize("state", ["running", "paused", "off"])
def test_firmware_variables_come_back_with_a_checkpoint(
    world: World, state: str
) -> None:
    """With a disk snapshot only if the configuration is asked for."""
    a, snapshots, guest = world.a, world.a.driver.snapshots, with_firmware(world)
    power(a, guest, state)
    mark(world, guest, 1)
    snapshots.create(guest.uuid, Wanted("disk"))
    mark(world, guest, 2)
    snapshots.create(guest.uuid, Wanted("all", Kind.CHECKPOINT))
    assert a.state_of(guest) == {"off": "shutoff"}.get(state, state)
    mark(world, guest, 3)
    snapshots.revert(guest.uuid, Return("disk", keep="kept", power="off"))
    assert marked(world, guest) == 3
    snapshots.revert(guest.uuid, Return("all", power="off"))
    assert marked(world, guest) == 2
    back = Return("disk", configuration=True, power="off")
    snapshots.revert(guest.uuid, back)
    assert marked(world, guest) == 1
    snapshots.revert(guest.uuid, Return("kept", configuration=True, power="off"))
    assert marked(world, guest) == 3
    for name in ("disk", "all", "kept"):
        snapshots.delete(guest.uuid, name)
    assert not [name for name in a.files() if "/variables." in name]
    assert consistency.check(a.driver.node) == []
    a.driver.power_on(None, guest, None)
    assert a.state_of(guest) == "running"


def test_firmware_variables_come_back_with_memory(world: World) -> None:
    """QEMU has them there, and writes them; without it the copy does."""
    a, snapshots, guest = world.a, world.a.driver.snapshots, with_firmware(world)
    power(a, guest, "paused")
    snapshots.create(guest.uuid, Wanted("all", Kind.CHECKPOINT, Memory.EXTERNAL))
    then = variables(world, guest).read_bytes()
    mark(world, guest, 3)
    snapshots.revert(guest.uuid, Return("all", power="off"))
    assert variables(world, guest).read_bytes() == then
    mark(world, guest, 4)
    snapshots.revert(guest.uuid, Return("all"))
    assert a.state_of(guest) == "paused"
    a.driver.unpause(guest)
    assert marked(world, guest) == then[MARK]


def test_firmware_variables_that_change_beside_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no copy of another moment; the memory has them."""
    a, snapshots, guest = world.a, world.a.driver.snapshots, with_firmware(world)
    power(a, guest, "paused")
    freeze = domainstate.States.freeze

    def freezing(*args: Any) -> None:
        freeze(*args)
        mark(world, guest, 9)

    monkeypatch.setattr(domainstate.States, "freeze", freezing)
    snapshots.create(guest.uuid, Wanted("all", Kind.CHECKPOINT, Memory.EXTERNAL))
    (made,), _ = snapshots.all(guest.uuid)
    assert (made.variables_volume, made.variables_backend) == ("", "")
    assert not [name for name in a.files() if "/variables." in name]
    snapshots.revert(guest.uuid, Return("all", power="off"))
    assert marked(world, guest) == 9
    assert consistency.check(a.driver.node) == []


def test_lost_firmware_variables_are_seen_before_the_guest_is_killed(
    world: World,
) -> None:
    a, snapshots, guest = world.a, world.a.driver.snapshots, with_firmware(world)
    snapshots.create(guest.uuid, Wanted("all", Kind.CHECKPOINT))
    (made,), _ = snapshots.all(guest.uuid)
    a.driver.node.files.disks.delete(made.variables_volume)
    with pytest.raises(errors.SnapshotRefused, match="no-configuration"):
        snapshots.revert(guest.uuid, Return("all"))
    assert a.state_of(guest) == "running"
    snapshots.revert(guest.uuid, Return("all", configuration=False))
    assert a.state_of(guest) == "running"
