# SPDX-License-Identifier: Apache-2.0
"""Progress for people and for logs, and cancelling by a signal.

Everything goes to stderr: stdout is for the result.
"""

import contextlib
import os
import signal
import time
import types
from collections.abc import Iterator
from typing import Self, TextIO

import rich.console
import rich.progress

from virtmigrate import progress, units

INTERVAL = 5.0
"""Seconds between two plain lines of one phase."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Work(progress.Progress):
    """A Progress that can also be cancelled between two phases, until it is bound.

    Safe to share between threads.
    """

    bound = False
    """It is too late to cancel: what was begun is finished."""

    def check(self) -> None:
        if not self.bound:
            super().check()


class Display:
    """Shows reports until it is left: a bar on a terminal, else plain lines.

    Not safe to share between threads.
    """

    def __init__(self, stream: TextIO) -> None:
        self.last = progress.Report("", 0, 0, 0, 0.0)
        self.began: dict[str, float] = {}
        """When each phase began, by time.monotonic()."""
        self._stream = stream
        self._told = 0.0
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        if stream.isatty():
            self._bar = _bar(rich.console.Console(file=stream))

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, report: progress.Report) -> None:
        """Show one report; the listener of a Progress."""
        new = report.phase not in self.began
        self.began.setdefault(report.phase, time.monotonic())
        self.last = report
        if self._bar is not None:
            self._update(self._bar, report, new=new)
        elif new or time.monotonic() - self._told >= INTERVAL:
            self._told = time.monotonic()
            print(line(report), file=self._stream, flush=True)

    # Private

    def _update(
        self, bar: rich.progress.Progress, report: progress.Report, *, new: bool
    ) -> None:
        if new or self._task is None:
            self._finish(bar)
            total = report.total or None
            self._task = bar.add_task(report.phase, total=total, told="")
        bar.update(self._task, completed=report.done, told=told(report))

    def _finish(self, bar: rich.progress.Progress) -> None:
        """Fill the bar of the phase that is over: its last report may be old."""
        if self._task is not None:
            total = bar.tasks[-1].total
            done = units.format_bytes(total) if total else ""
            bar.update(self._task, completed=total or 1, total=total or 1, told=done)


def line(report: progress.Report) -> str:
    """Return a report as one plain line."""
    return ": ".join(filter(None, (report.phase, told(report))))


def told(report: progress.Report) -> str:
    """Return bytes, rate and time left; "" where nothing is counted."""
    if not report.total:
        return ""
    parts = [f"{units.format_bytes(report.done)} of {units.format_bytes(report.total)}"]
    if report.rate > 0:
        parts.append(f"{units.format_bytes(report.rate)}/s")
    if report.left is not None:
        parts.append(f"{report.left:.0f} s left")
    return ", ".join(parts)


@contextlib.contextmanager
def cancelling(work: progress.Progress) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP cancel the work instead of ending us."""

    def cancel(number: int, frame: types.FrameType | None) -> None:
        work.cancel()
        # Not by a stream: the signal may have interrupted one that is writing.
        with contextlib.suppress(OSError):
            os.write(2, b"cancelling; what was done is being put back, wait\n")

    before = {number: signal.signal(number, cancel) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def working(stream: TextIO) -> Iterator[Work]:
    """Yield work that is shown, and that signals cancel."""
    show = Display(stream)
    work = Work(show.show)
    with show, cancelling(work):
        yield work


# Private


def _bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[told]}"),
        console=console,
    )
