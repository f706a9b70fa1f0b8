# SPDX-License-Identifier: Apache-2.0
"""The sockets that libvirt opened: found from outside, watched and cut.

libvirt does not tell the file descriptor of a connection. It is found as a
socket that appeared since a snapshot and leads to the peer that the URI names.
"""

import contextlib
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Without libvirt's event loop there is no libvirt keepalive; the kernel's finds
# a peer that vanished while nothing was asked of it. TCP_USER_TIMEOUT is left
# alone: it also ends a connection whose peer, busy flushing a stream to a slow
# disk, keeps its window closed.
KEEPALIVE = {
    socket.TCP_KEEPIDLE: 15,  # seconds
    socket.TCP_KEEPINTVL: 5,  # seconds
    socket.TCP_KEEPCNT: 4,
}

_SYN_SENT = "02"
_AT_ONCE = struct.pack("ii", 1, 0)
"""A struct linger: closing throws away what was not sent, and resets."""


@dataclass(frozen=True)
class TcpPeer:
    """A host and port, by all addresses that its name has."""

    addresses: frozenset[str]
    port: int

    def matches(self, sock: socket.socket) -> bool:
        """Tell whether a socket is connected to the peer."""
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        address, port = sock.getpeername()[:2]
        return port == self.port and address.partition("%")[0] in self.addresses

    def is_calling(self, sock: socket.socket) -> bool:
        """Tell whether a socket waits for the peer's port to answer."""
        inode = str(os.fstat(sock.fileno()).st_ino)
        return inode in _calling(self.port)


@dataclass(frozen=True)
class UnixPeer:
    """A libvirt daemon's socket on this host."""

    def matches(self, sock: socket.socket) -> bool:
        """Tell whether a socket is connected to a libvirt daemon."""
        # The path is the one that the daemon bound; mounts may show the socket
        # elsewhere, so only its last part says something.
        if sock.family != socket.AF_UNIX:
            return False
        return os.fsdecode(sock.getpeername()).endswith("-sock")

    def is_calling(self, sock: socket.socket) -> bool:
        """Tell whether a socket waits for the daemon to accept it: not seen."""
        return False


Peer = TcpPeer | UnixPeer
Snapshot = frozenset[tuple[int, int]]


def resolve(host: str, port: int) -> TcpPeer:
    """Return the peer of a name or an address. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    return TcpPeer(frozenset(addresses), port)


def snapshot() -> Snapshot:
    """Return file descriptor and inode of each socket of this process."""
    return frozenset(_open_sockets())


def opened_since(before: Snapshot, peer: Peer) -> list[socket.socket]:
    """Return duplicates of new sockets that are connected to the peer."""
    return _take(before, peer.matches)


def cut_since(before: Snapshot, peer: Peer) -> bool:
    """Cut new sockets to the peer, and those that still call it.

    Returns whether one of them was connected.
    """
    connected = opened_since(before, peer)
    for sock in connected + _take(before, peer.is_calling):
        with sock:
            cut(sock)
    return bool(connected)


def cut(sock: socket.socket) -> None:
    """End a socket for everybody who holds it; a blocked call then fails.

    When the last of them closes it, what the peer did not get is thrown away. Else
    the kernel would bring it when the network is back, and a libvirtd would do what
    was given up long ago, to a domain that has only its name in common with the one
    that was meant. Packets that wait below TCP, for an address to be found, may still
    arrive then: before anything that is said to that peer later.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    hang_up(sock)


def hang_up(sock: socket.socket) -> None:
    """End a socket for everybody who holds it; what was written still arrives."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def is_hung_up(sock: socket.socket) -> bool:
    """Tell whether the peer has closed, or the kernel given up."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel look after an idle TCP connection."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


# Private


def _open_sockets() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            kind, _, inode = str(entry.readlink()).partition(":")
            if kind == "socket":
                yield int(entry.name), int(inode[1:-1])


def _take(
    before: Snapshot, wanted: Callable[[socket.socket], bool]
) -> list[socket.socket]:
    taken = []
    for fd, inode in sorted(snapshot() - before):
        sock = _duplicate(fd, inode)
        if sock is None:
            continue
        if _is(wanted, sock):
            taken.append(sock)
        else:
            sock.close()
    return taken


def _is(wanted: Callable[[socket.socket], bool], sock: socket.socket) -> bool:
    try:
        return wanted(sock)
    except OSError:  # not connected
        return False


def _duplicate(fd: int, inode: int) -> socket.socket | None:
    """Return a socket of our own on fd, if fd still is what was seen."""
    try:
        copy = os.dup(fd)
    except OSError:
        return None
    status = os.fstat(copy)
    if stat.S_ISSOCK(status.st_mode) and status.st_ino == inode:
        return socket.socket(fileno=copy)
    os.close(copy)
    return None


def _calling(port: int) -> set[str]:
    """Return the inodes of TCP sockets whose connection to a port is not up yet."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _SYN_SENT and fields[2].endswith(f":{port:04X}"):
                    inodes.add(fields[9])
    return inodes
