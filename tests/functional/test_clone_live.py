# SPDX-License-Identifier: Apache-2.0
"""Running guests become several: all go on counting from the same point."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional import cloneworld
from tests.functional.cloneworld import (
    MAC,
    RISK,
    Counting,
    Ear,
    Fake,
    counting,
    dummy,
    new,
)
from tests.functional.conftest import World
from tests.functional.test_agent import wait_for
from virtmigrate import consistency, domainxml, errors
from virtmigrate.model import CloneState
from virtmigrate.snapshot import Kind, Memory, Return, Wanted


@pytest.fixture
def ear(world: World) -> Iterator[Ear]:
    made = Ear(world)
    yield made
    made.close()


def of(world: World, instance: Any, path: str) -> str:
    """What a running domain's XML says."""
    found = re.search(path, world.a.xml(instance))
    assert found is not None
    return found[1]


def memories(world: World) -> list[str]:
    return [name for name in world.a.files() if "memory" in Path(name).name]


@pytest.mark.timeout(600)
def test_all_go_on(world: World, ear: Ear, request: pytest.FixtureRequest) -> None:
    """Clones count on from where their source was, and are others to all."""
    count = 8 if request.config.getoption("--full") else 3
    changes = Fake(heard=ear.senders)
    cloneworld.allow(world.a, changes)
    source = counting(world, mac=MAC)
    before = source.beats()[-1]
    twins = new(count)
    found = world.a.driver.clone(None, source.instance, twins)
    assert [each.state for each in found] == [CloneState.READY] * count
    assert memories(world) == []
    assert world.a.driver.snapshots.all(source.instance.uuid) == ((), None)
    assert list((world.a.state / "clones").iterdir()) == []
    guests = [Counting(world, each) for each in twins]
    for guest in [source, *guests]:
        guest.expect_it_counts()
    # The point is the same: nobody missed a beat, and nobody began anew.
    starts = {guest.beats()[0] for guest in guests}
    assert len(starts) <= 2, starts
    assert before < min(starts)
    everybody = [source.instance, *twins]
    for what in (r"<uuid>(.*)</uuid>", r"<genid>(.*)</genid>", r"mac address='(.*)'"):
        assert len({of(world, each, what) for each in everybody}) == count + 1
    kin = [len(siblings) for _, _, _, siblings in changes.asked]
    assert kin == list(range(count))
    # QEMU announces each restored guest. None was heard before it was another one.
    others = [new for _, wanted, _, _ in changes.asked for _, new in wanted.macs]
    for number, heard in enumerate(changes.heard):
        assert heard <= set(others[:number])
    assert ear.senders() <= set(others)
    assert consistency.check(world.a.driver.node) == []
    for guest in guests:
        assert "bridge='br0'" in world.a.xml(guest.instance)
        assert guest.expect_whole() > before
    assert source.expect_whole() > before
    gone = [source.instance, *twins]
    for each in gone:
        world.a.driver.destroy(None, each)
    assert world.a.files() == []


def test_the_ear_hears(world: World, ear: Ear) -> None:
    """Without isolation a restored guest is heard: QEMU announces it."""
    instance = dummy(world, mac=MAC)
    snapshots = world.a.driver.snapshots
    snapshots.create(
        instance.uuid, Wanted("a", kind=Kind.CHECKPOINT, memory=Memory.EXTERNAL)
    )
    assert ear.senders() == set()
    snapshots.revert(instance.uuid, Return("a"))
    wait_for(lambda: ear.senders() == {MAC}, 30)


def test_without_an_agent(world: World, ear: Ear) -> None:
    """Refused with the list; with the risk taken, it runs off the network for good."""
    cloneworld.allow(world.a)
    instance = dummy(world, mac=MAC)
    before = world.a.files()
    twins = new(2)
    with pytest.raises(errors.CloneRefused, match="because of: agent"):
        world.a.driver.clone(None, instance, twins)
    assert world.a.files() == before
    found = world.a.driver.clone(None, instance, twins, risk=RISK)
    assert [each.state for each in found] == [CloneState.APART] * 2
    assert {each.reason for each in found} == {"agent"}
    for each in twins:
        for text in (world.a.xml(each), world.a.driver.node.domains.xml(each.uuid)):
            assert "link state='down'" in text
            (plugged,) = domainxml.interfaces(text)
            assert plugged.bridge == "virtmigrate-apart"
    # Also after a power cycle, by whoever does it.
    world.a.driver.reboot(None, twins[0], None, "HARD")
    assert world.a.state_of(twins[0]) == "running"
    assert "link state='down'" in world.a.xml(twins[0])
    assert ear.senders() == set()
    assert world.a.driver.settle() == []
    told = [each.cloned for each in world.a.driver.clones.all()]
    assert [each.unproven for each in told if each] == [("agent",)] * 2
