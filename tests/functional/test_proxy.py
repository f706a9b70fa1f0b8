# SPDX-License-Identifier: Apache-2.0
"""The proxy that spoils connections: it does exactly what it was asked to."""

import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

import sandbox
from sandbox import SandboxError, process, proxy
from virtmigrate import errors, host
from virtmigrate.units import KiB, MiB

SECONDS = 10.0


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, unless the server is told not to answer."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        try:
            while data := self.request.recv(64 * KiB):
                server.got += len(data)
                server.data += data
                if server.answers:
                    self.request.sendall(data)
        except OSError:
            server.failed.set()
        server.ended.set()


class Server(socketserver.ThreadingTCPServer):
    """An echo server that remembers what it got."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.got = 0
        self.data = bytearray()
        self.answers = True
        self.failed = threading.Event()
        self.ended = threading.Event()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=[0.01])
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join(SECONDS)


@pytest.fixture
def spoiler(server: Server) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(("127.0.0.1", server.server_address[1])) as made:
        yield made


def connect(spoiler: proxy.Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", spoiler.port), SECONDS)


def receive(sock: socket.socket, length: int) -> bytes:
    """Return so many bytes, or fewer when it ends before."""
    data = bytearray()
    while len(data) < length and (more := sock.recv(length - len(data))):
        data += more
    return bytes(data)


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def test_bytes_pass_unchanged(server: Server, spoiler: proxy.Proxy) -> None:
    data = noise(4 * MiB)
    with connect(spoiler) as client:
        sender = threading.Thread(target=client.sendall, args=[data])
        sender.start()
        assert receive(client, len(data)) == data
        sender.join(SECONDS)
        assert spoiler.connections == 1
    assert spoiler.to_host.count == spoiler.from_host.count == len(data)
    assert spoiler.accepted == 1


def test_one_side_may_end_first(server: Server, spoiler: proxy.Proxy) -> None:
    with connect(spoiler) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert receive(client, 100) == b"last words"
    process.wait_until(lambda: not spoiler.connections, SECONDS, "the end")
    assert server.ended.wait(SECONDS)
    assert not server.failed.is_set()


def test_dropped_by_reset(server: Server, spoiler: proxy.Proxy) -> None:
    with connect(spoiler) as client, connect(spoiler) as other:
        for each in (client, other):
            each.sendall(b"x")
            assert receive(each, 1) == b"x"
        spoiler.drop()
        assert spoiler.connections == 0
        for each in (client, other):
            with pytest.raises(ConnectionResetError):
                each.recv(1)
    assert server.failed.wait(SECONDS)
    with connect(spoiler) as client:
        client.sendall(b"again")
        assert receive(client, 5) == b"again"


def test_dropped_in_order(server: Server, spoiler: proxy.Proxy) -> None:
    with connect(spoiler) as client:
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        spoiler.drop(reset=False)
        assert client.recv(1) == b""
    assert server.ended.wait(SECONDS)
    assert not server.failed.is_set()


def test_refused_and_accepted_again(spoiler: proxy.Proxy) -> None:
    with connect(spoiler) as client:
        client.sendall(b"a")
        assert receive(client, 1) == b"a"
        spoiler.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(spoiler)
        client.sendall(b"b")
        assert receive(client, 1) == b"b"
    spoiler.accept()
    with connect(spoiler) as client:
        client.sendall(b"c")
        assert receive(client, 1) == b"c"


def test_delayed(spoiler: proxy.Proxy) -> None:
    spoiler.to_host.delay = 0.1
    spoiler.from_host.delay = 0.2
    with connect(spoiler) as client:
        began = time.monotonic()
        client.sendall(b"x")
        assert receive(client, 1) == b"x"
        assert 0.3 <= time.monotonic() - began < 3


def test_stalled_and_released(server: Server, spoiler: proxy.Proxy) -> None:
    spoiler.to_host.stall()
    with connect(spoiler) as client:
        client.sendall(b"late")
        client.shutdown(socket.SHUT_WR)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert (server.got, spoiler.to_host.count) == (0, 0)
        client.settimeout(SECONDS)
        spoiler.to_host.release()
        assert receive(client, 100) == b"late"


def test_holds_little_while_stalled(server: Server, spoiler: proxy.Proxy) -> None:
    spoiler.to_host.stall()
    with connect(spoiler) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 * KiB)
        client.settimeout(0.3)
        taken = 0
        with pytest.raises(TimeoutError):
            while taken < 64 * MiB:
                taken += client.send(bytes(64 * KiB))
        assert taken < 4 * MiB


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "in-order"])
@pytest.mark.parametrize("count", [1, 100_000, 3 * MiB + 17])
def test_cut_to_the_host(
    server: Server, spoiler: proxy.Proxy, count: int, reset: bool
) -> None:
    server.answers = False
    spoiler.to_host.cut_after(count, reset=reset)
    with connect(spoiler) as client, pytest.raises(OSError, match=r"reset|pipe"):
        while True:
            client.sendall(bytes(100_000))
    assert server.ended.wait(SECONDS)
    assert server.got == count == spoiler.to_host.count
    assert server.failed.is_set() == reset
    assert spoiler.to_host.cuts == 1
    with connect(spoiler) as client:
        client.sendall(b"once only")
    spoiler.to_host.wait(count + 9, SECONDS)


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "in-order"])
def test_cut_from_the_host(server: Server, spoiler: proxy.Proxy, reset: bool) -> None:
    spoiler.from_host.cut_after(1000, reset=reset)
    data = noise(5000)
    with connect(spoiler) as client:
        client.sendall(data)
        assert receive(client, 1000) == data[:1000]
        if reset:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        else:
            assert client.recv(1) == b""


def test_cut_counts_all_connections(server: Server, spoiler: proxy.Proxy) -> None:
    with connect(spoiler) as one, connect(spoiler) as other:
        one.sendall(b"before")
        assert receive(one, 6) == b"before"
        spoiler.to_host.cut_after(30)
        for each in (one, other):
            each.sendall(b"0123456789")
            assert receive(each, 10) == b"0123456789"
        one.sendall(b"the last ten, and more")
        for each in (one, other):
            with pytest.raises(ConnectionResetError):
                receive(each, 1000)
    process.wait_until(lambda: server.got >= 36, SECONDS, "the last bytes")
    assert server.got == 36


@pytest.mark.parametrize("offset", [0, 77, MiB + 12345])
def test_flipped_bit(server: Server, spoiler: proxy.Proxy, offset: int) -> None:
    with connect(spoiler) as client:
        client.sendall(b"before")
        assert receive(client, 6) == b"before"
        spoiler.to_host.flip_bit(offset, bit=5)
        data = noise(2 * MiB)
        sender = threading.Thread(target=client.sendall, args=[data])
        sender.start()
        answer = receive(client, len(data))
        sender.join(SECONDS)
    wanted = bytearray(data)
    wanted[offset] ^= 32
    assert answer == wanted
    assert (spoiler.to_host.flipped, spoiler.from_host.flipped) == (1, 0)


def test_slow(server: Server, spoiler: proxy.Proxy) -> None:
    server.answers = False
    spoiler.to_host.rate = 4 * MiB
    began = time.monotonic()
    with connect(spoiler) as client:
        client.sendall(bytes(2 * MiB))
    spoiler.to_host.wait(2 * MiB, SECONDS)
    assert time.monotonic() - began == pytest.approx(0.5, rel=0.2)


def test_waiting_has_an_end(spoiler: proxy.Proxy) -> None:
    with pytest.raises(SandboxError, match="0 of 1 bytes"):
        spoiler.to_host.wait(1, 0.05)


def test_nobody_behind() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with (
            proxy.Proxy(reserved.getsockname()) as spoiler,
            pytest.raises(ConnectionResetError),
            connect(spoiler) as client,
        ):
            client.recv(1)


def sockets() -> set[str]:
    """The sockets and loops of this process."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except OSError:
            continue
    return {name for name in found if name.startswith(("socket:", "anon_inode:"))}


def test_nothing_is_left(server: Server) -> None:
    before, threads = sockets(), threading.active_count()
    with proxy.Proxy(("127.0.0.1", server.server_address[1])) as spoiler:
        spoiler.from_host.stall()
        clients = [connect(spoiler) for _ in range(3)]
        for client in clients:
            client.sendall(b"x")
        spoiler.to_host.wait(3, SECONDS)
    for client in clients:
        client.close()
    assert server.ended.wait(SECONDS)
    process.wait_until(
        lambda: threading.active_count() <= threads and sockets() <= before,
        SECONDS,
        "the end of all sockets",
    )
    spoiler.stop()


# Before a libvirtd


@pytest.fixture(scope="module")
def beta(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("prx-beta", tcp=True)
    box.remove_host("prx-beta")


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("prx-alpha")
    box.remove_host("prx-alpha")


def test_tls_with_the_host_s_own_certificate(beta: sandbox.Host) -> None:
    with proxy.before(beta) as spoiler:
        conn = libvirt.open(spoiler.through(beta.uri))
        try:
            assert conn.isEncrypted()
            assert conn.getHostname() == "prx-beta"
            assert spoiler.to_host.count > 1000
            assert spoiler.from_host.count > 1000
            spoiler.drop()
            with pytest.raises(libvirt.libvirtError):
                conn.getHostname()
        finally:
            conn.close()
        spoiler.refuse()
        with pytest.raises(libvirt.libvirtError, match="refused"):
            libvirt.open(spoiler.through(beta.uri))
        spoiler.accept()
        libvirt.open(spoiler.through(beta.uri)).close()


def test_another_host_reaches_it(alpha: sandbox.Host, beta: sandbox.Host) -> None:
    with proxy.before(beta) as spoiler:
        uri = spoiler.through("qemu+tls://prx-beta/system")
        done = alpha.run(["virsh", "-q", "-c", uri, "hostname"])
        assert done.stdout.strip() == "prx-beta"
        assert spoiler.accepted == 1


def test_tls_finds_a_flipped_bit(beta: sandbox.Host) -> None:
    with proxy.before(beta) as spoiler:
        conn = libvirt.open(spoiler.through(beta.uri))
        try:
            spoiler.from_host.flip_bit(40)
            with pytest.raises(libvirt.libvirtError):
                conn.getCapabilities()
            assert spoiler.from_host.flipped == 1
        finally:
            conn.close()


def test_plain_tcp_does_not(beta: sandbox.Host) -> None:
    with proxy.before(beta, transport="tcp") as spoiler:
        conn = libvirt.open(spoiler.through(beta.tcp_uri))
        try:
            # Length, program, version, procedure, type, serial, status, length.
            spoiler.from_host.flip_bit(32)
            assert conn.getHostname() == "qrx-beta"
        finally:
            conn.close()


def test_our_host_through_it(beta: sandbox.Host) -> None:
    with (
        proxy.before(beta) as spoiler,
        host.Host(
            spoiler.through(beta.uri), timeouts=host.Timeouts(call=1.0)
        ) as opened,
    ):
        with opened.session("asking") as session:
            assert session.conn.getHostname() == "prx-beta"
        spoiler.from_host.stall()
        with (
            pytest.raises(errors.HostTimeout),
            opened.session("asking") as session,
        ):
            session.conn.getHostname()
        spoiler.from_host.release()
        with opened.session("asking") as session:
            assert session.conn.getHostname() == "prx-beta"


def test_back_after_the_host_s_restart(beta: sandbox.Host) -> None:
    with proxy.before(beta) as spoiler:
        beta.stop()
        beta.start()
        spoiler.refuse()
        spoiler.accept()
        libvirt.open(spoiler.through(beta.uri)).close()
