# SPDX-License-Identifier: Apache-2.0
"""What clones stand on stays as long as any does, and not longer."""

import pathlib
from typing import Any

import pytest

from tests.functional import cloneworld
from tests.functional.cloneworld import Fake, dummy, new
from tests.functional.conftest import World
from tests.functional.guestdisk import byte, write
from virtmigrate import consistency, errors
from virtmigrate.model import CloneState, Role, VolumeState
from virtmigrate.snapshot import Return, Wanted
from virtmigrate.units import KiB, MiB


@pytest.fixture
def family(world: World) -> list[Any]:
    """A source and two clones of it, off; the block of each holds its number."""
    source = dummy(world)
    write(world.a, source, 9)
    world.a.driver.power_off(source)
    twins = new(2)
    world.a.driver.clone(None, source, twins)
    members = [source, *twins]
    for number, each in enumerate(members):
        assert byte(world, each) == 9
        world.a.driver.power_on(None, each, None)
        write(world.a, each, number, 64 * KiB)
    return members


def volumes(world: World) -> dict[str, tuple[str, str | None]]:
    """By name, whose a volume is and what it stands on."""
    files = world.a.driver.node.files
    return {s.name: (s.body.owner, s.body.backing) for s in files.catalog.all()}


def expect_whole(world: World, members: list[Any], numbers: list[int]) -> None:
    assert consistency.check(world.a.driver.node) == []
    for each, number in zip(members, numbers, strict=True):
        assert byte(world, each) == 9
        assert byte(world, each, 64 * KiB) == number


def test_off(world: World) -> None:
    """Clones of one that is off are off, ready, plugged in, and somebody else."""
    source = dummy(world, mac=cloneworld.MAC)
    world.a.driver.power_off(source)
    (twin,) = new(1)
    (found,) = world.a.driver.clone(None, source, [twin])
    assert found.state is CloneState.READY
    assert world.a.state_of(twin) == "shutoff"
    text = world.a.xml(twin)
    assert "bridge='br0'" in text
    assert cloneworld.MAC not in text
    assert source.uuid not in text.replace(f"clone-of>{source.uuid}", "")
    world.a.driver.power_on(None, twin, None)
    assert world.a.state_of(twin) == "running"
    world.a.driver.power_on(None, source, None)
    assert world.a.driver.snapshots.all(source.uuid) == ((), None)


def test_the_source_goes_first(world: World, family: list[Any]) -> None:
    source, first, second = family
    world.a.driver.destroy(None, source)
    expect_whole(world, [first, second], [1, 2])
    owners = {owner for owner, _ in volumes(world).values()}
    assert owners == {first.uuid, second.uuid}
    # One that was handed down is handed on.
    heir = next(o for o, below in volumes(world).values() if below is None)
    gone, left = (first, second) if heir == first.uuid else (second, first)
    world.a.driver.destroy(None, gone)
    expect_whole(world, [left], [1 if left is first else 2])
    world.a.driver.destroy(None, left)
    assert world.a.files() == []


def test_clones_go_first(world: World, family: list[Any]) -> None:
    """The source's disk becomes one volume again with the last of them."""
    source, first, second = family
    world.a.driver.destroy(None, first)
    expect_whole(world, [source, second], [0, 2])
    assert len(volumes(world)) == 3
    world.a.driver.destroy(None, second)
    expect_whole(world, [source], [0])
    assert len(volumes(world)) == 1
    assert world.a.state_of(source) == "running"


def test_snapshots_of_the_source(world: World, family: list[Any]) -> None:
    """What it does with its snapshots merges nothing that clones stand on."""
    source = family[0]
    known = world.a.driver.snapshots
    known.create(source.uuid, Wanted("a"))
    write(world.a, source, 5, 64 * KiB)
    known.revert(source.uuid, Return("a"))
    expect_whole(world, family, [0, 1, 2])
    known.delete(source.uuid, "a")
    expect_whole(world, family, [0, 1, 2])
    frozen = [n for n, (_, below) in volumes(world).items() if below is None]
    with pytest.raises(errors.VolumeInUse):
        world.a.driver.node.files.remove(frozen[0])
    expect_whole(world, family, [0, 1, 2])


def test_clones_of_a_clone(world: World, family: list[Any]) -> None:
    """Each goes before what it stands on, or after."""
    source, first, second = family
    world.a.driver.power_off(first)
    (third,) = new(1)
    world.a.driver.clone(None, first, [third])
    world.a.driver.destroy(None, first)
    expect_whole(world, [source, second, third], [0, 2, 1])
    world.a.driver.destroy(None, source)
    expect_whole(world, [second, third], [2, 1])
    world.a.driver.destroy(None, second)
    expect_whole(world, [third], [1])
    world.a.driver.destroy(None, third)
    assert world.a.files() == []


@pytest.mark.parametrize("power", ["running", "off"])
def test_detach(world: World, family: list[Any], power: str) -> None:
    source, first, second = family
    if power == "off":
        world.a.driver.power_off(first)
    world.a.driver.detach_clone(None, first)
    assert world.a.driver.clones.lenders(first.uuid) == set()
    assert world.a.driver.clones.lenders(second.uuid) == {source.uuid}
    expect_whole(world, family, [0, 1, 2])
    # A power cut of all guests, after which each disk says all by itself.
    for each in family:
        world.a.driver.node.domains.kill(each.uuid)
    expect_whole(world, family, [0, 1, 2])
    world.a.driver.destroy(None, source)
    world.a.driver.destroy(None, second)
    expect_whole(world, [first], [1])
    assert len(volumes(world)) == 1
    world.a.driver.power_on(None, first, None)
    assert world.a.state_of(first) == "running"


@pytest.mark.parametrize("who", ["heir", "other"])
def test_detach_the_heir(world: World, family: list[Any], who: str) -> None:
    """What it had of its source, and others stand on, is theirs then."""
    source, *twins = family
    world.a.driver.destroy(None, source)
    heir = next(o for o, below in volumes(world).values() if below is None)
    (chosen,) = (each for each in twins if (each.uuid == heir) == (who == "heir"))
    world.a.driver.detach_clone(None, chosen)
    expect_whole(world, twins, [1, 2])
    found = volumes(world).values()
    assert sorted(found, key=str) == sorted(((t.uuid, None) for t in twins), key=str)


def test_detach_refused(world: World, family: list[Any]) -> None:
    _, first, _ = family
    world.a.driver.pause(first)
    with pytest.raises(errors.CloneRefused, match="paused"):
        world.a.driver.detach_clone(None, first)
    world.a.driver.unpause(first)
    world.a.driver.snapshots.create(first.uuid, Wanted("a"))
    with pytest.raises(errors.CloneRefused, match="snapshots"):
        world.a.driver.detach_clone(None, first)
    expect_whole(world, family, [0, 1, 2])


def test_a_source_with_clones_does_not_move(world: World, family: list[Any]) -> None:
    source = family[0]
    with pytest.raises(errors.MigrationRefused, match="clones"):
        world.migrate(source)
    assert world.a.state_of(source) == "running"
    expect_whole(world, family, [0, 1, 2])


def test_one_that_is_broken_can_go(world: World, family: list[Any]) -> None:
    """Also when what it stands on has no record any more."""
    _, first, second = family
    files = world.a.driver.node.files
    base = next(n for n, (_, below) in volumes(world).items() if below is None)
    files.volumes.remove(base)
    world.a.driver.destroy(None, first)
    assert first.uuid not in {owner for owner, _ in volumes(world).values()}
    assert second.uuid in {owner for owner, _ in volumes(world).values()}


def test_memory_is_for_the_hypervisor(world: World) -> None:
    """Nobody else reads it, and nothing of it is left in its file."""
    cloneworld.allow(world.a)
    source = dummy(world)
    seen: list[Any] = []

    class Looking(Fake):
        def change(self, *args: Any) -> Any:
            (path,) = (world.a.path / "disks").glob("memory.*")
            if not seen:
                seen.extend([path.stat().st_mode & 0o077, path.open("rb")])
            assert list((world.a.path / "disks").glob("memory.*")) == [path]
            return super().change(*args)

    world.a.driver.clones.identities = Looking()
    world.a.driver.clone(None, source, new(3))
    mode, file = seen
    with file:
        assert mode == 0
        left = file.read()
    assert left.count(0) == len(left)
    assert not list(pathlib.Path(world.a.path).rglob("*memory*"))
    frozen = VolumeState.FROZEN
    states = [s.body.state for s in world.a.driver.node.files.catalog.all()]
    assert states.count(frozen) == 1


def test_an_image_stays_below(world: World) -> None:
    """Of what a clone stands on, the image of the cache is not another instance's."""
    path = world.image(4 * MiB)
    source, (twin,) = world.instance(), new(1)
    meta = {"path": str(path), "disk_format": "raw", "id": "image"}
    world.a.driver.spawn(None, source, meta)
    write(world.a, source, 9)
    world.a.driver.power_off(source)
    world.a.driver.clone(None, source, [twin])
    world.a.driver.power_on(None, twin, None)
    world.a.driver.detach_clone(None, twin)
    world.a.driver.destroy(None, source)
    assert byte(world, twin) == 9
    here = world.a.driver.node
    (ref,) = here.entitled(twin.uuid).disks
    layer, image = here.backend(ref.backend).chain(ref.volume)
    assert layer.owner == twin.uuid
    assert image.role is Role.IMAGE
    # What is the image's is not copied.
    taken = here.backend(ref.backend).pool(layer.pool).allocated(layer.name)
    assert taken < MiB
    assert world.read(world.a, twin)[: 2 * MiB] == path.read_bytes()[: 2 * MiB]
    world.a.driver.reboot(None, twin, None, "HARD")
    assert world.a.state_of(twin) == "running"
    assert consistency.check(here) == []
