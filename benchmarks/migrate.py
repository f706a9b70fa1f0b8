# SPDX-License-Identifier: Apache-2.0
"""Measures live migration with local disks, beside virsh.

    python -m sandbox exec --own bench -- python -m benchmarks.migrate

Two guests that tick (ticker.py) go from one host to the other and back: one by us, one
by `virsh migrate --live --copy-storage-all --tls`. In turns, so that noise hits both.
"seconds" is the whole call; "downtime" the longest time without a tick on either host's
console, seen by a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import errors, ticker
from sandbox import Sandbox, SandboxError
from tests.functional.sides import Kinds, Side
from virtmigrate import domainxml
from virtmigrate.units import MiB

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 6
SIZE = 256 * MiB
MEMORY_MB = 256
LOOK = 0.0005
TIMEOUT = 300

TIME_RATIO = 1.1
DOWNTIME_RATIO, DOWNTIME_PLUS = 1.1, 0.05
"""What is to be reached: so many times as long, and so many seconds."""

Times = dict[str, dict[str, list[float]]]


@dataclass
class Mover:
    """One way to bring a guest from one host to another."""

    sides: tuple[Side, Side]
    instance: Any
    disk: Path | None = None

    def ours(self, src: Side, dst: Side) -> None:
        src.driver.live.migrate(self.instance.uuid, dst.host.name)

    def virsh(self, src: Side, dst: Side) -> None:
        """The disk there is made first, as a user of virsh has to."""
        uuid, target = self.instance.uuid, dst.path / f"by-hand-{self.instance.name}"
        with target.open("wb") as file:
            file.truncate(SIZE)
        words = ["virsh", "-q", "-c", src.host.local_uri]
        dumped = subprocess.run(
            [*words, "dumpxml", "--migratable", uuid], capture_output=True, text=True
        ).stdout
        layer = domainxml.Layer(
            domainxml.SourceType.FILE, str(target), domainxml.DiskFormat.RAW
        )
        path = target.with_suffix(".xml")
        path.write_text(domainxml.with_disks(dumped, {"vda": [layer]}))
        argv = [*words, "migrate", "--live", "--copy-storage-all", "--tls", "--unsafe"]
        argv += ["--persistent", "--undefinesource", "--xml", str(path)]
        argv += ["--persistent-xml", str(path), uuid, dst.host.uri]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            raise errors.BenchmarkError(f"virsh migrate: {done.stderr}")


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    try:
        found = measured(Sandbox.attach(), arguments.rounds)
    except (errors.BenchmarkError, SandboxError) as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 1
    print(*table(found), sep="\n")
    if arguments.rounds == ROUNDS:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nWritten to {RESULTS}")
    return 0


def measured(box: Sandbox, rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of each figure, in seconds."""
    times: Times = {"seconds": {}, "downtime": {}}
    with sides_of(box) as sides:
        movers = {name: Mover(sides, a_guest(sides[0], name)) for name in WAYS}
        for number in range(rounds):
            src, dst = sides if number % 2 == 0 else sides[::-1]
            for name in sorted(movers, reverse=bool(number // 2 % 2)):
                one_move(times, name, movers[name], src, dst)
    return {
        what: {name: statistics.median(each) for name, each in by_name.items()}
        for what, by_name in times.items()
    }


WAYS = ("ours", "virsh")


def one_move(times: Times, name: str, mover: Mover, src: Side, dst: Side) -> None:
    """Move a guest, and note what that took."""
    consoles = [
        side.host.logs / f"qemu/virtmigrate-{mover.instance.uuid}.log"
        for side in (src, dst)
        if hasattr(side.host, "logs")
    ]
    with gaps(consoles) as watch:
        began = time.monotonic()
        getattr(mover, name)(src, dst)
        times["seconds"].setdefault(name, []).append(time.monotonic() - began)
        time.sleep(1.0)
        watch.send(None)
        times["downtime"].setdefault(name, []).append(float(watch.recv()))


@contextlib.contextmanager
def sides_of(box: Sandbox) -> Iterator[tuple[Side, Side]]:
    """Yield two hosts with directories of their own."""
    with contextlib.ExitStack() as stack:
        found = []
        for name in ("one", "two"):
            host = box.add_host(name)
            stack.callback(box.remove_host, name)
            tmp = host.directory / "bench"
            disks = {"kind": "dir", "path": str(host.storage / "disks")}
            side = Side(host, tmp, disks, "bench", accept_moves=True)
            stack.callback(side.close)
            found.append(side)
        yield found[0], found[1]


def a_guest(side: Side, name: str) -> Any:
    """Start a guest that ticks."""
    path = side.config.with_name(f"ticker-{name}")
    ticker.image(path, SIZE)
    digit = str(WAYS.index(name))
    instance = argparse.Namespace(
        uuid=f"44444444-5555-4555-8555-{digit * 12}",
        name=f"ticker-{name}",
        flavor=Kinds.flavor_of("bench", memory_mb=MEMORY_MB),
    )
    meta = {"path": str(path), "disk_format": "raw"}
    side.driver.spawn(None, instance, meta)
    return instance


@contextlib.contextmanager
def gaps(consoles: list[Path]) -> Iterator[Connection]:
    """Have a process see how long a guest does not tick on any of its consoles."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    watcher = context.Process(target=_watch, args=(consoles, theirs), daemon=True)
    watcher.start()
    theirs.close()
    ours.recv()
    try:
        yield ours
    finally:
        ours.close()
        watcher.join()


def table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield the figures, and whether they are what is to be reached."""
    for what, figures in found.items():
        said = (f"{name} {value:.3f} s" for name, value in figures.items())
        limit = TIME_RATIO * figures["virsh"]
        if what == "downtime":
            limit = DOWNTIME_RATIO * figures["virsh"] + DOWNTIME_PLUS
        reached = "reached" if figures["ours"] <= limit else "NOT reached"
        yield f"{what:10} {', '.join(said)}; {reached}: at most {limit:.3f} s"


# Private


def _watch(consoles: list[Path], orders: Connection) -> None:
    sizes = [_size(path) for path in consoles]
    last, longest, told = time.perf_counter(), 0.0, False
    with contextlib.suppress(EOFError):
        while True:
            found, now = [_size(path) for path in consoles], time.perf_counter()
            longest = max(longest, now - last)
            if found != sizes:
                sizes, last = found, now
                if not told:
                    # From the first tick on.
                    longest, told = 0.0, True
                    orders.send(None)
            if orders.poll(LOOK):
                orders.recv()
                orders.send(longest)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
