# SPDX-License-Identifier: Apache-2.0
"""Who may start an instance that moves live: not libvirt, and no host that lost it."""

from typing import Any

import pytest

from tests.functional import livehosts
from tests.functional.conftest import Node, World
from virtmigrate import errors
from virtmigrate.livemigration.departure import Departure


@pytest.fixture
def autostarted(world: World) -> Any:
    """An instance that libvirt starts with the host."""
    livehosts.accept(world)
    instance = world.spawn(world.a)
    world.a.driver.node.domains.allow_autostart(instance.uuid)
    return instance


def starts_with_the_host(node: Node, instance: Any) -> bool:
    return node.driver.node.domains.autostart(instance.uuid)


def test_libvirt_starts_none_that_is_leaving(
    world: World, autostarted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail(self: Departure, _: object) -> None:
        seen.append(starts_with_the_host(world.a, autostarted))
        raise errors.MigrationError(
            instance=autostarted.uuid, operation="-", reason="as wished"
        )

    monkeypatch.setattr(Departure, "send", fail)
    with pytest.raises(errors.MigrationRolledBack):
        world.a.driver.live.migrate(autostarted.uuid, world.b.host.name)
    assert seen == [False]
    assert starts_with_the_host(world.a, autostarted)


def test_its_host_is_off_while_it_is_leaving(
    world: World, autostarted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not started by libvirt, but by who ends its move; and by libvirt again."""

    def die(self: Departure, _: object) -> None:
        raise SystemExit

    monkeypatch.setattr(Departure, "send", die)
    with pytest.raises(SystemExit):
        world.a.driver.live.migrate(autostarted.uuid, world.b.host.name)
    world.a.host.stop()
    world.a.host.start()
    assert world.a.state_of(autostarted) == "shutoff"
    world.a.new_driver()
    assert livehosts.settle(world) == []
    assert starts_with_the_host(world.a, autostarted)
    world.expect_one(autostarted, world.a)


def test_libvirt_starts_it_where_it_came(world: World, autostarted: Any) -> None:
    world.a.driver.live.migrate(autostarted.uuid, world.b.host.name)
    assert livehosts.settle(world) == []
    assert starts_with_the_host(world.b, autostarted)
    world.expect_one(autostarted, world.b)
