# SPDX-License-Identifier: Apache-2.0
"""Writing ranges of a volume at a host, in bounded streams.

The volume has its full size already, so data is uploaded at its offset: no
sparse flag is needed, whose holes cut what lies behind them. finish() is an
acknowledgement, which the next error may still take back: only reading proves.
"""

import contextlib
import types
from collections.abc import Callable
from typing import Protocol, Self

from virtmigrate import storagepool, wire

Acknowledge = Callable[[], object]
"""Called when a host took all that was written until then."""


class Writer(Protocol):
    """Writes data in the order of its offsets. Belongs to one thread.

    Leaving `with` finishes; after an error what was not acknowledged is anything.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None: ...

    def write(self, offset: int, data: bytes) -> None:
        """Write data at an offset that no earlier call went beyond."""

    def finish(self) -> None:
        """Have what was written acknowledged."""


class Target(Protocol):
    """A volume that is being filled. Safe to share between threads."""

    name: str
    size: int
    host: str
    """Name of the host that it is on."""

    def writer(self, until: int, acknowledge: Acknowledge) -> Writer:
        """Return a writer for one thread, of what lies before `until`."""


class VolumeTarget:
    """A volume of a host that is being filled. Safe to share between threads."""

    def __init__(self, pool: storagepool.Pool, name: str, size: int) -> None:
        self.pool = pool
        self.name = name
        self.size = size
        self.host = pool.host.name

    def writer(self, until: int, acknowledge: Acknowledge) -> "VolumeWriter":
        """Return a writer for one thread, of what lies before `until`."""
        return VolumeWriter(self, until, acknowledge)


class VolumeWriter:
    """Writes data in the order of its offsets; what is contiguous shares a stream.

    Belongs to one thread. Leaving `with` finishes the last stream, or aborts it
    after an error: what was not acknowledged is then anything.
    """

    def __init__(
        self, target: VolumeTarget, until: int, acknowledge: Acknowledge
    ) -> None:
        self._target = target
        self._until = until
        self._acknowledge = acknowledge
        self._open: contextlib.ExitStack | None = None
        self._next = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        elif self._open is not None:
            opened, self._open = self._open, None
            # Aborting waits for an answer, so the clock must run again.
            self._session.touch()
            wire.abort(self._stream)
            # The session makes libvirt's errors ours.
            opened.__exit__(kind, error, trace)

    def write(self, offset: int, data: bytes) -> None:
        """Write data at an offset that no earlier call went beyond."""
        if self._open is None or offset != self._next:
            self.finish()
            self._target.pool.patiently(lambda: self._start(offset))
        wire.send_all(self._session, self._stream, data)
        self._next = offset + len(data)
        # What takes long now is the source, not this host.
        self._session.rest()

    def finish(self) -> None:
        """Let the host acknowledge what was written."""
        if self._open is None:
            return
        with self._open:
            self._open = None
            self._session.touch()
            with wire.aborting(self._stream):
                self._stream.finish()
        self._acknowledge()

    # Private

    def _start(self, offset: int) -> None:
        name = self._target.name
        stack = contextlib.ExitStack()
        with stack:
            opened = self._target.pool.opened(name, f"uploading {name}")
            self._session, vol = stack.enter_context(opened)
            self._stream = self._session.conn.newStream(0)
            # The length is a promise to nobody: libvirtd takes fewer bytes.
            vol.upload(self._stream, offset, self._until - offset, 0)
            self._open = stack.pop_all()
        self._next = offset


class UnderWay:
    """What one thread wrote, and nobody acknowledged yet."""

    def __init__(self) -> None:
        self.part = 0
        """Bytes of the block that is being written."""
        self._blocks: list[int] = []
        self._whole = 0

    @property
    def lost(self) -> int:
        """The bytes that have to be sent again after an error."""
        return self._whole + self.part

    def done(self, index: int) -> None:
        """Say that all of a block was written."""
        self._blocks.append(index)
        self._whole += self.part
        self.part = 0

    def settle(self) -> list[int]:
        """Return the blocks that were written, and forget them."""
        blocks, self._blocks = self._blocks, []
        self._whole = 0
        return blocks
