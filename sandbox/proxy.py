# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy between two hosts, which spoils their connections when asked.

`before(host)` listens on the host's own address, on a port of its own, and
forwards to the host's libvirtd:

    with proxy.before(beta) as spoiler:
        conn = libvirt.open(spoiler.through(beta.uri))
        spoiler.to_host.cut_after(5 * MiB)

So the URI names the host as ever and its certificate is the right one: nothing of
it is disabled or added. It works because a socket belongs to the network namespace
in which it was made: a thread enters the host's namespace, makes the listening
socket and ends. All other hosts reach it, too.

With plain TCP (`add_host(name, tcp=True)`, `before(host, transport="tcp")` and
`through(host.tcp_uri)`) a flipped bit arrives; TLS finds it and ends the connection.

What the proxy cannot do: it has accepted a connection before it knows whether the
host does; if that fails, the connection is reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import termios
import threading
import types
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from sandbox import errors, faults, host

PORTS = {"tls": 16514, "tcp": 16509}
BUFFER = 256 * 1024
"""Bytes that the kernel is asked to hold per socket and direction; it takes more."""

CONNECT_TIMEOUT = 10.0
FLUSH_TIMEOUT = 1.0

_CLONE_NEWNET = 0x40000000

Opener = Callable[[int], socket.socket]
"""Returns a listening socket on a port; 0 is any."""


class Proxy:
    """Forwards connections while its `with` block lasts.

    Safe to share between threads. One thread of its own does the work; at most one
    chunk per connection and direction is in memory.

    Arguments:
      forward: name or address, and port, of what stands behind.
      opener: makes the listening socket; without it, on 127.0.0.1.
    """

    def __init__(self, forward: tuple[str, int], opener: Opener | None = None) -> None:
        self.port = 0
        """Where it listens."""
        self.accepted = 0
        """Connections so far."""
        self._forward = forward
        self._opener = opener or listening_on("127.0.0.1")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="proxy", daemon=True
        )
        self.to_host = faults.Direction(self._loop)
        self.from_host = faults.Direction(self._loop)
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._listening: asyncio.Task[None] | None = None

    def __enter__(self) -> Proxy:
        self._thread.start()
        try:
            self.accept()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.stop()

    def through(self, uri: str) -> str:
        """Return a URI with the proxy's port."""
        parts = urllib.parse.urlsplit(uri)
        return parts._replace(netloc=f"{parts.hostname}:{self.port}").geturl()

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    def accept(self) -> None:
        """Take new connections, as at the beginning."""
        faults.call(self._loop, self._accept())

    def refuse(self) -> None:
        """Refuse new connections; those that are there stay."""
        faults.call(self._loop, self._refuse())

    def drop(self, *, reset: bool = True) -> None:
        """End all connections now; bytes that are on their way are lost.

        Arguments:
          reset: by RST; else in an orderly way.
        """
        faults.call(self._loop, self._drop(reset))

    def stop(self) -> None:
        """End everything; can be called again."""
        if self._loop.is_closed():
            return
        try:
            faults.call(self._loop, self._refuse())
            faults.call(self._loop, self._drop(True))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(faults.CALL_TIMEOUT)
            self._loop.close()

    # Private

    async def _accept(self) -> None:
        if self._listening is None:
            listener = self._opener(self.port)
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            self._listening = asyncio.create_task(self._listen(listener))

    async def _refuse(self) -> None:
        if self._listening is not None:
            ended, self._listening = self._listening, None
            await _end([ended])

    async def _listen(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                self.accepted += 1
                made = _Connection(self, client)
                self._connections[made] = asyncio.create_task(self._serve(made))

    async def _serve(self, connection: _Connection) -> None:
        try:
            await connection.run(self._forward)
        finally:
            self._connections.pop(connection, None)

    async def _drop(self, reset: bool) -> None:
        for connection in self._connections:
            connection.reset = reset
        await _end(list(self._connections.values()))

    def cut(self, direction: faults.Direction) -> None:
        """End all connections because one direction came to its cut."""
        direction.cut_done()
        for connection, task in self._connections.items():
            connection.reset = direction.resets
            task.cancel()


def before(host: host.Host, *, transport: str = "tls") -> Proxy:
    """Return a proxy that listens on a host's own address.

    After the host was stopped and started again it listens no more; refuse() and
    accept() bring it back.

    Arguments:
      transport: tls, or tcp where the host has that.
    """

    def opener(port: int) -> socket.socket:
        return _in_namespace(host.pid, listening_on(host.address), port)

    return Proxy((host.address, PORTS[transport]), opener)


def listening_on(address: str) -> Opener:
    """Return what makes listening sockets on an address of this namespace."""

    def opener(port: int) -> socket.socket:
        made = socket.socket()
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it; later the window could not shrink.
            _bound_buffers(made)
            made.bind((address, port))
            made.listen(64)
        except BaseException:
            made.close()
            raise
        return made

    return opener


# Private


class _Connection:
    """One connection of a client, and ours to the host for it."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.reset = False
        self._proxy = proxy
        self._client = client
        self._host = socket.socket()

    async def run(self, forward: tuple[str, int]) -> None:
        """Forward until both sides are done, or one fails; then nothing is open."""
        try:
            await self._connect(forward)
            await self._pump_both()
        except (OSError, TimeoutError):
            self.reset = True
        finally:
            for sock in (self._client, self._host):
                _close(sock, reset=self.reset)

    # Private

    async def _connect(self, forward: tuple[str, int]) -> None:
        for sock in (self._client, self._host):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _bound_buffers(self._host)
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.sock_connect(self._host, forward), CONNECT_TIMEOUT)

    async def _pump_both(self) -> None:
        ways = (
            self._pump(self._client, self._host, self._proxy.to_host),
            self._pump(self._host, self._client, self._proxy.from_host),
        )
        pumps = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.gather(*pumps)
        finally:
            await _end(pumps)

    async def _pump(
        self, source: socket.socket, sink: socket.socket, direction: faults.Direction
    ) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, faults.CHUNK):
            await direction.hold(len(data))
            data, ends = direction.spoil(data)
            await loop.sock_sendall(sink, data)
            if ends:
                await _flush(sink)
                self._proxy.cut(direction)
                return
            # Where both sides are fast, nothing above lets others have a turn.
            await asyncio.sleep(0)
        await direction.hold(0)
        sink.shutdown(socket.SHUT_WR)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _flush(sock: socket.socket) -> None:
    """Wait until the other side has all bytes: a reset would throw them away."""
    loop = asyncio.get_running_loop()
    end = loop.time() + FLUSH_TIMEOUT
    while loop.time() < end:
        answer = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
        if struct.unpack("i", answer) == (0,):
            return
        # The kernel has no event for this.
        await asyncio.sleep(0.001)


def _close(sock: socket.socket, *, reset: bool) -> None:
    with contextlib.suppress(OSError):
        if reset:
            off = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off)
        else:
            # Bytes that nobody read would turn an orderly end into a reset.
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(faults.CHUNK):
                pass
    sock.close()


def _bound_buffers(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)


def _in_namespace(pid: int, opener: Opener, port: int) -> socket.socket:
    """Call opener in the network namespace of a process."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def work() -> None:
        # The thread is not needed afterwards, so it need not come back.
        try:
            _enter_network(pid)
            made.append(opener(port))
        except OSError as e:
            failed.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise errors.SandboxError(f"cannot listen beside process {pid}: {failed[0]}")
    return made[0]


def _enter_network(pid: int) -> None:
    with Path(f"/proc/{pid}/ns/net").open("rb") as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
