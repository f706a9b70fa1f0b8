# SPDX-License-Identifier: Apache-2.0
"""A guest that beats moves between two hosts, and beats on."""

from collections.abc import Iterator

import pytest

from tests.functional import livehosts
from tests.functional.conftest import World
from virtmigrate import consistency
from virtmigrate.livemigration import Options


@pytest.fixture(params=["shared", "apart"])
def hosts(world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """Two hosts that see one directory, or have one each."""
    if request.param == "shared":
        world.share()
    livehosts.accept(world)
    yield world


def test_it_goes_on_there(hosts: World) -> None:
    instance, a, b = livehosts.beating(hosts), hosts.a, hosts.b
    with livehosts.watching(hosts, instance) as watcher:
        outcome = a.driver.live.migrate(instance.uuid, b.host.name, Options())
        print(outcome)
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
