# SPDX-License-Identifier: Apache-2.0
"""Bytes from one pool of this host to another, where no file can be renamed.

The target is a fresh volume, all zeros: only what is not zeros is written. What
was written is not proven here; who asked for it reads it back.
"""

from collections.abc import Callable

import libvirt

from virtmigrate import errors, manifest, storagepool, wire
from virtmigrate.units import MiB

_WINDOW = 16 * MiB
"""Bytes that are kept in memory, and in one stream."""


def copy(
    source: storagepool.Pool,
    name: str,
    target: storagepool.Pool,
    target_name: str,
    length: int,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Copy the first `length` bytes of a volume into a fresh one.

    Raises ShortTransfer when the source is shorter, Cancelled when `stop`, asked
    before each window, says so. The target is then partial.
    """
    position = 0
    while position < length:
        if stop():
            raise errors.Cancelled
        position, data = _fetch(source, name, position, length)
        start = position - len(data)
        if not manifest.is_zero(data):
            target.write(target_name, data, offset=start)


# Private


def _fetch(
    pool: storagepool.Pool, name: str, start: int, end: int
) -> tuple[int, bytes]:
    """Pass over a hole; return where what follows it ends, and its bytes."""
    position, data = start, bytearray()
    with pool.opened(name, f"reading {name}") as (session, vol):
        stream = session.conn.newStream(0)
        flags = libvirt.VIR_STORAGE_VOL_DOWNLOAD_SPARSE_STREAM
        vol.download(stream, start, end - start, flags)
        with wire.aborting(stream):
            while position < end and len(data) < _WINDOW:
                piece, hole = wire.receive(stream, _WINDOW - len(data))
                session.touch()
                if hole and data:
                    break
                if not piece and not hole:
                    raise errors.ShortTransfer(
                        volume=name,
                        host=pool.host.name,
                        reason=f"it ends at {position} instead of {end}",
                    )
                data += piece
                position += len(piece) + min(hole, end - position)
            wire.abort(stream)
    return position, bytes(data)
