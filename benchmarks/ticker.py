# SPDX-License-Identifier: Apache-2.0
"""A guest that ticks, and what sees from outside how long it did not.

A tick is a sector written to its disk by the firmware, then a byte on the serial
console: neither comes while its processors stand still, nor while its disk does. A
process of its own notes when bytes arrive, so that what is measured does not slow the
measuring down. libvirt's log keeps the console, whoever reads it.

On a busy machine ticks are late without a reason of ours. So QEMU's own word is noted,
too: the times of its events when the processors are stopped and go on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import libvirt
import libvirt_qemu

from benchmarks import errors

SECTOR = 512
LOOK = 0.0005
"""Seconds between two looks at the console."""
WINDOW, SETTLE = 2.0, 0.3
"""Seconds that are looked at: all are the same, because the longest gap grows with the
time in which it is looked for; and at least so many after the work."""
START = 30.0
"""Seconds until the first tick."""

PROGRAM = bytes.fromhex(
    "fa 31c0 8ed8 8ec0 8ed0 bc007c fb"  # segments and stack
    "8816007e"  # the disk that it was started from
    "b80103 b90200 b600 8a16007e bb007c cd13"  # INT 13h: write sector 2
    "baf803 b02e ee"  # "." to the first serial port
    "ebe7"  # again
)


def image(path: Path, size: int) -> None:
    """Make a disk that ticks when it is booted."""
    with path.open("wb") as file:
        file.write(PROGRAM.ljust(SECTOR - 2, b"\0") + b"\x55\xaa")
        file.truncate(size)


@dataclass(frozen=True)
class Guest:
    """Where a guest's ticks and events are to be had."""

    uri: str
    uuid: str
    console: Path


class Watch:
    """Sees how long a guest does not tick."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.gap = 0.0
        """Seconds of the longest gap in what was measured last."""
        self.stopped = 0.0
        """Seconds that its processors were stopped for, by QEMU's events."""

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Note what happens from now on, for WINDOW seconds at least."""
        self._connection.send(True)
        self._connection.recv()
        began = time.monotonic()
        yield
        time.sleep(max(SETTLE, began + WINDOW - time.monotonic()))
        self._connection.send(False)
        self.gap, self.stopped = self._connection.recv()

    def wait(self) -> None:
        """Wait until the guest ticks."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            with self.measured():
                pass
            if self.gap < WINDOW / 2:
                return
        raise errors.BenchmarkError(f"the guest does not tick within {START:g} s")


@contextlib.contextmanager
def watching(guest: Guest) -> Iterator[Watch]:
    """Watch a guest."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    watcher = context.Process(target=_watch, args=(guest, theirs), daemon=True)
    watcher.start()
    theirs.close()
    try:
        yield Watch(ours)
    finally:
        ours.close()
        watcher.join()


# Private


class _Events:
    """QEMU's word on when a guest's processors stop and go on."""

    def __init__(self, guest: Guest) -> None:
        self.stopped = 0.0
        self._since: float | None = None
        libvirt.virEventRegisterDefaultImpl()
        self._conn = libvirt.open(guest.uri)
        domain = self._conn.lookupByUUIDString(guest.uuid)
        for name in ("STOP", "RESUME"):
            libvirt_qemu.qemuMonitorEventRegister(
                self._conn, domain, name, self._note, None
            )
        threading.Thread(target=self._run, daemon=True).start()

    # Private

    def _run(self) -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    def _note(self, *found: object) -> None:
        _conn, _domain, event, seconds, micros, *_ = found
        at = float(f"{seconds}.{micros:06}")
        if event == "STOP":
            self._since = at
        elif self._since is not None:
            self.stopped += at - self._since
            self._since = None


def _watch(guest: Guest, orders: Connection) -> None:
    """Answer each order with what was seen since it was ordered to look."""
    events = _Events(guest)
    with guest.console.open("rb") as file, contextlib.suppress(EOFError):
        last, longest = time.perf_counter(), 0.0
        while True:
            is_new, now = bool(file.read()), time.perf_counter()
            longest = max(longest, now - last)
            if is_new:
                last = now
            if orders.poll(LOOK):
                begins = orders.recv()
                orders.send((longest, events.stopped))
                if begins:
                    longest = events.stopped = 0.0
