# SPDX-License-Identifier: Apache-2.0
"""Measures clones of a running guest, beside virsh's checkpoint of the same guest.

    make bench
    python -m sandbox exec --own bench -- python -m benchmarks.clone

How long the source stands still for one clone, as ticker.py sees it, against `virsh
snapshot-create-as --live --memspec --diskspec`; in turns, so that noise hits both. And
how long it takes until one clone runs, and until four do. Nobody is asked inside of the
guests: what that takes is theirs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import cache, errors, snapshot, ticker
from sandbox import Sandbox, SandboxError
from tests.functional import cloneworld
from tests.functional.sides import Side
from virtmigrate import conf as options

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 8
MANY = 4


@dataclass
class Clones(snapshot.Taker):
    """Clones of a guest, which go with their source's layer."""

    made: list[Any] = field(default_factory=list)

    def take(self, *, memory: bool) -> None:
        self.clone(1)

    def clone(self, count: int) -> None:
        self.made = cloneworld.new(count)
        self.side.driver.clone(None, self.instance, self.made)

    def merge(self) -> None:
        for each in self.made:
            self.side.driver.destroy(None, each)
        self.made.clear()


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
    here = side.driver.node
    here.conf.set_override("enable_live_clone", True, options.GROUP)
    side.driver.clones.identities = cloneworld.Fake()
    times: dict[str, snapshot.Times] = {}
    with snapshot.a_guest(side) as (instance, watch):
        clones = Clones(side, instance)
        takers = {"ours": clones, "virsh": snapshot.ByHand(side, instance)}
        for number in range(rounds):
            for name in sorted(takers, reverse=bool(number % 2)):
                one_round(times, name, takers[name], watch)
            for count in (1, MANY):
                seconds = snapshot.taken(functools.partial(clones.clone, count))
                snapshot.note(times, f"clones: {count}", "ours", seconds)
                clones.merge()
    return {
        what: {name: statistics.median(each) for name, each in by_name.items()}
        for what, by_name in times.items()
    }


def one_round(
    times: dict[str, snapshot.Times],
    name: str,
    taker: snapshot.Taker,
    watch: ticker.Watch,
) -> None:
    """Take a checkpoint, or make a clone, and have the source's layer merged."""
    with watch.measured():
        taker.take(memory=True)
    snapshot.note(times, "source: gap", name, watch.gap)
    snapshot.note(times, "source: stopped", name, watch.stopped)
    taker.merge()
    taker.clean()


def table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield the figures, and whether they are what is to be reached."""
    yield from snapshot.table(found)


if __name__ == "__main__":
    sys.exit(main())
