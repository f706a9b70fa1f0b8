# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a guest is on its way: it runs on, on one host."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.functional import livehosts
from tests.functional.conftest import World
from virtmigrate import errors
from virtmigrate.livemigration import Options, Outcome
from virtmigrate.units import MiB

SLOW = Options(bandwidth=4 * MiB)
"""So that there is time for something to go wrong."""


@pytest.fixture(params=["shared", "apart"])
def hosts(world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    yield livehosts.between(
        world,
        request,
        live_stall=5.0,
        live_downtime=0.5,
        live_downtime_limit=0.5,
        call_timeout=8.0,
        connect_timeout=3.0,
    )
    world.b.host.link(up=True)
    for node in (world.a, world.b):
        node.host.start_libvirtd()


class Move:
    """A live move that is made to go wrong."""

    def __init__(self, world: World, instance: Any) -> None:
        self._world = world
        self._instance = instance
        self._ended: list[Outcome | BaseException] = []

    def run(
        self, fault: Callable[[], object], options: Options = SLOW
    ) -> Outcome | BaseException:
        """Do something to it once it is under way; return how it ended.

        One with a timeout of its own may have ended before.
        """
        thread = threading.Thread(target=self._migrate, args=(options,), daemon=True)
        thread.start()
        if options.timeout is None:
            self._wait(thread)
        fault()
        thread.join(150)
        assert self._ended, "it did not end"
        return self._ended[0]

    # Private

    def _migrate(self, options: Options) -> None:
        live, dest = self._world.a.driver.live, self._world.b.host.name
        try:
            self._ended.append(live.migrate(self._instance.uuid, dest, options))
        except BaseException as e:
            self._ended.append(e)

    def _wait(self, thread: threading.Thread) -> None:
        deadline = time.monotonic() + 60
        while thread.is_alive() and time.monotonic() < deadline:
            status = self._world.a.driver.live.status(self._instance.uuid)
            if status is not None and status.processed > MiB:
                return
            time.sleep(0.1)
        raise AssertionError(f"it is not under way: {self._ended}")


@pytest.mark.timeout(600)
def test_it_runs_on_where_it_was(hosts: World) -> None:
    """One guest goes through all of it, and then moves."""
    instance, a, b = livehosts.beating(hosts), hosts.a, hosts.b

    def kill_qemu() -> None:
        os.kill(livehosts.qemu(b), signal.SIGKILL)

    with livehosts.watching(hosts, instance) as watcher:
        ended = Move(hosts, instance).run(
            lambda: a.driver.live_migration_abort(instance)
        )
        expect_back(hosts, instance, ended, errors.Cancelled)

        ended = Move(hosts, instance).run(kill_qemu)
        expect_back(hosts, instance, ended, errors.MigrationRolledBack)

        ended = Move(hosts, instance).run(b.host.kill_libvirtd)
        b.host.start_libvirtd()
        expect_back(hosts, instance, ended, errors.MigrationRolledBack)

        ended = Move(hosts, instance).run(
            lambda: None, Options(bandwidth=MiB, timeout=4.0)
        )
        expect_back(hosts, instance, ended, errors.MigrationRolledBack, "longer than")

        ended = Move(hosts, instance).run(lambda: b.host.link(up=False))
        assert livehosts.running(a, instance)
        count = len(livehosts.numbers(a, instance))
        livehosts.wait_for(a, instance, count + 2)
        b.host.link(up=True)
        # Of disks that are sent libvirt lets go only when their connections end.
        expect_back(hosts, instance, ended, errors.MigrationError)

        ended = Move(hosts, instance).run(a.host.kill_libvirtd)
        a.host.start_libvirtd()
        expect_back(hosts, instance, ended, errors.Error)

        a.driver.live.migrate(instance.uuid, b.host.name)
        livehosts.wait_for(b, instance, 2)
    assert watcher.both == []
    livehosts.expect_no_beat_lost(hosts, instance)
    hosts.expect_one(instance, b)


def expect_back(
    world: World,
    instance: Any,
    ended: Outcome | BaseException,
    kind: type[BaseException],
    text: str = "",
) -> None:
    """The move failed, the guest beats on where it was, and nothing is left."""
    assert isinstance(ended, kind), repr(ended)
    assert text in str(ended)
    left: list[str] = ["?"]
    deadline = time.monotonic() + 60
    while left and time.monotonic() < deadline:
        with contextlib.suppress(errors.Error):
            left = livehosts.settle(world, 1)
    assert left == []
    assert world.a.state_of(instance) == "running"
    count = len(livehosts.numbers(world.a, instance))
    livehosts.wait_for(world.a, instance, count + 1)
    world.expect_one(instance, world.a)
