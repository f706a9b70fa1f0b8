# SPDX-License-Identifier: Apache-2.0
"""Streams of libvirt: bytes in messages of its protocol, under a session's clock.

What finish() says of an upload is not proof: libvirt forgets an error that hits
while the last messages are flushed (virfdstream.c). Nothing is fsynced.
"""

import contextlib
from collections.abc import Iterator

import libvirt
from oslo_log import log as logging

from virtmigrate.host import Session

LOG = logging.getLogger(__name__)

CHUNK = 262_120
"""What one message of libvirt's protocol carries; the fastest size to send."""

_HOLE = -3
"""What recvFlags returns at a hole (virStreamRecvFlags)."""


class StreamFailed(libvirt.libvirtError):  # type: ignore[misc]
    """A stream did not do what it should; a session translates it as any failure."""

    def __init__(self, reason: str) -> None:
        # libvirt's own would take the last error of this thread, an older one.
        Exception.__init__(self, reason)
        code, domain = libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_FROM_STREAMS
        level = libvirt.VIR_ERR_ERROR
        self.err = (code, domain, reason, level, None, None, None, -1, -1)


def send_all(session: Session, stream: "libvirt.virStream", data: bytes) -> None:
    """Send all of data, in pieces of the protocol's best size."""
    view = memoryview(data)
    while view:
        session.touch()
        sent = stream.send(bytes(view[:CHUNK]))
        if sent <= 0:
            raise StreamFailed(f"the stream took {sent} bytes")
        view = view[sent:]
    session.touch()


def receive(stream: "libvirt.virStream", wanted: int) -> tuple[bytes, int]:
    """Return data of a sparse download, or the length of the hole that comes next.

    Neither: the volume ends here.
    """
    flags = libvirt.VIR_STREAM_RECV_STOP_AT_HOLE
    data = stream.recvFlags(min(wanted, CHUNK), flags)
    if data == _HOLE:
        return b"", stream.recvHole(0)
    if isinstance(data, int):
        raise StreamFailed(f"the stream gave {data} instead of bytes")
    return data, 0


def download(session: Session, vol: "libvirt.virStorageVol", size: int) -> bytes:
    """Return a small volume's first bytes, fewer when it is shorter."""
    stream = session.conn.newStream(0)
    vol.download(stream, 0, size, 0)
    data = bytearray()
    with aborting(stream):
        while len(data) < size:
            piece = stream.recv(min(CHUNK, size - len(data)))
            if isinstance(piece, int):
                raise StreamFailed(f"the stream gave {piece} instead of bytes")
            if not piece:
                break
            data += piece
            session.touch()
        stream.finish()
    return bytes(data)


def upload(
    session: Session, vol: "libvirt.virStorageVol", data: bytes, offset: int
) -> None:
    """Write a few bytes into a volume."""
    stream = session.conn.newStream(0)
    vol.upload(stream, offset, len(data), 0)
    with aborting(stream):
        send_all(session, stream, data)
        stream.finish()


@contextlib.contextmanager
def aborting(stream: "libvirt.virStream") -> Iterator[None]:
    """Abort the stream when its work fails."""
    try:
        yield
    except BaseException:
        abort(stream)
        raise


def abort(stream: "libvirt.virStream") -> None:
    """Abort a stream in clean-up: the first error is the one that counts."""
    try:
        stream.abort()
    except libvirt.libvirtError as e:
        LOG.debug("aborting a stream: %s", e)
