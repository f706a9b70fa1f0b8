# SPDX-License-Identifier: Apache-2.0
"""A compressed qcow2 image of a disk that stands still, by qemu-img.

Where its clusters end is known when the last one was compressed, so that it has to be a
file before it is sent: it is staged. qemu-img is told all files and formats, and is
held to limits as whatever reads images is. What a guest sees of the image is compared
with what it saw of the disk, before anybody gets it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from oslo_concurrency import processutils

from virtmigrate import (
    domainxml,
    door,
    errors,
    guestview,
    nbdserver,
    node,
    reading,
    staging,
)
from virtmigrate.door import confined
from virtmigrate.formats import DiskFormat
from virtmigrate.livesnapshot.frozen import Still
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

_FILES = 64
"""That it may open beside the layers."""
_STACK = 2 * MiB
_CORES = 8
"""Processors that it may be busy on all the time."""


class Packer:
    """Compresses disks of one host. Belongs to one operation.

    Arguments:
        operation: what the directory in staging is called; a sweep knows it by that.
        check: raises what ends the work.
    """

    def __init__(
        self,
        here: node.Node,
        operation: str,
        progress: Progress,
        check: Callable[[], object],
    ) -> None:
        self._here = here
        self._operation = operation
        self._progress = progress
        self._check = check

    @contextlib.contextmanager
    def packed(
        self, disk: Still, bandwidth: int, seconds: float
    ) -> Iterator[reading.Source]:
        """Yield the file of an image, which goes in the end.

        Arguments:
            bandwidth: bytes per second to read with; 0: no limit.
            seconds: that it may take.

        Raises as demand_files(); ImageNotConverted, VerificationFailed.
        """
        layers = demand_files(disk)
        with staging.opened(self._here, self._operation) as place:
            path = place / "image"
            self._progress.phase(f"compressing {disk.target}")
            self._run(layers, disk, path, bandwidth, seconds)
            self._progress.phase(f"proving {disk.target}", 2 * disk.source.size)
            self._prove(disk, path)
            yield reading.FileSource(path, path.stat().st_size)

    # Private

    def _run(
        self,
        layers: tuple[domainxml.Layer, ...],
        disk: Still,
        path: Path,
        bandwidth: int,
        seconds: float,
    ) -> None:
        limits = door.Limits.configured(self._here.conf)
        ended = confined.run(
            _command(layers, path, bandwidth),
            limits=processutils.ProcessLimits(
                address_space=limits.memory,
                core_file_size=0,
                cpu_time=int(seconds) * _CORES + 1,
                # What cannot be made smaller is kept as it is, with its tables.
                file_size=disk.source.size + disk.source.size // 64 + 16 * MiB,
                number_files=_FILES + len(layers),
                stack_size=_STACK,
            ),
            seconds=seconds,
            check=self._check,
        )
        if ended.problem:
            said = ended.errors[-250:].decode("ascii", "replace").strip()
            raise errors.ImageNotConverted(
                image=disk.source.name, reason=f"{ended.problem}: {said}"
            )

    def _prove(self, disk: Still, path: Path) -> None:
        layer = domainxml.Layer(
            type=domainxml.SourceType.FILE, source=str(path), fmt=DiskFormat.QCOW2
        )
        made = guestview.GuestView((layer,), disk.source.size)
        with self._here.mover(self._progress) as mover:
            expected = mover.survey(disk.source).root()
            found = mover.survey(made).root()
        if found != expected:
            raise errors.VerificationFailed(
                volume=disk.source.name,
                host=self._here.name,
                found=found,
                expected=expected,
            )


def demand_files(disk: Still) -> tuple[domainxml.Layer, ...]:
    """Return the files that a disk is.

    Raises Unsupported if it is something else, SourceUnreadable for what says that its
    data lies in yet another file.
    """
    types = {layer.type for layer in disk.layers}
    if types != {domainxml.SourceType.FILE}:
        raise errors.Unsupported(
            backend="of this disk",
            operation=f"compress {disk.target}",
            reason="qemu-img reads files here: save it without compression",
        )
    if reason := guestview.obstacle(disk.layers, disk.source.size):
        raise errors.SourceUnreadable(volume=disk.source.name, reason=reason)
    return disk.layers


# Private


def _command(
    layers: tuple[domainxml.Layer, ...], path: Path, bandwidth: int
) -> list[str]:
    limit = ["-r", str(bandwidth)] if bandwidth else []
    return [
        confined.require("qemu-img"),
        *("convert", "-c", "-O", "qcow2", "-t", "writeback", *limit),
        f"json:{json.dumps(nbdserver.described(layers))}",
        str(path),
    ]
