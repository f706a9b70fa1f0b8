# SPDX-License-Identifier: Apache-2.0
"""What a transfer took: seconds, bytes on the wire, memory on both sides.

Nothing here is what a tool says of itself. Bytes are counted by the interface of
the peer, in both directions. Memory is the highest resident size (VmHWM) that the
kernel keeps of each process, so looking now and then misses little.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import errors
from sandbox import Host, process
from virtmigrate.units import KiB

INTERFACE = "eth0"
SHORTEST, LONGEST = 0.01, 0.2
"""Seconds between two looks: often at first, so that short transfers are seen, too,
and seldom later, so that looking takes no time from the tools."""
RESET_PEAK = "5"
"""Written to clear_refs: the peak becomes what is resident now (proc(5))."""


@dataclass(frozen=True)
class Figures:
    """One measurement, or what is made of several."""

    seconds: float
    wire_bytes: int
    """Both directions, as the peer's interface counts them."""
    client_peak_bytes: int
    """Growth of the source's side: processes that were there before the transfer
    (ours) over what they had then, and others as a whole."""
    peer_growth_bytes: int
    """The same of the peer: libvirtd, sshd and its children, or qemu-nbd."""


class Family:
    """Some processes and their memory, looked at again and again.

    Arguments:
        pid_namespace: only processes in this one; None: our descendants that are
            in our own.
    """

    def __init__(self, pid_namespace: str | None) -> None:
        self._wanted = pid_namespace
        self._own = process.namespace_of("pid", os.getpid())
        self._members: dict[int, bool] = {}
        self._before: dict[int, int] = {}
        self.growth = 0

    def begin(self) -> None:
        """Count from what is resident now."""
        for pid in self._pids():
            with contextlib.suppress(OSError, KeyError):
                Path(f"/proc/{pid}/clear_refs").write_text(RESET_PEAK)
                self._before[pid] = _resident(pid, "VmRSS")

    def look(self) -> None:
        """Note what the processes that live now have grown by, each at its peak."""
        grown = 0
        for pid in self._pids():
            with contextlib.suppress(OSError, KeyError):
                peak = _resident(pid, "VmHWM")
                grown += max(0, peak - self._before.get(pid, 0))
        self.growth = max(self.growth, grown)

    # Private

    def _pids(self) -> Iterator[int]:
        for pid in process.all_pids():
            if pid not in self._members and not _is_forked(pid):
                self._members[pid] = self._is_member(pid)
            if self._members.get(pid):
                yield pid

    def _is_member(self, pid: int) -> bool:
        namespace = process.namespace_of("pid", pid)
        if self._wanted is not None:
            return namespace == self._wanted
        return namespace == self._own and _descends(pid, os.getpid())


class Meter:
    """Measures what happens between start() and stop()."""

    def __init__(self, peer: Host) -> None:
        self._peer = peer
        self._client = Family(None)
        self._daemons = Family(process.namespace_of("pid", peer.pid))
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._client.begin()
        self._daemons.begin()
        self._wire = wire_bytes(self._peer)
        self._began = time.perf_counter()
        self._watcher.start()

    def stop(self) -> Figures:
        seconds = time.perf_counter() - self._began
        self._stopped.set()
        self._watcher.join()
        self._look()
        return Figures(
            seconds=seconds,
            wire_bytes=wire_bytes(self._peer) - self._wire,
            client_peak_bytes=self._client.growth,
            peer_growth_bytes=self._daemons.growth,
        )

    def cancel(self) -> None:
        """End the watching of a transfer that failed."""
        self._stopped.set()

    # Private

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval()):
            self._look()

    def _interval(self) -> float:
        passed = time.perf_counter() - self._began
        return min(max(SHORTEST, passed / 20), LONGEST)

    def _look(self) -> None:
        self._client.look()
        self._daemons.look()


def wire_bytes(host: Host) -> int:
    """Return what the host's interface has sent and received so far."""
    done = host.run(["ip", "-s", "-j", "link", "show", "dev", INTERFACE])
    (link,) = json.loads(done.stdout)
    stats = link.get("stats64")
    if stats is None:
        raise errors.BenchmarkError(f"{INTERFACE} of {host.name} counts nothing")
    return int(stats["rx"]["bytes"]) + int(stats["tx"]["bytes"])


def _resident(pid: int, key: str) -> int:
    """Return a size of /proc/PID/status; KeyError for a process that has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * KiB
    raise KeyError(key)


def _is_forked(pid: int) -> bool:
    """Tell whether a process is a copy of this one that has not yet begun its program.

    Until then its memory is ours.
    """
    if pid == os.getpid():
        return False
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == _OWN_COMMAND
    except OSError:
        return True


_OWN_COMMAND = Path("/proc/self/cmdline").read_bytes()


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        pid = process.parent_of(pid)
        if pid == ancestor:
            return True
    return False
