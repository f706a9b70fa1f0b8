# SPDX-License-Identifier: Apache-2.0
"""Jobs of libvirt that are watched, without a libvirt."""

import threading
from collections.abc import Iterable

from virtmigrate import domainstate, errors
from virtmigrate.progress import Progress, Report

Found = tuple[int, int] | None
BUSY = errors.LibvirtFailed(
    host="alpha", doing="looking", reason="no lock", code=0, domain=0
)


class Scripted(domainstate.States):
    """Finds one thing after the other when it looks at a job, then nothing."""

    def __init__(self, found: Iterable[Found | errors.Error]) -> None:
        self._found = iter(found)
        self.over = threading.Event()

    def _job(self, uuid: str) -> Found:
        for found in self._found:
            if isinstance(found, errors.Error):
                raise found
            return found
        self.over.set()
        return None


def watched(states: Scripted) -> list[tuple[str, int, int]]:
    """Watch a job until the script is over; return what was told."""
    told = []

    def run() -> None:
        assert states.over.wait(10)

    def listen(report: Report) -> None:
        told.append((report.phase, report.done, report.total))

    progress = Progress(listen, interval=0.0)
    progress.phase("freezing")
    states._watched("uuid", run, progress, 20.0)
    return told


def test_writing_of_memory_is_told_with_its_size() -> None:
    """Pages that the guest writes to again are not through any more."""
    told = watched(Scripted([None, (0, 100), (40, 100), (30, 100), (100, 100)]))
    assert told[0] == ("freezing", 0, 0)
    written = [each for each in told if each[0] == "writing memory"]
    assert [done for _, done, _ in written] == sorted(done for _, done, _ in written)
    assert written[-1] == ("writing memory", 100, 100)


def test_a_look_that_fails_is_not_the_job() -> None:
    told = watched(Scripted([(10, 100), BUSY, (100, 100)]))
    assert told[-1] == ("writing memory", 100, 100)
