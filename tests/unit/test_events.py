# SPDX-License-Identifier: Apache-2.0
"""Lifecycle events out of looks at the domains."""

import contextlib
import queue
import threading
import types
from collections.abc import Iterator
from typing import cast

import libvirt
import pytest

from virtmigrate import errors, events, node
from virtmigrate.events import Event, Kind

SECONDS = 10.0
OFTEN = 0.01

RUNNING = libvirt.VIR_DOMAIN_RUNNING
SHUTOFF = libvirt.VIR_DOMAIN_SHUTOFF
PAUSED = libvirt.VIR_DOMAIN_PAUSED
CRASHED = libvirt.VIR_DOMAIN_CRASHED


class FakeDomain:
    def __init__(self, uuid: str, state: int) -> None:
        self._uuid, self._state = uuid, state

    def UUIDString(self) -> str:
        return self._uuid

    def state(self) -> list[int]:
        return [self._state, 0]


class FakeHost:
    """A host whose domains a test changes; `broken` fails each look."""

    def __init__(self, **domains: int) -> None:
        self.domains = domains
        self.broken = False
        self.looks = threading.Semaphore(0)

    @contextlib.contextmanager
    def session(self, doing: str) -> Iterator[types.SimpleNamespace]:
        self.looks.release()
        if self.broken:
            raise errors.HostUnreachable(host="fake", reason="gone")
        yield types.SimpleNamespace(conn=self)

    def listAllDomains(self, flags: int) -> list[FakeDomain]:
        return [FakeDomain(uuid, state) for uuid, state in self.domains.items()]

    def looked(self, times: int = 2) -> None:
        """Wait until it was looked at that often from now on."""
        while self.looks.acquire(blocking=False):
            pass
        for _ in range(times):
            assert self.looks.acquire(timeout=SECONDS)


@pytest.fixture
def fake() -> FakeHost:
    return FakeHost(a=RUNNING, b=SHUTOFF)


@pytest.fixture
def poller(fake: FakeHost) -> Iterator[events.Poller]:
    here = cast(node.Node, types.SimpleNamespace(host=fake))
    poller = events.Poller(lambda: here)
    try:
        yield poller
    finally:
        poller.stop()


@pytest.mark.parametrize(
    ("before", "now", "kind"),
    [
        ("off", "on", Kind.STARTED),
        (None, "on", Kind.STARTED),
        ("off", "paused", Kind.PAUSED),
        ("on", "off", Kind.STOPPED),
        ("on", None, Kind.STOPPED),
        ("paused", None, Kind.STOPPED),
        ("paused", "off", Kind.STOPPED),
        ("on", "paused", Kind.PAUSED),
        ("paused", "on", Kind.RESUMED),
        ("off", None, None),
        (None, "off", None),
        ("on", "on", None),
    ],
)
def test_changes(before: str | None, now: str | None, kind: Kind | None) -> None:
    found = events.changes({"a": before} if before else {}, {"a": now} if now else {})
    assert found == ([Event("a", kind)] if kind else [])


def test_changes_are_sorted() -> None:
    found = events.changes({"b": "on"}, {"c": "on", "a": "on"})
    assert [event.uuid for event in found] == ["a", "b", "c"]


def test_what_runs_at_the_start_is_no_event(
    fake: FakeHost, poller: events.Poller
) -> None:
    heard: queue.Queue[Event] = queue.Queue()
    poller.start(heard.put, OFTEN)
    fake.looked()
    fake.domains = {"a": CRASHED, "b": PAUSED}
    assert heard.get(timeout=SECONDS) == Event("a", Kind.STOPPED)
    assert heard.get(timeout=SECONDS) == Event("b", Kind.PAUSED)


def test_host_that_is_away_at_the_start(fake: FakeHost, poller: events.Poller) -> None:
    heard: queue.Queue[Event] = queue.Queue()
    fake.broken = True
    poller.start(heard.put, OFTEN)
    fake.looked()
    fake.broken = False
    fake.looked()
    fake.domains = {"a": RUNNING}
    fake.looked()
    fake.domains = {}
    assert heard.get(timeout=SECONDS) == Event("a", Kind.STOPPED)


def test_host_that_is_away_for_a_while(fake: FakeHost, poller: events.Poller) -> None:
    heard: queue.Queue[Event] = queue.Queue()
    poller.start(heard.put, OFTEN)
    fake.looked()
    fake.broken = True
    fake.looked()
    assert heard.empty()
    fake.domains = {"a": RUNNING, "b": RUNNING}
    fake.broken = False
    assert heard.get(timeout=SECONDS) == Event("b", Kind.STARTED)


def test_failing_listener_still_hears(fake: FakeHost, poller: events.Poller) -> None:
    heard: queue.Queue[Event] = queue.Queue()

    def listen(event: Event) -> None:
        heard.put(event)
        raise ValueError("the listener broke")

    poller.start(listen, OFTEN)
    fake.looked()
    fake.domains = {"a": SHUTOFF, "b": RUNNING}
    assert heard.get(timeout=SECONDS) == Event("a", Kind.STOPPED)
    assert heard.get(timeout=SECONDS) == Event("b", Kind.STARTED)
    fake.domains = {"a": RUNNING, "b": RUNNING}
    assert heard.get(timeout=SECONDS) == Event("a", Kind.STARTED)


def test_second_start_replaces_the_first(fake: FakeHost, poller: events.Poller) -> None:
    first: queue.Queue[Event] = queue.Queue()
    second: queue.Queue[Event] = queue.Queue()
    poller.start(first.put, OFTEN)
    fake.looked()
    poller.start(second.put, OFTEN)
    fake.looked()
    fake.domains = {}
    assert second.get(timeout=SECONDS) == Event("a", Kind.STOPPED)
    assert first.empty()


def test_stop_does_not_wait_for_the_interval(
    fake: FakeHost, poller: events.Poller
) -> None:
    poller.stop()
    poller.start(lambda event: None, 3600)
    assert fake.looks.acquire(timeout=SECONDS)
    poller.stop()
    assert "virtmigrate-events" not in [t.name for t in threading.enumerate()]
