# SPDX-License-Identifier: Apache-2.0
"""Measures snapshots of a running guest, beside virsh on the same guest.

    make bench
    python -m sandbox exec --own bench -- python -m benchmarks.snapshot

Of taking one: how long the guest stands still, as ticker.py sees it, for a disk
snapshot and for a live checkpoint with memory in a file; against `virsh
snapshot-create-as`.
Of deleting one: how long it takes to write a layer into the one below it, from the call
to its end; against `virsh blockcommit`. In turns, so that noise hits both. virsh's
layers are gone before it is our turn again.

"gap" is the longest time without a tick; "stopped" is what QEMU says of the processors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt_qemu

from benchmarks import cache, errors, ticker
from sandbox import Sandbox, SandboxError
from tests.functional.sides import Kinds, Side
from virtmigrate.snapshot import Kind, Memory, Wanted
from virtmigrate.units import MiB

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 12
SIZE = 256 * MiB
LAYER = 64 * MiB
"""What is written to a layer before it is merged."""
MEMORY_MB = 256
TIMEOUT = 120

PAUSE_RATIO, PAUSE_PLUS = 1.1, 0.03
"""The guest stands still at most so many times as long, and so many seconds."""
DELETE_RATIO = 1.2

Times = dict[str, list[float]]


@dataclass
class Taker:
    """One way to take a snapshot of a guest, and to merge it."""

    side: Side
    instance: Any
    number: int = 0
    files: list[Path] = field(default_factory=list)

    def take(self, *, memory: bool) -> None:
        raise NotImplementedError

    def merge(self) -> None:
        """Write the newest layer into the one below it."""
        raise NotImplementedError

    def clean(self) -> None:
        """Remove what is left; not measured."""


class Ours(Taker):
    def take(self, *, memory: bool) -> None:
        wanted = Wanted("taken")
        if memory:
            wanted = Wanted("taken", kind=Kind.CHECKPOINT, memory=Memory.EXTERNAL)
        self.side.driver.snapshots.create(self.instance.uuid, wanted)

    def merge(self) -> None:
        self.side.driver.snapshots.delete(self.instance.uuid, "taken")


class ByHand(Taker):
    def take(self, *, memory: bool) -> None:
        self.number += 1
        layer = self._file(f"by-hand-{self.number}.qcow2")
        argv = ["snapshot-create-as", self.instance.uuid, f"by-hand-{self.number}"]
        argv += ["--atomic", "--no-metadata"]
        argv += ["--diskspec", f"vda,snapshot=external,file={layer}"]
        if memory:
            file = self._file(f"by-hand-{self.number}.memory")
            argv += ["--live", "--memspec", f"file={file},snapshot=external"]
        else:
            argv += ["--disk-only"]
        self._virsh(*argv)

    def merge(self) -> None:
        uuid = self.instance.uuid
        self._virsh("blockcommit", uuid, "vda", "--active", "--pivot", "--wait")

    def clean(self) -> None:
        for path in self.files:
            path.unlink()
        self.files.clear()

    # Private

    def _file(self, name: str) -> Path:
        path = self._disk().with_name(name)
        self.files.append(path)
        return path

    def _disk(self) -> Path:
        _, volume = self.side.disk(self.instance)
        return Path(volume.path)

    def _virsh(self, *words: str) -> None:
        argv = ["virsh", "-q", "-c", self.side.host.local_uri, *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            raise errors.BenchmarkError(f"virsh {words[0]}: {done.stderr}")


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    try:
        with cache.side_of(Sandbox.attach(), "dir-xfs") as side:
            found = measured(side, arguments.rounds)
    except (errors.BenchmarkError, SandboxError) as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 1
    print(*table(found), sep="\n")
    if arguments.rounds == ROUNDS:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nWritten to {RESULTS}")
    return 0


def measured(side: Side, rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of each figure, in seconds."""
    times: dict[str, Times] = {}
    with a_guest(side) as (instance, watch):
        takers = {"ours": Ours(side, instance), "virsh": ByHand(side, instance)}
        for number in range(rounds):
            with watch.measured():
                pass
            note(times, "no snapshot: gap", "guest", watch.gap)
            for name in sorted(takers, reverse=bool(number % 2)):
                one_round(times, name, takers[name], watch)
    return {
        what: {name: statistics.median(each) for name, each in by_name.items()}
        for what, by_name in times.items()
    }


def one_round(
    times: dict[str, Times], name: str, taker: Taker, watch: ticker.Watch
) -> None:
    """Take a disk snapshot and a checkpoint, and merge each."""
    for memory, what in ((False, "disk snapshot"), (True, "checkpoint")):
        with watch.measured():
            taker.take(memory=memory)
        note(times, f"{what}: gap", name, watch.gap)
        note(times, f"{what}: stopped", name, watch.stopped)
        write(taker.side, taker.instance)
        seconds = taken(taker.merge)
        if not memory:
            note(times, "delete", name, seconds)
        taker.clean()


@contextlib.contextmanager
def a_guest(side: Side) -> Iterator[tuple[Any, ticker.Watch]]:
    """Yield a guest that ticks, and what watches it."""
    path = side.config.with_name("ticker")
    ticker.image(path, SIZE)
    flavor = Kinds.flavor_of("bench", memory_mb=MEMORY_MB)
    instance = an_instance(flavor)
    meta = {"path": str(path), "disk_format": "raw"}
    side.driver.spawn(None, instance, meta)
    console = side.host.logs / f"qemu/virtmigrate-{instance.uuid}.log"
    guest = ticker.Guest(side.host.local_uri, instance.uuid, console)
    with ticker.watching(guest) as watch:
        watch.wait()
        yield instance, watch


def an_instance(flavor: Any) -> Any:
    return argparse.Namespace(
        uuid="33333333-5555-4555-8555-333333333333", name="ticker", flavor=flavor
    )


def write(side: Side, instance: Any) -> None:
    """Have QEMU write to the guest's disk, beside what the guest does."""
    device = "/machine/peripheral/virtio-disk0/virtio-backend"
    line = f'qemu-io -d {device} "write -P 7 {MiB} {LAYER}"'
    words = {"command-line": line}
    order = {"execute": "human-monitor-command", "arguments": words}
    with side.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        said = libvirt_qemu.qemuMonitorCommand(domain, json.dumps(order), 0)
    if "error" in json.loads(said):
        raise errors.BenchmarkError(f"qemu-io: {said}")


def note(times: dict[str, Times], what: str, name: str, seconds: float) -> None:
    times.setdefault(what, {}).setdefault(name, []).append(seconds)


def taken(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield the figures, and whether they are what is to be reached."""
    for what, figures in found.items():
        said = (f"{name} {value * 1000:.0f} ms" for name, value in figures.items())
        yield f"{what:24} {', '.join(said)}"
        if "virsh" in figures:
            limit = limit_of(what, figures["virsh"])
            reached = "reached" if figures["ours"] <= limit else "NOT reached"
            yield f"{'':24} {reached}: at most {limit * 1000:.0f} ms"


def limit_of(what: str, theirs: float) -> float:
    """Return what is to be reached, in seconds, by what virsh takes."""
    if what == "delete":
        return DELETE_RATIO * theirs
    return PAUSE_RATIO * theirs + PAUSE_PLUS


if __name__ == "__main__":
    sys.exit(main())
