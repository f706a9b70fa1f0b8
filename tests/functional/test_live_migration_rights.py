# SPDX-License-Identifier: Apache-2.0
"""Who may start an instance that moves live: not libvirt, and no host that lost it."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.functional import livehosts
from tests.functional.conftest import Node, World
from virtmigrate import errors, model
from virtmigrate.livemigration.departure import Departure
from virtmigrate.tenure import Tenures


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


# Taken over by a third host, on an operator's word that was not true


@pytest.fixture
def shared(world: World) -> World:
    for node in (world.a, world.b):
        node.backend = {"kind": "shared_dir"}
    world.share()
    livehosts.accept(world, call_timeout=8.0, connect_timeout=3.0)
    return world


def tenure(world: World, instance: Any) -> model.Tenure:
    found = world.a.driver.node.backends["local"].tenures.find(instance.uuid)
    assert found is not None
    return found.body


def seize(world: World, instance: Any) -> None:
    """Take it over on a third host."""
    wanted = tenure(world, instance).record
    third = Tenures(world.a.driver.node.backends, "gamma")
    third.seize(msgspec.structs.replace(wanted, host="gamma"), is_down=True)


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, step: str, fault: Callable[[], object]
) -> None:
    """Have something done once, before a step of the source."""
    real = getattr(Departure, step)

    def call(self: Departure, *args: Any) -> Any:
        monkeypatch.setattr(Departure, step, real)
        fault()
        return real(self, *args)

    monkeypatch.setattr(Departure, step, call)


def expect_lost(world: World, instance: Any) -> None:
    """It runs on none of the hosts, and nothing of its move is left."""
    assert livehosts.settle(world) == []
    assert [node.state_of(instance) for node in (world.a, world.b)] == [None, None]
    assert tenure(world, instance).host == "gamma"
    assert not list((world.a.state / "journal").glob("*"))


def test_what_was_taken_over_is_not_given(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, b = shared.spawn(shared.a), shared.b
    resumed: list[str | None] = []
    meanwhile(monkeypatch, "give", lambda: seize(shared, instance))
    meanwhile(monkeypatch, "resume", lambda: resumed.append(b.state_of(instance)))
    with pytest.raises(errors.MigrationError, match="took it over"):
        shared.a.driver.live.migrate(instance.uuid, b.host.name)
    assert resumed == []
    expect_lost(shared, instance)


def test_what_was_taken_over_does_not_go_on_here(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = shared.spawn(shared.a)

    def fail() -> None:
        seize(shared, instance)
        raise errors.HostError(host="beta", reason="as wished")

    meanwhile(monkeypatch, "send", fail)
    with pytest.raises(errors.MigrationError, match="took it over"):
        shared.a.driver.live.migrate(instance.uuid, shared.b.host.name)
    expect_lost(shared, instance)


def test_it_cannot_be_asked_who_has_it(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error is told, too; the next settle ends the move."""
    instance = shared.spawn(shared.a)

    def fail(*_: object) -> None:
        raise errors.StorageError(host="alpha", pool="disks", reason="it is down")

    with monkeypatch.context() as patch:
        patch.setattr(Departure, "send", fail)
        patch.setattr(Tenures, "is_lost", fail)
        with pytest.raises(errors.MigrationError, match=r"down; and .* put back yet"):
            shared.a.driver.live.migrate(instance.uuid, shared.b.host.name)
    assert livehosts.settle(shared) == []
    assert shared.a.state_of(instance) == "running"
    assert shared.b.state_of(instance) is None


@pytest.mark.parametrize("goes_on", [False, True], ids=["paused", "running"])
def test_what_was_taken_over_does_not_go_on_there(
    shared: World, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """Whether its source has let it go on before, or not."""
    instance, a, b = shared.spawn(shared.a), shared.a, shared.b
    meanwhile(monkeypatch, "finish", lambda: seize(shared, instance))
    if not goes_on:
        monkeypatch.setattr(Departure, "resume", lambda self: None)
    a.driver.live.migrate(instance.uuid, b.host.name)
    (left,) = b.driver.live.recover()
    assert "are gamma's" in left
    assert b.state_of(instance) == "shutoff"
    assert tenure(shared, instance).host == "gamma"
