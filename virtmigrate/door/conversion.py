# SPDX-License-Identifier: Apache-2.0
"""Making a raw file of an image, by qemu-img.

qemu-img is told the format of both files, that there is no backing file, and that each
is a file: nothing that a header names is opened. What it may use has limits.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

from oslo_concurrency import processutils
from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.door import answer, confined, look
from virtmigrate.door.terms import Limits

LOG = logging.getLogger(__name__)

DRIVERS: dict[str, dict[str, object]] = {
    "qcow2": {"driver": "qcow2", "backing": None},
    "vmdk": {"driver": "vmdk", "backing": None},
    "vdi": {"driver": "vdi"},
    # Else QEMU takes the size from the geometry, depending on who wrote the file.
    "vhd": {"driver": "vpc", "force_size_calc": "current_size"},
    "vhdx": {"driver": "vhdx"},
}
"""What QEMU is told of each format."""


def convert(
    source: Path,
    fmt: str,
    target: Path,
    size: int,
    limits: Limits,
    check: Callable[[], object],
    progress: Callable[[int], object] = lambda written: None,
) -> None:
    """Write the disk that is in an image into a raw file of exactly size bytes.

    The image is looked at first, by inspect(), and the disk in it last: one that looks
    like an image with a header is refused, whoever might probe it later. What the
    target held is gone. Behind the image's disk it has zeros; where the disk has zeros
    it has holes. It is fsynced.

    Arguments:
        source: the image; nobody writes it meanwhile.
        fmt: its format; raw and iso need no conversion, and are refused.
        target: absolute; made if it is not there.
        size: in bytes, at least the image's virtual size.
        check: raises what ends the work, as Progress.check does; called some ten
            times a second.
        progress: is told how many bytes the target takes so far, as often.

    Raises ImageRefused; ImageNotConverted, and then the target's content means
    nothing; ConfigurationError when qemu-img is missing.
    """
    found = look.inspect(source, fmt, limits, check)
    if fmt not in DRIVERS or found.virtual_size > size:
        reason = (
            f"{found.virtual_size} bytes of {fmt} do not become {size} bytes of raw"
        )
        raise errors.ImageNotConverted(image=source, reason=reason)
    try:
        _empty(target, size)
        _run(source, fmt, target, size, limits, check, progress)
        _finish(target, size)
    except OSError as e:
        raise errors.ImageNotConverted(image=source, reason=str(e)) from e
    _check_inside(source, target, size, limits, check)


# Private

_FILES = 64
_STACK = 2 << 20
"""Bytes for each of QEMU's threads, of which there may be 64."""


def _empty(target: Path, size: int) -> None:
    """Make the target all zeros, as --target-is-zero says of it."""
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(handle, 0)
        os.ftruncate(handle, size)
    finally:
        os.close(handle)


def _run(
    source: Path,
    fmt: str,
    target: Path,
    size: int,
    limits: Limits,
    check: Callable[[], object],
    progress: Callable[[int], object],
) -> None:
    def look_up() -> None:
        progress(target.stat().st_blocks * 512)
        check()

    ended = confined.run(
        _command(source, fmt, target),
        limits=processutils.ProcessLimits(
            address_space=limits.memory,
            core_file_size=0,
            cpu_time=limits.convert_seconds,
            file_size=size,
            number_files=_FILES,
            stack_size=_STACK,
        ),
        seconds=limits.convert_seconds,
        check=look_up,
    )
    if ended.problem:
        told = answer.plain(ended.errors[-250:].decode("ascii", "replace").strip())
        reason = f"{ended.problem}: {told}" if told else ended.problem
        raise errors.ImageNotConverted(image=source, reason=reason)


def _command(source: Path, fmt: str, target: Path) -> list[str]:
    # Through the page cache, flushed at the end: O_DIRECT is not everywhere.
    caches = ["-t", "writeback", "-T", "writeback"]
    file = {"driver": "file", "filename": str(source.absolute())}
    image = "json:" + json.dumps({**DRIVERS[fmt], "file": file})
    # A comma in a value is written twice.
    name = str(target.absolute()).replace(",", ",,")
    return [
        confined.require("qemu-img"),
        *("convert", "-n", "--target-is-zero", *caches, "--target-image-opts"),
        image,
        f"driver=raw,file.driver=file,file.filename={name}",
    ]


def _check_inside(
    source: Path, target: Path, size: int, limits: Limits, check: Callable[[], object]
) -> None:
    as_raw = dataclasses.replace(limits, formats=("raw",), max_size=size)
    try:
        look.inspect(target, "raw", as_raw, check)
    except errors.ImageRefused as e:
        reason = f"of the disk in it: {e.reason}"
        raise errors.ImageRefused(image=source, reason=reason) from e


def _finish(target: Path, size: int) -> None:
    handle = os.open(target, os.O_RDWR | os.O_NOFOLLOW)
    try:
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)
