# SPDX-License-Identifier: Apache-2.0
"""Transient disks of those that lend, and of those that stand on what is lent."""

from typing import Any

import pytest

from tests.functional.cloneworld import dummy, new
from tests.functional.conftest import World
from tests.functional.guestdisk import byte, write
from tests.functional.test_transient import chain, layers, seen
from virtmigrate import consistency, domainstate, errors
from virtmigrate.snapshot import Wanted
from virtmigrate.units import KiB


@pytest.fixture
def couple(world: World) -> tuple[Any, Any]:
    """A source and its clone, off; the block of each holds its number."""
    source, (twin,) = dummy(world), new(1)
    write(world.a, source, 9)
    world.a.driver.power_off(source)
    world.a.driver.clone(None, source, [twin])
    for number, each in enumerate((source, twin), 1):
        world.a.driver.power_on(None, each, None)
        write(world.a, each, number, 64 * KiB)
        world.a.driver.power_off(each)
    return source, twin


def declare(world: World, instance: Any, *, transient: bool = True) -> None:
    world.a.driver.set_transient(instance.uuid, "vda", transient=transient)


def start(world: World, instance: Any) -> None:
    """Have a guest run over its transient disk, and write to it."""
    world.a.driver.power_on(None, instance, None)
    write(world.a, instance, 5)
    assert seen(world, world.a, instance) == 5


def failing(*_: object) -> None:
    raise errors.StorageError(host="a", pool="-", reason="as it was told")


def expect_settled(world: World) -> None:
    assert world.a.driver.settle() == []
    assert consistency.check(world.a.driver.node) == []


def test_a_lender_that_runs_is_not_merged(
    world: World, couple: tuple[Any, Any]
) -> None:
    """Its guest reads what stood below the clone, until it is off."""
    a, (source, twin) = world.a, couple
    # There is nobody in it to wait for.
    a.overrides["shutdown_timeout"] = 1
    a.new_driver()
    declare(world, source)
    start(world, source)
    before = chain(a, source)
    assert len(before) == 2
    a.driver.destroy(None, twin)
    expect_settled(world)
    assert chain(a, source) == before
    # A layer that fits its disk is kept.
    a.driver.reboot(None, source, None, "SOFT")
    assert seen(world, a, source) == 5
    a.driver.power_off(source)
    declare(world, source, transient=False)
    assert chain(a, source) == before[1:]
    expect_settled(world)
    assert layers(a, source) == []
    assert (byte(world, source), byte(world, source, 64 * KiB)) == (9, 1)


def test_a_merge_that_was_cut_short(
    world: World, couple: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a guest that was started over the disk meanwhile."""
    a, (source, twin) = world.a, couple
    declare(world, source)

    with monkeypatch.context() as patch:
        patch.setattr(domainstate.States, "stand_in", failing)
        a.driver.destroy(None, twin)
    start(world, source)
    (left,) = a.driver.settle()
    assert "runs over transient disk vda" in left
    assert len(chain(a, source)) == 2
    assert seen(world, a, source) == 5
    a.driver.power_off(source)
    expect_settled(world)
    assert len(chain(a, source)) == 1
    assert (byte(world, source), byte(world, source, 64 * KiB)) == (9, 1)


def test_a_deep_chain_is_not_flattened(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer over it goes: it would take nothing of what the disk stands on."""
    a, source = world.a, dummy(world, ephemeral_gb=1)
    a.driver.power_off(source)
    a.driver.clone(None, source, new(1))
    declare(world, source)
    start(world, source)
    before = chain(a, source)
    a.driver.snapshots.create(source.uuid, Wanted("s", left_out=frozenset({"vda"})))
    a.overrides |= {"flatten_chain": 1, "flatten_by": "pull"}
    a.new_driver()
    expect_settled(world)
    assert len(chain(a, source, "vdb")) == 1
    assert chain(a, source) == before
    assert seen(world, a, source) == 5
    # Begun while it was off, and cut short.
    a.driver.power_off(source)
    with monkeypatch.context() as patch:
        patch.setattr(domainstate.States, "stand_in", failing)
        assert "as it was told" in str(a.driver.settle())
    start(world, source)
    (left,) = a.driver.settle()
    assert "runs over transient disk vda" in left
    assert chain(a, source) == before
    a.driver.power_off(source)
    expect_settled(world)
    assert len(chain(a, source)) == 1
    assert byte(world, source) == 0


def test_detaching_one_that_runs(world: World, couple: tuple[Any, Any]) -> None:
    """Its guest writes to a layer that goes: nothing is copied into that."""
    a, (source, twin) = world.a, couple
    declare(world, twin)
    start(world, twin)
    before = chain(a, twin)
    with pytest.raises(errors.CloneRefused, match=r"vda is transient.*turn it off"):
        a.driver.detach_clone(None, twin)
    assert chain(a, twin) == before
    assert seen(world, a, twin) == 5
    expect_settled(world)
    a.driver.power_off(twin)
    a.driver.detach_clone(None, twin)
    assert chain(a, twin) == before[:1]
    a.driver.destroy(None, source)
    assert (byte(world, twin), byte(world, twin, 64 * KiB)) == (9, 2)
    start(world, twin)
    # It stands on nothing of others.
    a.driver.detach_clone(None, twin)
    a.driver.power_off(twin)
    expect_settled(world)
    assert (byte(world, twin), byte(world, twin, 64 * KiB)) == (9, 2)


@pytest.mark.parametrize("power", ["running", "off"])
def test_no_clones_of_it(world: World, power: str) -> None:
    """Refused before anything is touched."""
    a, source = world.a, dummy(world)
    a.overrides["enable_live_clone"] = True
    a.new_driver()
    a.driver.power_off(source)
    declare(world, source)
    if power == "running":
        start(world, source)
    before = a.files()
    with pytest.raises(errors.CloneRefused, match="disk vda: it is transient"):
        a.driver.clone(None, source, new(1), risk=["agent"])
    assert a.files() == before
    assert not list((a.state / "clones").glob("*"))


@pytest.mark.parametrize("who", ["source", "twin"])
def test_the_lender_goes(world: World, couple: tuple[Any, Any], who: str) -> None:
    """What is handed on is whole, whichever of the two runs over a transient disk."""
    a, (source, twin) = world.a, couple
    one = source if who == "source" else twin
    declare(world, one)
    start(world, one)
    a.driver.destroy(None, source)
    expect_settled(world)
    assert a.driver.clones.lenders(twin.uuid) == set()
    if who == "twin":
        assert seen(world, a, twin) == 5
        assert len(chain(a, twin)) == 2
        a.driver.power_off(twin)
    assert (byte(world, twin), byte(world, twin, 64 * KiB)) == (9, 2)
    a.driver.destroy(None, twin)
    assert a.files() == []
