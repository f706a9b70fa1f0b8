# SPDX-License-Identifier: Apache-2.0
"""Hosts that are emptied of guests that run on."""

from typing import Any

import msgspec
import pytest

from tests.functional.conftest import World
from virtmigrate.cli import halves
from virtmigrate.drain.libvirtmover import LibvirtMover
from virtmigrate.drain.values import Outcome, Report, Way

# Where this release has no live migration, nothing of it is tried.
livehosts: Any = pytest.importorskip("tests.functional.livehosts")


def mover_of(world: World) -> LibvirtMover:
    """What moves the first host's instances to the second, by its own driver's half."""
    driver, name = world.a.driver, world.b.host.name
    half = halves.Asked(driver.peer(name), world.b.driver.node)
    return driver.libvirt_mover({name: half})


def emptied(world: World) -> Report:
    with world.a.driver.drain(mover_of(world)) as drain:
        return drain.run()


def policy(world: World, instance: Any, *words: str) -> None:
    here = world.a.driver.node
    record = here.instances.read(instance.uuid).body
    here.publish_instance(msgspec.structs.replace(record, policy=words))


def test_a_guest_runs_on_there(world: World) -> None:
    """By default, and nothing of it is left; one that is off goes with it."""
    livehosts.accept(world, drain_memory_reserve_mib=0)
    instance, off = livehosts.beating(world), world.spawn(world.a)
    world.a.driver.power_off(off)
    mover, driver = mover_of(world), world.a.driver
    trials = driver.rehearse_drain(mover, driver.drain_plan(mover))
    assert {(trial.way, trial.failed) for trial in trials} == {
        (Way.LIVE, ""),
        (Way.COLD, ""),
    }
    report = emptied(world)
    results = {each.uuid: each for each in report.results}
    assert {each.outcome for each in report.results} == {Outcome.MOVED}, report
    assert results[instance.uuid].way is Way.LIVE
    assert results[off.uuid].way is Way.OFFLINE
    assert 0 < (results[instance.uuid].downtime or 0) <= results[instance.uuid].seconds
    assert report.is_done and report.leftovers.is_empty
    livehosts.wait_for(world.b, instance, 2)
    livehosts.expect_no_beat_lost(world, instance)
    assert world.b.state_of(off) == "shutoff"


def test_what_does_not_converge_falls_to_the_next_way(world: World) -> None:
    """A guest's memory does not pass in the time that live has: one goes cold."""
    livehosts.accept(
        world,
        drain_memory_reserve_mib=0,
        drain_tries=1,
        live_timeout=8.0,
        live_bandwidth_mib=1,
        live_downtime=0.01,
        live_downtime_limit=0.01,
        shutdown_timeout=2,
    )
    falls, stays = livehosts.beating(world), livehosts.beating(world)
    policy(world, falls, "live", "cold")
    report = emptied(world)
    results = {each.uuid: each for each in report.results}
    assert results[falls.uuid].outcome is Outcome.MOVED
    assert results[falls.uuid].way is Way.COLD
    assert "live: " in results[falls.uuid].reason
    assert results[stays.uuid].outcome is Outcome.STAYED
    assert world.a.state_of(stays) == "running"
    assert world.b.state_of(falls) == "running"
    assert report.leftovers.running == (stays.name,)
