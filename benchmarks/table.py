# SPDX-License-Identifier: Apache-2.0
"""The figures: a table with our ratios, what was to be reached, and a file of them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Figures
from virtmigrate.units import MiB, format_bytes

OURS = "virtmigrate"
CLIENT_LIMIT = 64 * MiB
PEER_LIMIT = 128 * MiB

Results = Mapping[str, Mapping[str, Figures]]
"""Case → tool → figures."""


@dataclass(frozen=True)
class Goal:
    """Our seconds, at most `factor` times another tool's in the same case."""

    case: str
    tool: str
    factor: float


@dataclass(frozen=True)
class Sent:
    """Our bytes on the wire, at most `factor` times what has to cross it."""

    case: str
    factor: float


@dataclass(frozen=True)
class Verdict:
    """One figure to reach, and how it went."""

    what: str
    seen: str
    reached: bool | None
    """None: there is nothing to judge by."""

    def __str__(self) -> str:
        word = {True: "reached", False: "NOT REACHED", None: "not measured"}
        return f"  {word[self.reached]:12}  {self.what}: {self.seen}"


GOALS: tuple[Goal | Sent, ...] = (
    Goal("dense", "nbdcopy", 1.0),
    Goal("dense", "scp", 0.6),
    Goal("dense", "rsync", 0.55),
    Goal("dense-verified", "nbdcopy", 1.25),
    Goal("sparse", "nbdcopy", 1.1),
    Goal("sparse", "rsync", 0.07),
    Sent("sparse", 1.02),
    Sent("return", 1.5),
    Goal("return", "rsync", 0.3),
    Sent("overlay", 1.05),
    Goal("many", "virtmigrate-one-disk", 1.1),
)


def middle(rounds: Sequence[Figures]) -> Figures:
    """Return the medians of several rounds, and the largest of their memory."""
    return Figures(
        seconds=statistics.median(each.seconds for each in rounds),
        wire_bytes=int(statistics.median(each.wire_bytes for each in rounds)),
        client_peak_bytes=max(each.client_peak_bytes for each in rounds),
        peer_growth_bytes=max(each.peer_growth_bytes for each in rounds),
    )


def ratio(tools: Mapping[str, Figures], tool: str) -> float | None:
    """Return our time by another tool's; None unless both were measured."""
    if OURS not in tools or tool not in tools:
        return None
    return tools[OURS].seconds / tools[tool].seconds


def verdicts(
    results: Results, amounts: Mapping[str, int], streams: int
) -> Iterator[Verdict]:
    """Judge all figures to reach.

    Arguments:
        amounts: case → bytes that have to cross the wire.
        streams: how many of ours are open to the peer at once.
    """
    for goal in GOALS:
        yield _judge(goal, results.get(goal.case, {}), amounts)
    own = {case: tools[OURS] for case, tools in results.items() if OURS in tools}
    client = {case: each.client_peak_bytes for case, each in own.items()}
    peer = {case: each.peer_growth_bytes for case, each in own.items()}
    yield _bounded("client's memory over the start", client, CLIENT_LIMIT)
    yield _bounded("growth of the peer's daemon", peer, PEER_LIMIT * streams)


def table(results: Results) -> Iterator[str]:
    """Yield the lines of a table for people."""
    for case, tools in results.items():
        heads = "".join(f"{head:>12}" for head in ("wire", "client", "peer"))
        yield f"\n{case:22}{'seconds':>9}{'ours':>8}{heads}"
        for tool, figures in tools.items():
            found = ratio(tools, tool)
            by = f"{found:7.2f}x" if found and tool != OURS else ""
            sizes = (
                figures.wire_bytes,
                figures.client_peak_bytes,
                figures.peer_growth_bytes,
            )
            columns = "".join(f"{format_bytes(size):>12}" for size in sizes)
            yield f"  {tool:20}{figures.seconds:9.2f}{by:>8}{columns}"


def save(results: Results, path: Path) -> None:
    """Write case → tool → figures as JSON."""
    plain = {
        case: {tool: dataclasses.asdict(figures) for tool, figures in tools.items()}
        for case, tools in results.items()
    }
    path.write_text(json.dumps(plain, indent=2) + "\n")


# Private


def _judge(
    goal: Goal | Sent, tools: Mapping[str, Figures], amounts: Mapping[str, int]
) -> Verdict:
    if isinstance(goal, Goal):
        what = f"{goal.case}: at most {goal.factor:g} x {goal.tool}"
        found = ratio(tools, goal.tool)
    else:
        what = f"{goal.case}: at most {goal.factor:g} x the bytes needed"
        amount = amounts.get(goal.case)
        own = tools.get(OURS)
        found = own.wire_bytes / amount if own and amount else None
    if found is None:
        return Verdict(what, "-", None)
    return Verdict(what, f"{found:.3f} x", found <= goal.factor)


def _bounded(what: str, sizes: Mapping[str, int], limit: int) -> Verdict:
    what = f"{what}: at most {format_bytes(limit)}"
    if not sizes:
        return Verdict(what, "-", None)
    worst = max(sizes, key=lambda case: sizes[case])
    seen = f"{format_bytes(sizes[worst])} in {worst}"
    return Verdict(what, seen, sizes[worst] <= limit)
