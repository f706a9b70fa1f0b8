# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around the switch: one paused copy at most, and never two guests."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional import livehosts, test_cli
from tests.functional.conftest import World
from virtmigrate import errors, peer, receiver, transient
from virtmigrate.backends.dir import DirBackend
from virtmigrate.livemigration.departure import Departure
from virtmigrate.migration import target


@pytest.fixture(params=["shared", "apart"])
def hosts(world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    yield livehosts.between(world, request, call_timeout=8.0, connect_timeout=3.0)
    world.b.host.link(up=True)


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], Any]], None]:
    """Returns what has something done once, before a step of the source."""

    def arrange(step: str, fault: Callable[[], Any]) -> None:
        real = getattr(Departure, step)

        def call(self: Departure) -> Any:
            monkeypatch.setattr(Departure, step, real)
            fault()
            return real(self)

        monkeypatch.setattr(Departure, step, call)

    return arrange


Before = Callable[[str, Callable[[], Any]], None]


def test_undecided_until_the_hosts_see_each_other(hosts: World, before: Before) -> None:
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    before("give", lambda: b.host.link(up=False))
    with livehosts.watching(hosts, instance) as watcher:
        with pytest.raises(errors.MigrationUndecided, match="cannot be asked"):
            a.driver.live.migrate(instance.uuid, b.host.name)
        assert (a.state_of(instance), b.state_of(instance)) == (None, "paused")
        # Neither side may start it alone, whatever is asked of it.
        with pytest.raises(errors.NotEntitled):
            a.driver.power_on(None, instance)
        with pytest.raises(errors.InvalidState):
            a.driver.destroy(None, instance)
        assert b.driver.settle() == []
        assert a.driver.settle() != []
        assert (a.state_of(instance), b.state_of(instance)) == (None, "paused")
        b.host.link(up=True)
        assert livehosts.settle(hosts) == []
    assert watcher.both == []
    hosts.expect_one(instance, b)


def test_a_guest_that_is_lost_before_the_switch(
    hosts: World, before: Before, caplog: pytest.LogCaptureFixture
) -> None:
    """Its disks are whole: it is started anew where the right is."""
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b

    def lose() -> None:
        b.host.link(up=False)
        os.kill(livehosts.qemu(b), signal.SIGKILL)

    before("give", lose)
    with livehosts.watching(hosts, instance) as watcher:
        with pytest.raises(errors.MigrationUndecided):
            a.driver.live.migrate(instance.uuid, b.host.name)
        b.host.link(up=True)
        assert livehosts.settle(hosts) == []
    assert watcher.both == []
    assert "its memory is lost" in caplog.text
    hosts.expect_one(instance, a)


def test_a_guest_that_is_lost_after_the_switch(
    hosts: World, before: Before, caplog: pytest.LogCaptureFixture
) -> None:
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    before("resume", lambda: os.kill(livehosts.qemu(b), signal.SIGKILL))
    a.driver.live.migrate(instance.uuid, b.host.name)
    assert livehosts.settle(hosts) == []
    assert "its memory is lost" in caplog.text
    hosts.expect_one(instance, b)


def test_the_source_cannot_ask_after_the_switch(hosts: World, before: Before) -> None:
    """The peer lets it go on by itself."""
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b
    before("resume", lambda: b.host.link(up=False))
    a.driver.live.migrate(instance.uuid, b.host.name)
    assert (a.state_of(instance), b.state_of(instance)) == (None, "paused")
    assert b.driver.settle() == []
    assert b.state_of(instance) == "running"
    b.host.link(up=True)
    assert livehosts.settle(hosts) == []
    hosts.expect_one(instance, b)


def test_the_source_keeps_its_copy_until_the_other_is_durable(
    world: World, monkeypatch: pytest.MonkeyPatch, before: Before
) -> None:
    livehosts.accept(world)
    instance, a, b = world.spawn(world.a), world.a, world.b
    disk = a.disk(instance)
    with monkeypatch.context() as patch:
        before("give", lambda: patch.setattr(DirBackend, "persist", lambda *_: False))
        a.driver.live.migrate(instance.uuid, b.host.name)
        assert b.state_of(instance) == "running"
        (owed,) = a.driver.live.recover()
        assert "not durable yet" in owed or "taken" in owed
        assert disk.exists()
    assert livehosts.settle(world) == []
    assert not disk.exists()
    world.expect_one(instance, b)


def test_a_peer_that_cannot_make_disks_durable(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is sent: it would never end."""
    livehosts.accept(world)
    instance = world.spawn(world.a)
    with monkeypatch.context() as patch:
        patch.setattr(DirBackend, "persist", lambda *_: False)
        with pytest.raises(errors.MigrationRefused, match=r"beta.* cannot fsync"):
            world.a.driver.live.migrate(instance.uuid, world.b.host.name)
    world.expect_one(instance, world.a)


def test_a_peer_whose_driver_is_not_there(world: World) -> None:
    """Its receiver alone cannot have a guest come; what is missing is said."""
    livehosts.accept(world, receiver=False)
    here = world.b.driver.node
    alone = receiver.Receiver(here, actions=target.Target(here).actions())
    alone.start()
    try:
        instance = world.spawn(world.a)
        with pytest.raises(errors.MigrationRefused, match="no driver runs here"):
            world.a.driver.live.migrate(instance.uuid, world.b.host.name)
    finally:
        alone.stop()
    world.expect_one(instance, world.a)


def test_a_transient_disk_stays_where_it_is(world: World) -> None:
    livehosts.accept(world)
    instance, a, b = world.spawn(world.a), world.a, world.b
    a.driver.power_off(instance)
    node, demand = a.driver.node, a.driver._source.demand_none
    transient.declare(node, instance.uuid, "vda", demand, transient=True)
    a.driver.power_on(None, instance)
    with pytest.raises(errors.MigrationRefused, match="vda is transient"):
        a.driver.live.migrate(instance.uuid, b.host.name)
    assert a.state_of(instance) == "running"


def test_no_room_at_the_peer(world: World) -> None:
    livehosts.accept(world)
    instance = world.spawn(world.a)
    world.b.backend = {"reserved_mib": 10**9}
    world.b.new_driver()
    with pytest.raises(errors.MigrationRefused, match="has room for"):
        world.a.driver.live.migrate(instance.uuid, world.b.host.name)
    world.expect_one(instance, world.a)


def test_what_came_back_is_not_the_old_moves(
    hosts: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the peer could not be told that it is over."""
    instance, a, b = hosts.spawn(hosts.a), hosts.a, hosts.b

    def unheard(*_: Any) -> None:
        raise errors.HostUnreachable(host=b.host.name, reason="in this test")

    with monkeypatch.context() as patched:
        patched.setattr(peer.Peer, "forget", unheard)
        a.driver.live.migrate(instance.uuid, b.host.name)
    b.driver.live.migrate(instance.uuid, a.host.name)
    hosts.expect_one(instance, a)
    again = a.driver.live.migrate(instance.uuid, b.host.name)
    assert again.bytes > 0
    b.driver.live.migrate(instance.uuid, a.host.name)
    assert livehosts.settle(hosts) == []
    hosts.expect_one(instance, a)


def test_command(hosts: World, tmp_path: Path) -> None:
    instance = hosts.spawn(hosts.a)
    command = test_cli.Command(hosts, tmp_path / "etc")
    words = ("instance", "migrate", instance.name, "beta", "--live")
    told = command.json(*words, "--rehearse")
    assert told["obstacles"] == "" and told["memory"] == 64 * 2**20
    refused = command.run(*words, "--memory", "96M", code=test_cli.FAILED)
    assert "nothing is resized" in refused.stderr
    moved = command.json(*words, "--bandwidth", "100", "--downtime", "0.5")
    assert (moved["host"], moved["source"]) == ("beta", "alpha")
    assert 0 < moved["downtime"] < moved["seconds"]
    hosts.expect_one(instance, hosts.b)


def test_command_is_cancelled(
    hosts: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("with --full")
    instance = livehosts.beating(hosts)
    command = test_cli.Command(hosts, tmp_path / "etc")
    words = ("instance", "migrate", instance.name, "beta", "--live", "--bandwidth", "2")
    pipe = subprocess.PIPE
    argv = command.argv(*words)
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) as made:
        assert made.stderr is not None
        for line in made.stderr:
            if line.startswith("migrating"):
                break
        made.send_signal(signal.SIGINT)
        made.communicate(timeout=120)
    assert made.returncode == test_cli.CANCELLED
    hosts.expect_one(instance, hosts.a)
