# SPDX-License-Identifier: Apache-2.0
"""Hosts without a daemon: libvirt's test driver, and peers that say nothing."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
import trustme

from virtmigrate import address, errors, host

TEST_URI = "test:///default"
QUICK = host.Timeouts(connect=0.4, call=0.4)


@pytest.fixture
def local() -> Iterator[host.Host]:
    with host.Host(TEST_URI) as opened:
        yield opened


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A peer that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def uri(server: socket.socket, transport: str) -> str:
    address, port = server.getsockname()[:2]
    return f"qemu+{transport}://{address}:{port}/system"


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def pki(authority: trustme.CA, tmp_path: Path) -> Path:
    """A client's pkipath directory."""
    pair = authority.issue_cert("client.example", common_name="client.example")
    authority.cert_pem.write_to_path(tmp_path / "cacert.pem")
    pair.private_key_pem.write_to_path(tmp_path / "clientkey.pem")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "clientcert.pem")
    return tmp_path


# URIs

REFUSED = [
    "qemu+ssh://root@alpha/system",
    "qemu+libssh://alpha/system",
    "qemu+libssh2://alpha/system",
    "qemu+ext:///system?command=/bin/x",
    "qemu+SSH://alpha/system",
    "qemu+nonsense://alpha/system",
]


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("allow", [False, True], ids=["strict", "insecure"])
def test_transport_refused(refused: str, allow: bool) -> None:
    with pytest.raises(errors.InsecureConnection, match="SSH"):
        host.Host(refused, allow_insecure=allow)


def test_no_verify_refused() -> None:
    without = "qemu+tls://alpha/system?no_verify=1"
    with pytest.raises(errors.InsecureConnection, match="no_verify"):
        host.Host(without)
    host.Host(without, allow_insecure=True)


@pytest.mark.parametrize(
    "wrong", ["", "alpha", "qemu+tls://alpha:port/system"], ids=repr
)
def test_no_uri(wrong: str) -> None:
    """What has no scheme would be an alias of libvirt.conf: maybe SSH."""
    with pytest.raises(errors.ConfigurationError):
        host.Host(wrong)


READ = [
    ("qemu:///system", "", "local", 0),
    ("qemu+unix:///system?socket=/run/x-sock", "unix", "local", 0),
    ("qemu://alpha/system", "tls", "alpha", 16514),
    ("qemu+tls://alpha:1234/session", "tls", "alpha", 1234),
    ("qemu+tcp://[fd00::1]/system", "tcp", "fd00::1", 16509),
]


@pytest.mark.parametrize(("text", "transport", "name", "port"), READ)
def test_address(text: str, transport: str, name: str, port: int) -> None:
    found = address.parse(text)
    assert (found.transport, found.name, found.port) == (transport, name, port)


def test_name() -> None:
    assert host.Host("qemu+tls://alpha/system").name == "alpha"
    assert host.Host("qemu+tls://alpha/system", name="a").name == "a"
    assert host.Host("qemu:///system").name == "local"


# Sessions


def test_session_gives_connection(local: host.Host) -> None:
    with local.session("asking its name") as session:
        assert session.conn.getURI() == TEST_URI


def test_session_translates(local: host.Host) -> None:
    with (
        pytest.raises(errors.InstanceNotFound, match="vm is not on") as caught,
        local.session("looking", instance="vm") as session,
    ):
        session.conn.lookupByName("no-such")
    assert isinstance(caught.value.__cause__, libvirt.libvirtError)


def test_session_context_fills_names(local: host.Host) -> None:
    with (
        pytest.raises(errors.VolumeNotFound, match="pool default-pool has no volume v"),
        local.session("looking", pool="default-pool", volume="v") as session,
    ):
        pool = session.conn.storagePoolLookupByName("default-pool")
        pool.storageVolLookupByName("w")


def test_session_leaves_other_errors(local: host.Host) -> None:
    with pytest.raises(ZeroDivisionError), local.session("dividing"):
        _ = 1 / 0
    with local.session("asking") as session:
        assert session.conn.isAlive()


def test_block_may_catch(local: host.Host) -> None:
    with (
        local.session("looking") as session,
        contextlib.suppress(libvirt.libvirtError),
    ):
        session.conn.lookupByName("no-such")


def test_sessions_share_threads_connection(local: host.Host) -> None:
    with local.session("first") as first, local.session("second") as second:
        assert first.conn is second.conn
    with local.session("third") as third:
        assert third.conn is first.conn


def test_inner_session_stops_outer_clock(local: host.Host) -> None:
    with local.session("outer", timeout=0.3) as outer:
        with local.session("inner", timeout=5):
            time.sleep(0.5)
        time.sleep(0.1)
        assert not outer.alarm.fired


def test_inner_session_has_own_deadline(local: host.Host) -> None:
    with local.session("outer", timeout=5), local.session("inner", timeout=0.1) as one:
        time.sleep(0.3)
        assert one.alarm.fired
    with local.session("next") as session:
        assert session.conn is not one.conn


def test_touch_moves_deadline(local: host.Host) -> None:
    with local.session("streaming", timeout=0.3) as session:
        for _ in range(5):
            time.sleep(0.1)
            session.touch()
        assert not session.alarm.fired


# Threads and processes


def connection_of_thread(of: host.Host) -> libvirt.virConnect:
    found: list[libvirt.virConnect] = []

    def work() -> None:
        with of.session("asking") as session:
            found.append(session.conn)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_connection_per_thread(local: host.Host) -> None:
    with local.session("asking") as session:
        assert connection_of_thread(local) is not session.conn


def test_connections_of_ended_threads_are_closed(local: host.Host) -> None:
    ended = connection_of_thread(local)
    connection_of_thread(local)
    assert ended._o is None
    assert len(local._opened) == 1


def test_close_twice(local: host.Host) -> None:
    with local.session("asking") as session:
        conn = session.conn
    local.close()
    local.close()
    assert conn._o is None


def test_session_after_close(local: host.Host) -> None:
    local.close()
    with local.session("asking") as session:
        assert session.conn.isAlive()


def test_close_during_session(local: host.Host) -> None:
    with local.session("asking") as session:
        local.close()
        assert session.conn._o is not None
    assert session.conn._o is None


def test_close_with_objects_left(local: host.Host) -> None:
    with local.session("asking") as session:
        pool = session.conn.storagePoolLookupByName("default-pool")
    local.close()
    del pool


def test_fork_leaves_parents_connection(local: host.Host) -> None:
    with local.session("asking") as session:
        before = session.conn
    pid = os.fork()
    if pid == 0:
        with local.session("asking") as session:
            os._exit(0 if session.conn is not before and before._o is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    with local.session("asking") as session:
        assert session.conn is before


# Peers that don't answer


@pytest.mark.parametrize("transport", ["tls", "tcp"])
def test_open_silent_peer(silent: socket.socket, transport: str, pki: Path) -> None:
    began = time.monotonic()
    opened = host.Host(f"{uri(silent, transport)}?pkipath={pki}", timeouts=QUICK)
    with pytest.raises(errors.HostTimeout, match="connecting"), opened.session("x"):
        pass
    assert time.monotonic() - began < 2


def test_open_silent_peer_from_two_threads(silent: socket.socket) -> None:
    """The second waits for its turn no longer than for a connection."""
    opened = host.Host(uri(silent, "tcp"), timeouts=QUICK)
    failures: list[errors.Error] = []

    def work() -> None:
        with pytest.raises(errors.HostError) as caught, opened.session("x"):
            pass
        failures.append(caught.value)

    threads = [threading.Thread(target=work) for _ in range(2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 2
    assert time.monotonic() - began < 2


def test_open_peer_that_accepts_nothing() -> None:
    """A full queue of connections is as good as a host that is switched off."""
    with socket.socket() as server, contextlib.ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        time.sleep(0.1)
        opened = host.Host(uri(server, "tcp"), timeouts=QUICK)
        began = time.monotonic()
        with (
            pytest.raises(errors.HostUnreachable, match=r"no answer .* 0.4 s"),
            opened.session("x"),
        ):
            pass
        assert time.monotonic() - began < 2


def test_open_closed_port(silent: socket.socket) -> None:
    closed = uri(silent, "tcp")
    silent.close()
    opened = host.Host(closed)
    with pytest.raises(errors.HostUnreachable, match="refused"), opened.session("x"):
        pass


def test_open_unknown_name() -> None:
    opened = host.Host("qemu+tls://no-such-host.invalid/system")
    with pytest.raises(errors.HostUnreachable, match="invalid"), opened.session("x"):
        pass


def test_open_leaves_nothing(silent: socket.socket) -> None:
    opened = host.Host(uri(silent, "tcp"), timeouts=QUICK)
    before = open_files()
    for _ in range(2):
        with pytest.raises(errors.HostTimeout), opened.session("x"):
            pass
    assert open_files() == before


def test_open_spares_other_sockets(silent: socket.socket) -> None:
    """Only sockets that libvirt opened are cut, not those of others to the peer."""
    with socket.create_connection(silent.getsockname()) as other:
        opened = host.Host(uri(silent, "tcp"), timeouts=QUICK)
        with pytest.raises(errors.HostTimeout), opened.session("x"):
            pass
        accepted, _ = silent.accept()
        with accepted:
            other.sendall(b"still there")
            assert accepted.recv(20) == b"still there"
