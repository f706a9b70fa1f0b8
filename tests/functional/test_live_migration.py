# SPDX-License-Identifier: Apache-2.0
"""A guest that beats moves between two hosts, and beats on."""

from collections.abc import Iterator

import pytest

from tests.functional import livehosts
from tests.functional.conftest import World
from virtmigrate import consistency, errors
from virtmigrate.livemigration import Options
from virtmigrate.units import MiB


@pytest.fixture(params=["shared", "apart"])
def hosts(world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """Two hosts that see one directory, or have one each."""
    yield livehosts.between(world, request)


@pytest.mark.parametrize("place", ["shared", "apart"])
def test_it_goes_on_there(world: World, place: str) -> None:
    if place == "shared":
        world.share()
    livehosts.accept(world)
    hosts, a, b = world, world.a, world.b
    instance = livehosts.beating(hosts)
    with livehosts.watching(hosts, instance) as watcher:
        outcome = a.driver.live.migrate(instance.uuid, b.host.name, Options())
        assert b.state_of(instance) == "running"
        assert a.state_of(instance) is None
        livehosts.wait_for(b, instance, 3)
    assert watcher.looks and watcher.both == []
    assert 0 < outcome.downtime <= outcome.seconds
    assert outcome.bytes > 0
    livehosts.expect_no_beat_lost(hosts, instance)
    assert livehosts.settle(hosts) == []
    hosts.expect_one(instance, b)
    assert consistency.check(b.driver.node) == []
    b.driver.power_off(instance)
    log = livehosts.verified(hosts, b, instance)
    assert log.problems == [] and log.boots == 1
    # It is an instance like any other there.
    b.driver.power_on(None, instance)
    b.driver.destroy(None, instance)


def test_a_paused_guest_stays_paused(hosts: World) -> None:
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    a.driver.pause(instance)
    a.driver.live.migrate(instance.uuid, b.host.name)
    assert livehosts.settle(hosts) == []
    hosts.expect_one(instance, b, "paused")


def test_rehearsal_leaves_nothing(hosts: World) -> None:
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    before = a.files(), b.files()
    found = a.driver.live.rehearse(instance.uuid, b.host.name)
    assert found.obstacles == () and found.memory == 64 * MiB
    assert 0 < found.downtime <= found.seconds < 60
    assert livehosts.settle(hosts) == []
    assert names(a.files(), b.files()) == names(*before)
    hosts.expect_one(instance, a)


def names(*files: list[str]) -> list[set[str]]:
    """Names without the generations of records."""
    return [{name.partition(".rec.")[0] for name in each} for each in files]


def test_what_the_peer_did_not_agree_to_is_refused(hosts: World) -> None:
    """Without accept_moves a compute service has to await it, as Nova's does."""
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    b.overrides = {}
    b.new_driver()
    with pytest.raises(errors.MigrationRefused, match="does not await it"):
        a.driver.live.migrate(instance.uuid, b.host.name)
    hosts.expect_one(instance, a)
    data = b.driver.check_can_live_migrate_destination(None, instance, None, None)
    data = a.driver.check_can_live_migrate_source(None, instance, data)
    b.driver.pre_live_migration(None, instance, migrate_data=data)
    called: list[str] = []
    a.driver.live_migration(
        None,
        instance,
        b.host.name,
        lambda *_: called.append("post"),
        lambda *_: called.append("recover"),
        migrate_data=data,
    )
    assert called == ["post"]
    a.driver.post_live_migration(None, instance, None)
    b.driver.post_live_migration_at_destination(None, instance, None)
    hosts.expect_one(instance, b)


def test_refusals(hosts: World) -> None:
    a, b = hosts.a, hosts.b
    instance = hosts.spawn(a)
    a.driver.power_off(instance)
    with pytest.raises(errors.MigrationRefused, match="it is off"):
        a.driver.live.migrate(instance.uuid, b.host.name)
    with pytest.raises(errors.MigrationRefused, match="on that host"):
        a.driver.live.migrate(instance.uuid, a.host.name)
    hosts.expect_one(instance, a, "shutoff")
