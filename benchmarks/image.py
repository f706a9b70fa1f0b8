# SPDX-License-Identifier: Apache-2.0
"""Measures images made of a running guest, beside qemu-img on the same frozen disk.

    make bench
    python -m sandbox exec --own bench -- python -m benchmarks.image

A disk of 1 GiB, half of it data, becomes a file beside it: by us, read back and
compared; and by `qemu-img convert`, flushed. In turns, so that noise hits both. `copy`
is from the first byte to the file's name, `whole` the call with freezing and merging.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import cache, errors, snapshot
from sandbox import Sandbox, SandboxError
from tests.functional.sides import Kinds, Side
from virtmigrate.livesnapshot import Kind, Target, Wanted
from virtmigrate.progress import Progress, Report
from virtmigrate.snapshot import Wanted as Snapshot
from virtmigrate.units import MiB

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 5
SIZE = 1024 * MiB
DATA = 512 * MiB
FORMATS = ("qcow2", "raw")
RATIO = 1.2
"""Our copy takes at most so many times as long."""

Found = dict[str, dict[str, float]]


class Clock:
    """Keeps when each phase began."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    def note(self, report: Report) -> None:
        self.began.setdefault(report.phase, time.monotonic())


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


def measured(side: Side, rounds: int) -> Found:
    """Return the medians of each figure, in seconds."""
    instance, frozen = a_guest(side)
    times: dict[str, snapshot.Times] = {}
    for number in range(rounds):
        for fmt in FORMATS:
            for turn in (0, 1) if number % 2 else (1, 0):
                if turn:
                    ours(side, instance, frozen, fmt, times)
                else:
                    theirs(frozen, fmt, times)
    side.driver.destroy(None, instance, None)
    return {
        what: {name: statistics.median(each) for name, each in by_name.items()}
        for what, by_name in times.items()
    }


def a_guest(side: Side) -> tuple[Any, Path]:
    """Return a running guest, and the file of its disk, which stands still."""
    path = side.config.with_name("disk")
    with path.open("wb") as file, Path("/dev/urandom").open("rb") as noise:
        file.truncate(SIZE)
        # In parts with holes between.
        for start in range(0, SIZE, 64 * MiB):
            file.seek(start)
            for _ in range(DATA // (SIZE // (64 * MiB)) // MiB):
                file.write(noise.read(MiB))
    instance = snapshot.an_instance(Kinds.flavor_of("bench", memory_mb=64))
    side.driver.spawn(None, instance, {"path": str(path), "disk_format": "raw"})
    path.unlink()
    _, volume = side.disk(instance)
    side.driver.snapshots.create(instance.uuid, Snapshot("still"))
    return instance, Path(volume.path)


def ours(
    side: Side, instance: Any, frozen: Path, fmt: str, times: dict[str, snapshot.Times]
) -> None:
    path, clock = frozen.with_name("made"), Clock()
    target = Target(kind=Kind.FILE, where=str(path), name="made")
    began = time.monotonic()
    side.driver.saves.save(
        instance.uuid, Wanted(target=target, format=fmt), Progress(clock.note)
    )
    whole = time.monotonic() - began
    path.unlink()
    copy = clock.began["merging"] - clock.began["looking at vda"]
    snapshot.note(times, f"{fmt}: copy", "ours", copy)
    snapshot.note(times, f"{fmt}: whole", "ours", whole)


def theirs(frozen: Path, fmt: str, times: dict[str, snapshot.Times]) -> None:
    path = frozen.with_name("made")
    argv = ["qemu-img", "convert", "-U", "-f", "raw", "-O", fmt, "-t", "writeback"]
    began = time.monotonic()
    subprocess.run([*argv, str(frozen), str(path)], check=True, timeout=600)
    seconds = time.monotonic() - began
    path.unlink()
    snapshot.note(times, f"{fmt}: copy", "qemu-img", seconds)


def table(found: Found) -> Iterator[str]:
    """Yield the figures, and whether they are what is to be reached."""
    for what, figures in found.items():
        said = (f"{name} {value:.2f} s" for name, value in figures.items())
        yield f"{what:16} {', '.join(said)}"
        if "qemu-img" in figures:
            limit = RATIO * figures["qemu-img"]
            reached = "reached" if figures["ours"] <= limit else "NOT reached"
            yield f"{'':16} {reached}: at most {limit:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
