# SPDX-License-Identifier: Apache-2.0
"""What arrives of what was written to a socket that ends."""

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from virtmigrate import sockets


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection: a client's and its server's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), timeout=10)
        accepted, _ = server.accept()
        accepted.settimeout(10)
        with client, accepted:
            yield client, accepted


def ended(
    ends: tuple[socket.socket, socket.socket], end: Callable[[socket.socket], None]
) -> tuple[int, int]:
    """End a client whose server does not read; return bytes written, and read then."""
    client, server = ends
    written = fill(client)
    held = client.dup()
    end(held)
    client.close()
    held.close()
    return written, drain(server)


def fill(sock: socket.socket) -> int:
    """Write until the kernel takes no more; return how much that was."""
    sock.setblocking(False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += sock.send(bytes(65536))
    return written


def drain(sock: socket.socket) -> int:
    """Read to the end, or to the reset; return how much that was."""
    found = 0
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            found += len(chunk)
    return found


def test_what_was_not_sent_is_never_sent_after_a_cut(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    written, found = ended(ends, sockets.cut)
    assert found < written


def test_all_arrives_after_hanging_up(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    written, found = ended(ends, sockets.hang_up)
    assert found == written


def test_cut_wakes_who_waits(ends: tuple[socket.socket, socket.socket]) -> None:
    client, _ = ends
    sockets.cut(client)
    assert client.recv(1) == b""
    assert sockets.is_hung_up(client)
