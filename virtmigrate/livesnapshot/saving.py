# SPDX-License-Identifier: Apache-2.0
"""The bytes of disks that stand still, into their sinks, proven."""

import contextlib
import time
from collections.abc import Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, journal, limit, node, sinks
from virtmigrate.livesnapshot import packing
from virtmigrate.livesnapshot.frozen import Frozen, Still
from virtmigrate.livesnapshot.outgoing import Outgoing
from virtmigrate.livesnapshot.places import Places
from virtmigrate.livesnapshot.terms import Saved, Stage, Target, Wanted
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

Goals = dict[str, Target]
"""By disk, where its image goes."""


class Saving:
    """One operation: lets bytes pass, counts them, and ends when it is late."""

    def __init__(
        self,
        here: node.Node,
        places: Places,
        operation: str,
        wanted: Wanted,
        progress: Progress,
    ) -> None:
        self._here = here
        self._places = places
        self._operation = operation
        self._wanted = wanted
        self._progress = progress
        self._limits = limit.Limits(limit.Limiter(wanted.bandwidth), here.bandwidth)
        self._deadline = time.monotonic() + wanted.timeout

    def goals(self, disks: list[str]) -> Goals:
        """Return where the images of some disks go, the first one where it was asked.

        Raises ConfigurationError, ImageNotTaken where that is nowhere.
        """
        if self._wanted.compress and self._wanted.format != "qcow2":
            raise errors.ConfigurationError(
                reason=f"a {self._wanted.format} image cannot be compressed, only qcow2"
            )
        first, *others = disks
        target = self._wanted.target
        found = {first: target, **{disk: target.beside(disk) for disk in others}}
        for each in found.values():
            self._places.sink(each, self._operation).look()
        return found

    def run(self, noted: journal.Journal, goals: Goals, still: Frozen) -> list[Saved]:
        """Send all disks, prove all images, then let others have them.

        What fails leaves images to be aborted: those that the journal says were begun.
        """
        self._wanted.told(Stage.SENDING)
        opened, saved = [], []
        for disk in still.disks:
            target = goals[disk.target]
            noted.done("sending", target=msgspec.to_builtins(target))
            sink = self._places.sink(target, self._operation)
            made, mark = self._sent(sink, disk, target, still.consistency)
            noted.done("proven", where=target.where, mark=mark)
            opened.append(sink)
            saved.append(made)
        for sink in opened:
            sink.publish()
        noted.done("saved")
        return saved

    # As a meter

    def check(self) -> None:
        """Raise Cancelled, ImageNotTaken when it is late."""
        self._progress.check()
        if time.monotonic() > self._deadline:
            raise errors.ImageNotTaken(
                image=self._wanted.target.where,
                reason=f"it took longer than {self._wanted.timeout:g} s",
            )

    def count(self, passed: int, *, sent: int) -> None:
        self.check()
        self._limits.take(sent, self.check)
        self._progress.advance(passed, sent=sent)

    # Private

    def _sent(
        self, sink: sinks.Sink, disk: Still, target: Target, consistency: str
    ) -> tuple[Saved, str]:
        """Send one disk and prove its image; return it, with the sink's mark."""
        with self._outgoing(disk) as image:
            sink.begin(
                sinks.Announced(
                    name=target.name,
                    format=self._wanted.format,
                    size=image.size,
                    virtual_size=disk.source.size,
                    properties=self._wanted.properties,
                )
            )
            self._progress.phase(f"saving {disk.target}", image.size)
            sink.take(image.pieces(sink.algorithm))
            self._progress.phase(f"proving {disk.target}")
            mark = sink.prove(image.digest)
        made = Saved(
            disk=disk.target,
            place=sink.place,
            format=self._wanted.format,
            size=image.size,
            virtual_size=disk.source.size,
            consistency=consistency,
            digest=f"{sink.algorithm}:{image.digest(sink.algorithm)}",
        )
        return made, mark

    @contextlib.contextmanager
    def _outgoing(self, disk: Still) -> Iterator[Outgoing]:
        """Open a disk, as the bytes of its image."""
        wanted = self._wanted
        if not wanted.compress:
            with disk.source as source:
                self._progress.phase(f"looking at {disk.target}")
                yield Outgoing(source, wanted.format, self)
            return
        packer = packing.Packer(self._here, self._operation, self._progress, self.check)
        left = max(1.0, self._deadline - time.monotonic())
        with packer.packed(disk, wanted.bandwidth, left) as made, made as source:
            # Its bytes are sent as they are.
            yield Outgoing(source, "raw", self)
