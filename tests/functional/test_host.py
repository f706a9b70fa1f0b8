# SPDX-License-Identifier: Apache-2.0
"""Hosts reached, refused, frozen, cut off and killed: real daemons, real TLS.

Run inside a sandbox: python -m sandbox exec NAME -- pytest ...
"""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

import sandbox
from virtmigrate import connection, errors, host

KiB = 1024
MiB = 1024 * KiB

DEADLINE = 2.0
QUICK = host.Timeouts(connect=DEADLINE, call=DEADLINE)
LATE = DEADLINE + 3.0  # what a busy machine may add

INSIDE = sandbox.sandbox.NAME_VARIABLE in os.environ

pytestmark = pytest.mark.skipif(
    not INSIDE, reason="needs a sandbox: python -m sandbox exec NAME -- pytest ..."
)


@pytest.fixture(scope="module")
def box() -> sandbox.Sandbox:
    return sandbox.Sandbox.attach()


@contextlib.contextmanager
def added(
    box: sandbox.Sandbox,
    name: str,
    *,
    tcp: bool = False,
    sasl: bool = False,
    server_certificate: str = "trusted",
    dn_list: tuple[str, ...] = (),
) -> Iterator[sandbox.Host]:
    """Add a host to the sandbox for a while."""
    try:
        yield box.add_host(
            name,
            tcp=tcp,
            sasl=sasl,
            server_certificate=server_certificate,
            dn_list=dn_list,
        )
    finally:
        box.remove_host(name)


@pytest.fixture(scope="module")
def plain_host(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    with added(box, "ht-plain", tcp=True) as started:
        yield started


@pytest.fixture
def plain(plain_host: sandbox.Host) -> Iterator[sandbox.Host]:
    """A host in order, whatever the test did to it."""
    try:
        yield plain_host
    finally:
        with contextlib.suppress(sandbox.SandboxError):
            plain_host.thaw()
        plain_host.link(up=True)
        plain_host.start_libvirtd()


@pytest.fixture(scope="module")
def sasl(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    with added(box, "ht-sasl", sasl=True, tcp=True) as started:
        yield started


@pytest.fixture
def reached(plain: sandbox.Host) -> Iterator[host.Host]:
    """The plain host over TLS, with short deadlines."""
    with host.Host(plain.uri, timeouts=QUICK) as opened:
        yield opened


def name_of(opened: host.Host) -> str:
    with opened.session("asking its name") as session:
        return str(session.conn.getHostname())


def pools(opened: host.Host) -> list[str]:
    with opened.session("listing pools") as session:
        return [str(pool.name()) for pool in session.conn.listAllStoragePools()]


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# Encryption


def test_tls(reached: host.Host) -> None:
    assert name_of(reached) == "ht-plain"
    with reached.session("asking") as session:
        assert session.conn.isEncrypted()


def test_local_socket(plain: sandbox.Host) -> None:
    with host.Host(plain.local_uri) as opened:
        assert name_of(opened) == "ht-plain"


def test_tcp_refused(plain: sandbox.Host) -> None:
    with (
        host.Host(plain.tcp_uri) as opened,
        pytest.raises(errors.InsecureConnection, match="not encrypted"),
    ):
        name_of(opened)


def test_tcp_allowed(plain: sandbox.Host) -> None:
    with host.Host(plain.tcp_uri, allow_insecure=True) as opened:
        assert name_of(opened) == "ht-plain"


def test_refusal_leaves_nothing_open(plain: sandbox.Host) -> None:
    opened = host.Host(plain.tcp_uri)
    files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(errors.InsecureConnection):
        name_of(opened)
    assert len(list(Path("/proc/self/fd").iterdir())) == files


# Certificates

SERVERS = [
    ("expired", "expired"),
    ("wrong-name", "wrong name"),
    ("other-ca", "untrusted"),
]


@pytest.mark.parametrize(("kind", "problem"), SERVERS)
def test_server_certificate(box: sandbox.Sandbox, kind: str, problem: str) -> None:
    with added(box, "ht-bad", server_certificate=kind) as bad:
        assert certificate_problem(bad.uri)[0] == problem


def certificate_problem(uri: str) -> tuple[object, str]:
    with (
        host.Host(uri) as opened,
        pytest.raises(errors.CertificateRefused) as caught,
    ):
        name_of(opened)
    return caught.value.problem, str(caught.value)


def test_own_certificate_expired(box: sandbox.Sandbox, plain: sandbox.Host) -> None:
    problem, text = certificate_problem(plain.uri_with(box.make_pki("expired")))
    assert problem == "our own certificate"
    assert "has expired" in text


def test_own_certificate_of_other_authority(
    box: sandbox.Sandbox, plain: sandbox.Host, tmp_path: Path
) -> None:
    """We know the host's authority, and the host does not know ours."""
    pki = tmp_path / "pki"
    shutil.copytree(box.make_pki("other-ca"), pki)
    shutil.copy(box.pki / "cacert.pem", pki)
    problem, text = certificate_problem(plain.uri_with(pki))
    assert problem == "our own certificate"
    assert "hasn't got a known issuer" in text


def test_other_authority_on_both_sides(
    box: sandbox.Sandbox, plain: sandbox.Host
) -> None:
    uri = plain.uri_with(box.make_pki("other-ca"))
    assert certificate_problem(uri)[0] == "untrusted"


def test_own_name_not_on_list(box: sandbox.Sandbox) -> None:
    with added(box, "ht-list", dn_list=("CN=nobody",)) as strict:
        problem, text = certificate_problem(strict.uri)
    assert problem == "our own certificate"
    assert "tls_allowed_dn_list" in text


def test_own_certificate_missing(plain: sandbox.Host, tmp_path: Path) -> None:
    problem, text = certificate_problem(plain.uri_with(tmp_path))
    assert problem == "our own CA certificate"
    assert str(tmp_path) in text


# SASL


def test_sasl(sasl: sandbox.Host) -> None:
    with host.Host(sasl.sasl_uri) as opened:
        assert name_of(opened) == "ht-sasl"


def test_sasl_file_from_environment(
    sasl: sandbox.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_AUTH_FILE", str(sasl.auth_file))
    with host.Host(sasl.uri) as opened:
        assert name_of(opened) == "ht-sasl"


@pytest.mark.parametrize("content", ["wrong", "none", "missing"])
def test_sasl_refused(sasl: sandbox.Host, tmp_path: Path, content: str) -> None:
    auth_file = tmp_path / "auth.conf"
    if content == "wrong":
        text = sasl.auth_file.read_text()
        auth_file.write_text(text.replace("password=", "password=not-"))
    elif content == "none":
        auth_file.write_text("[credentials-x]\nauthname=x\n")
    with (
        host.Host(f"{sasl.uri}&authfile={auth_file}") as opened,
        pytest.raises(errors.AuthenticationFailed, match="does not let us in"),
    ):
        name_of(opened)


# Hosts that stop answering


def test_frozen_in_call(plain: sandbox.Host, reached: host.Host) -> None:
    name_of(reached)
    plain.freeze()
    with within(LATE), pytest.raises(errors.HostTimeout, match="asking its name"):
        name_of(reached)
    plain.thaw()
    assert name_of(reached) == "ht-plain"


@pytest.mark.parametrize("way", ["uri", "tcp_uri", "local_uri"])
def test_frozen_in_opening(plain: sandbox.Host, way: str) -> None:
    uri = getattr(plain, way)
    with host.Host(uri, timeouts=QUICK, allow_insecure=True) as opened:
        plain.freeze()
        with within(LATE), pytest.raises(errors.HostTimeout, match="connecting"):
            name_of(opened)
        plain.thaw()
        assert name_of(opened) == "ht-plain"


def test_frozen_in_closing(plain: sandbox.Host) -> None:
    opened = host.Host(plain.uri)
    name_of(opened)
    plain.freeze()
    with within(connection.CLOSE_TIMEOUT + 1.5):
        opened.close()


def test_frozen_host_delays_no_other(
    plain: sandbox.Host, reached: host.Host, sasl: sandbox.Host
) -> None:
    plain.freeze()
    thread = threading.Thread(target=name_of_silent, args=(reached,))
    thread.start()
    time.sleep(0.1)
    with within(DEADLINE / 2), host.Host(sasl.sasl_uri) as other:
        assert name_of(other) == "ht-sasl"
    thread.join()


def name_of_silent(opened: host.Host) -> None:
    with contextlib.suppress(errors.HostTimeout):
        name_of(opened)


def test_frozen_at_exit(plain: sandbox.Host) -> None:
    """A process that ends does not wait for a silent host's goodbye."""
    program = (
        "import os, signal, sys\n"
        "from virtmigrate import host\n"
        "h = host.Host(sys.argv[1])\n"
        "with h.session('asking'): pass\n"
        "os.kill(int(sys.argv[2]), signal.SIGSTOP)\n"
    )
    argv = [sys.executable, "-c", program, plain.uri, str(plain.libvirtd_pid)]
    subprocess.run(argv, check=True, timeout=20)


def test_cut_off_in_call(plain: sandbox.Host, reached: host.Host) -> None:
    name_of(reached)
    plain.link(up=False)
    with within(LATE), pytest.raises(errors.HostTimeout):
        name_of(reached)
    plain.link(up=True)
    assert name_of(reached) == "ht-plain"


def test_what_was_asked_while_cut_off_is_not_done_later(
    plain: sandbox.Host, sasl: sandbox.Host, reached: host.Host
) -> None:
    """The second host holds the bridge up: where nobody is on it the kernel looks for
    the first one's address, and keeps its last packets meanwhile."""
    path = f"<target><path>{plain.storage}</path></target>"
    name_of(reached)
    plain.link(up=False)
    with pytest.raises(errors.HostTimeout), reached.session("creating") as session:
        session.conn.storagePoolCreateXML(
            f"<pool type='dir'><name>late</name>{path}</pool>"
        )
    plain.link(up=True)
    # The kernel asks again within as long as it was silent.
    deadline = time.monotonic() + 2 * DEADLINE + 1
    while time.monotonic() < deadline:
        assert "late" not in pools(reached)
        time.sleep(0.2)


def test_cut_off_in_opening(plain: sandbox.Host, reached: host.Host) -> None:
    plain.link(up=False)
    with within(LATE), pytest.raises(errors.HostUnreachable):
        name_of(reached)
    plain.link(up=True)
    assert name_of(reached) == "ht-plain"


def test_killed(plain: sandbox.Host, reached: host.Host) -> None:
    name_of(reached)
    plain.kill_libvirtd()
    with within(DEADLINE), pytest.raises(errors.HostUnreachable):
        name_of(reached)
    plain.start_libvirtd()
    assert name_of(reached) == "ht-plain"


def test_killed_in_session(plain: sandbox.Host, reached: host.Host) -> None:
    with (
        pytest.raises(errors.HostUnreachable),
        reached.session("asking") as session,
    ):
        plain.kill_libvirtd()
        session.conn.getHostname()


def test_restarted_unnoticed(plain: sandbox.Host, reached: host.Host) -> None:
    """A connection that died between two sessions costs no error."""
    name_of(reached)
    plain.kill_libvirtd()
    plain.start_libvirtd()
    assert name_of(reached) == "ht-plain"


def test_closed_by_another_thread(plain: sandbox.Host) -> None:
    opened = host.Host(plain.uri)
    plain.freeze()
    plain.thaw()
    failures: list[BaseException] = []
    entered = threading.Event()

    def work() -> None:
        try:
            with opened.session("waiting") as session:
                plain.freeze()
                entered.set()
                session.conn.getHostname()
        except errors.HostUnreachable as e:
            failures.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(5)
    time.sleep(0.2)
    opened.close()
    thread.join(5)
    assert failures


# Streams


@pytest.fixture
def volume(plain: sandbox.Host, reached: host.Host) -> Iterator[str]:
    """The path of a volume of 8 MiB in a pool of its own."""
    xml = (
        f"<pool type='dir'><name>ht</name><target><path>{plain.storage}</path>"
        "</target></pool>"
    )
    new = f"<volume><name>v</name><capacity>{8 * MiB}</capacity></volume>"
    with reached.session("creating", timeout=10) as session:
        pool = session.conn.storagePoolCreateXML(xml)
        path = str(pool.createXML(new).path())
    yield path
    plain.thaw()
    with reached.session("removing", timeout=10) as session:
        pool = session.conn.storagePoolLookupByName("ht")
        session.conn.storageVolLookupByPath(path).delete()
        pool.destroy()


def upload(session: host.Session, path: str, *, pause: float, touch: bool) -> None:
    vol = session.conn.storageVolLookupByPath(path)
    stream = session.conn.newStream()
    vol.upload(stream, 0, 8 * MiB)
    for _ in range(128):
        stream.send(bytes(64 * KiB))
        time.sleep(pause)
        if touch:
            session.touch()
    stream.finish()


def test_stream_outlasts_deadline(reached: host.Host, volume: str) -> None:
    with reached.session("uploading", timeout=0.5) as session:
        upload(session, volume, pause=0.01, touch=True)
        assert time.monotonic() - session.began > 1


def test_session_rests_beyond_an_inner_one(reached: host.Host) -> None:
    """Who waits for something else is not cut because it asked the host meanwhile."""
    with reached.session("resting", timeout=2.0) as session:
        session.rest()
        with reached.session("asking", timeout=10) as inner:
            inner.conn.getVersion()
        time.sleep(2.5)
        session.touch()
        assert session.conn.getVersion()


def test_stream_frozen(plain: sandbox.Host, reached: host.Host, volume: str) -> None:
    plain_session = reached.session("uploading", timeout=DEADLINE)
    with within(LATE), pytest.raises(errors.HostTimeout), plain_session as session:
        vol = session.conn.storageVolLookupByPath(volume)
        stream = session.conn.newStream()
        vol.upload(stream, 0, 8 * MiB)
        plain.freeze()
        while True:
            stream.send(bytes(64 * KiB))


# What libvirt says


def test_texts_of_missing_things(reached: host.Host, volume: str) -> None:
    with (
        pytest.raises(errors.InstanceNotFound, match="instance none is not on"),
        reached.session("looking") as session,
    ):
        session.conn.lookupByName("none")
    with (
        pytest.raises(errors.PoolNotFound, match="no storage pool none"),
        reached.session("looking") as session,
    ):
        session.conn.storagePoolLookupByName("none")
    with (
        pytest.raises(errors.VolumeNotFound, match="pool ht has no volume none"),
        reached.session("looking", pool="ht") as session,
    ):
        session.conn.storagePoolLookupByName("ht").storageVolLookupByName("none")
    with (
        pytest.raises(errors.VolumeExists, match="pool ht already has a volume v"),
        reached.session("creating", pool="ht") as session,
    ):
        again = f"<volume><name>v</name><capacity>{MiB}</capacity></volume>"
        session.conn.storagePoolLookupByName("ht").createXML(again)


def test_pool_busy(reached: host.Host, volume: str) -> None:
    """The real code and text, from a pool that clones a volume meanwhile."""
    done = threading.Event()

    def clone() -> None:
        new = f"<volume><name>w</name><capacity>{256 * MiB}</capacity></volume>"
        try:
            with reached.session("cloning", timeout=30) as session:
                pool = session.conn.storagePoolLookupByName("ht")
                source = pool.createXML(new)
                pool.createXMLFrom(new.replace("w<", "x<"), source).delete()
                source.delete()
        finally:
            done.set()

    thread = threading.Thread(target=clone)
    thread.start()
    busy = None
    while busy is None and not done.is_set():
        busy = refreshed(reached)
    thread.join()
    assert isinstance(busy, errors.PoolBusy)
    assert busy.pool == "ht"


def refreshed(opened: host.Host) -> errors.Error | None:
    """Return what a refresh of the pool fails with, if it does."""
    try:
        with opened.session("refreshing", timeout=30) as session:
            session.conn.storagePoolLookupByName("ht").refresh()
    except errors.Error as e:
        return e
    return None


def test_other_failure_keeps_connection(reached: host.Host) -> None:
    with reached.session("asking") as session:
        before = session.conn
    with (
        pytest.raises(errors.LibvirtFailed) as caught,
        reached.session("defining") as session,
    ):
        session.conn.defineXML("<domain/>")
    assert caught.value.code == libvirt.VIR_ERR_NO_NAME
    with reached.session("asking") as session:
        assert session.conn is before


# Threads and processes


def test_two_threads_have_two_connections(
    plain: sandbox.Host, reached: host.Host
) -> None:
    seen: list[libvirt.virConnect] = []
    together = threading.Barrier(2)

    def work() -> None:
        with reached.session("asking") as session:
            together.wait(5)
            seen.append(session.conn)
            session.conn.getHostname()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(conn) for conn in seen}) == 2


def test_fork_leaves_parents_connection(plain: sandbox.Host) -> None:
    """A child that ends with all destructors run says no goodbye for its parent."""
    program = (
        "import os, sys\n"
        "from virtmigrate import host\n"
        "h = host.Host(sys.argv[1])\n"
        "with h.session('asking') as before:\n"
        "    pool = before.conn.storagePoolLookupByName('ht-fork')\n"
        "child = os.fork()\n"
        "with h.session('asking') as session:\n"
        "    assert session.conn.getHostname() == 'ht-plain'\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    assert pool.isActive()\n"
        "    with h.session('asking') as session:\n"
        "        assert session.conn is before.conn\n"
        "        session.conn.getHostname()\n"
    )
    xml = (
        "<pool type='dir'><name>ht-fork</name><target>"
        f"<path>{plain.storage}</path></target></pool>"
    )
    with host.Host(plain.uri) as opened, opened.session("creating") as session:
        pool = session.conn.storagePoolCreateXML(xml)
        argv = [sys.executable, "-c", program, plain.uri]
        subprocess.run(argv, check=True, timeout=20)
        pool.destroy()


POOL = (
    "<pool type='dir'><name>litter</name><target><path>/var/tmp</path></target></pool>"
)
CALLED = "virDomainLookupByName"


class _Garbage:
    """An object of a connection that broke, for the garbage collector to find."""

    def __init__(self, of: sandbox.Host) -> None:
        self.me = self
        with host.Host(of.uri) as opened, opened.session("listing") as session:
            self.pool = session.conn.storagePoolDefineXML(POOL, 0)
            session.opened.cut()


def test_an_error_is_that_of_its_call(plain: sandbox.Host) -> None:
    """Not that of an object which the collector frees before it is raised."""

    def collect(frame: types.FrameType, event: str, called: object) -> None:
        if event == "c_return" and getattr(called, "__name__", "") == CALLED:
            sys.setprofile(None)
            assert gc.collect()

    with host.Host(plain.local_uri) as opened:
        with opened.session("connecting"):
            pass
        gc.disable()
        try:
            _Garbage(plain)
            with (
                pytest.raises(errors.InstanceNotFound),
                opened.session("looking", instance="nobody") as session,
            ):
                sys.setprofile(collect)
                session.conn.lookupByName("nobody")
        finally:
            sys.setprofile(None)
            gc.enable()
            with opened.session("cleaning up") as session:
                session.conn.storagePoolLookupByName("litter").undefine()
