# SPDX-License-Identifier: Apache-2.0
"""Measures transfers of disks between two hosts: ourselves, and what others use.

    make bench
    python -m sandbox exec --own bench -- python -m benchmarks.transfer --shrink 16

All tools of a case do the same work on the same hosts, in turns, so that noise hits
each of them. The first copy of each is compared with its source. A tool that fails
ends the run with an error; a figure that is not reached does not.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

from benchmarks import cases, disks, errors, measure, ours, table
from benchmarks.measure import Figures
from benchmarks.place import Place, place
from benchmarks.tools import Tool, Work
from sandbox import SandboxError

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 3


def main() -> int:
    """Run the benchmark and return the exit code."""
    arguments = parser().parse_args()
    # Unwinds what is mounted and started when somebody ends us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with place() as made:
            run(cases.Bench(made, arguments.shrink), arguments)
    except (errors.BenchmarkError, SandboxError) as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("cases", nargs="*", help=f"of {', '.join(cases.CASES)}")
    made.add_argument("--shrink", type=int, default=1, help="divide sizes by this")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--output", type=Path, help="the JSON; by default for a full run")
    return made


def run(bench: cases.Bench, arguments: argparse.Namespace) -> None:
    """Measure the cases, print the table, and write the figures of a full run."""
    results: dict[str, dict[str, Figures]] = {}
    amounts: dict[str, int] = {}
    for name in arguments.cases or cases.CASES:
        began = time.monotonic()
        with cases.CASES[name](bench) as case:
            results[name] = measured(bench.place, case, arguments.rounds)
            amounts[name] = case.amount
        say(f"{name}: {time.monotonic() - began:.0f} s")
    print(*table.table(results), sep="\n")
    print("\nTo reach:")
    print(*table.verdicts(results, amounts, ours.STREAMS), sep="\n")
    is_full = not arguments.cases and arguments.shrink == 1
    if output := arguments.output or (RESULTS if is_full else None):
        table.save(results, output)
        print(f"\nWritten to {output}")


def measured(where: Place, case: cases.Case, rounds: int) -> dict[str, Figures]:
    """Let the tools of a case take turns, each time another one first."""
    found: dict[str, list[Figures]] = defaultdict(list)
    for number in range(rounds):
        turn = number % (len(case.tools) or 1)
        for tool in (*case.tools[turn:], *case.tools[:turn]):
            figures = once(where, tool, case.work, compare=number == 0)
            case.again()
            found[tool.name].append(figures)
            say(f"  {tool.name} {figures.seconds:.2f} s")
    return {tool.name: table.middle(found[tool.name]) for tool in case.tools}


def once(where: Place, tool: Tool, work: Work, *, compare: bool) -> Figures:
    """Measure one transfer.

    Raises BenchmarkError when it fails, or its copy is to be compared and differs.
    """
    meter = measure.Meter(where.beta)
    with tool.ready(where, work) as transfer:
        meter.start()
        try:
            transfer()
            figures = meter.stop()
        finally:
            meter.cancel()
        for disk in tool.moved(work) if compare else ():
            disks.compare(disk.path, work.target.file(disk.name))
    return figures


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
