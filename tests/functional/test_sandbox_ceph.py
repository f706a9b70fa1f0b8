# SPDX-License-Identifier: Apache-2.0
"""The sandbox's Ceph cluster: seen by hosts and clients, stopped, leaving nothing."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
import rados
import rbd

from sandbox import Ceph, Host, Sandbox, SandboxError, ceph, guest, process

MiB = 1024 * 1024
POOL = ceph.POOL
REALLY = "--yes-i-really-really-mean-it"
SPACES = ("net", "mnt", "pid", "uts")
WAIT = 40.0  # for a guest to boot, under emulation, on a busy machine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox.attach()


@pytest.fixture(scope="module")
def cluster(box: Sandbox) -> Iterator[Ceph]:
    yield box.add_ceph("store")
    box.remove_ceph("store")


@pytest.fixture(scope="module")
def pair(box: Sandbox) -> Iterator[list[Host]]:
    hosts = box.add_hosts(["cephalpha", "cephbeta"])
    yield hosts
    for each in hosts:
        box.remove_host(each.name)


@pytest.fixture
def images(cluster: Ceph) -> Iterator[rados.Ioctx]:
    with connection(cluster) as client, client.open_ioctx(POOL) as context:
        yield context
        for name in rbd.RBD().list(context):
            rbd.RBD().remove(context, name)


def osd(cluster: Ceph) -> int:
    """Return the pid of its OSD."""
    (found,) = [
        record.pid
        for record in process.in_namespace("pid", cluster.pid)
        if process.name_of(record.pid) == "ceph-osd"
    ]
    return found


def connection(cluster: Ceph, user: str = ceph.USER) -> rados.Rados:
    """Return a client that is not connected; it gives up after some seconds."""
    bounds = {"client_mount_timeout": "10", "rados_osd_op_timeout": "10"}
    return rados.Rados(conffile=str(cluster.conf), name=f"client.{user}", conf=bounds)


def write(images: rados.Ioctx, name: str, content: bytes, size: int = MiB) -> None:
    rbd.RBD().create(images, name, size)
    with rbd.Image(images, name) as image:
        image.write(content, 0)


def read(images: rados.Ioctx, name: str, count: int) -> bytes:
    with rbd.Image(images, name, read_only=True) as image:
        content: bytes = image.read(0, count)
    return content


class Storage:
    """The cluster's pool on a libvirt host, reached over TLS."""

    def __init__(self, host: Host, cluster: Ceph) -> None:
        self.connection = libvirt.open(host.uri)
        self.secret = str(uuid.uuid4())
        self.monitors = "".join(
            f"<host name='{address}' port='{port}'/>"
            for address, port in cluster.monitors
        )
        secret = self.connection.secretDefineXML(
            f"<secret private='yes'><uuid>{self.secret}</uuid>"
            f"<usage type='ceph'><name>{self.secret}</name></usage></secret>"
        )
        secret.setValue(base64.b64decode(cluster.key()))
        self.pool = self.connection.storagePoolCreateXML(
            f"<pool type='rbd'><name>{POOL}</name><source>{self.monitors}"
            f"<name>{POOL}</name><auth type='ceph' username='{ceph.USER}'>"
            f"<secret uuid='{self.secret}'/></auth></source></pool>"
        )

    def create(self, name: str, size: int) -> None:
        self.pool.createXML(
            f"<volume><name>{name}</name><capacity>{size}</capacity></volume>"
        )

    def boot(self, image: str, console: Path) -> libvirt.virDomain:
        return self.connection.createXML(
            f"""<domain type='qemu'>
              <name>{image}</name>
              <memory unit='MiB'>128</memory>
              <os><type arch='x86_64' machine='q35'>hvm</type></os>
              <devices>
                <disk type='network' device='disk'>
                  <driver name='qemu' type='raw'/>
                  <auth username='{ceph.USER}'>
                    <secret type='ceph' uuid='{self.secret}'/>
                  </auth>
                  <source protocol='rbd' name='{POOL}/{image}'>{self.monitors}</source>
                  <target dev='vda' bus='virtio'/>
                </disk>
                <serial type='file'><source path='{console}'/></serial>
              </devices>
            </domain>"""
        )

    def close(self) -> None:
        self.pool.destroy()
        self.connection.secretLookupByUUIDString(self.secret).undefine()
        self.connection.close()


@pytest.fixture
def storages(cluster: Ceph, pair: list[Host]) -> Iterator[list[Storage]]:
    created = [Storage(host, cluster) for host in pair]
    yield created
    for each in created:
        each.close()


# Clients


def test_librbd(cluster: Ceph, images: rados.Ioctx) -> None:
    write(images, "one", b"content")
    assert read(images, "one", 7) == b"content"
    assert cluster.pools == [POOL]
    with connection(cluster) as client:
        assert client.get_fsid() == cluster.fsid


def test_a_key_is_needed(cluster: Ceph) -> None:
    client = connection(cluster)
    client.conf_set("key", cluster.key(ceph.ADMIN))
    with pytest.raises(rados.PermissionDeniedError):
        client.connect()


def test_rights_end_at_the_pool(cluster: Ceph) -> None:
    cluster.create_pool("foreign")
    cluster.add_user("guest", ["foreign"])
    with connection(cluster) as client, client.open_ioctx("foreign") as context:
        assert_refused(context)
    with connection(cluster, "guest") as client, client.open_ioctx("foreign") as own:
        write(own, "mine", b"x")
    cluster.run(["ceph", "osd", "pool", "rm", "foreign", "foreign", REALLY])
    assert cluster.pools == [POOL]


def assert_refused(context: rados.Ioctx) -> None:
    with pytest.raises(rbd.PermissionError):
        rbd.RBD().list(context)


def test_unprivileged_client(box: Sandbox, cluster: Ceph, images: rados.Ioctx) -> None:
    write(images, "seen", b"x")
    argv = ["rbd", "--conf", str(cluster.conf), "--id", ceph.USER, "ls", POOL]
    assert box.exec(argv, user=True).stdout.split() == ["seen"]


def test_attached(box: Sandbox, cluster: Ceph) -> None:
    found = Sandbox.attach().clusters["store"]
    assert found.is_up()
    assert (found.fsid, found.key()) == (cluster.fsid, cluster.key())
    assert found.monitors == cluster.monitors


# Hosts


def test_two_hosts_one_image(storages: list[Storage], images: rados.Ioctx) -> None:
    alpha, beta = storages
    alpha.create("shared", MiB)
    with pytest.raises(libvirt.libvirtError):
        beta.create("shared", MiB)
    beta.pool.refresh()
    assert beta.pool.storageVolLookupByName("shared").info()[1] == MiB
    assert rbd.RBD().list(images) == ["shared"]
    beta.pool.storageVolLookupByName("shared").delete()
    assert rbd.RBD().list(images) == []


def test_guest_boots_from_it(
    storages: list[Storage], pair: list[Host], images: rados.Ioctx, tmp_path: Path
) -> None:
    source = guest.image()
    write(images, "counter", source.path.read_bytes(), source.size)
    console = pair[0].storage / "counter.log"
    domain = storages[0].boot("counter", console)
    process.wait_until(lambda: len(guest.beats(console)) > 1, WAIT, "the guest")
    domain.destroy()
    copy = tmp_path / "copy.raw"
    copy.write_bytes(read(images, "counter", source.size))
    log = guest.verify(copy)
    assert (log.problems, log.first) == ([], 1)
    assert log.last >= 2


# Ways to hurt it


def test_stop_keeps_the_content(cluster: Ceph, images: rados.Ioctx) -> None:
    write(images, "kept", b"content")
    cluster.stop()
    assert not cluster.is_up()
    with pytest.raises(rados.TimedOut), impatient(cluster) as client:
        client.connect()
    cluster.start()
    assert read(images, "kept", 7) == b"content"


def impatient(cluster: Ceph) -> rados.Rados:
    client = connection(cluster)
    client.conf_set("client_mount_timeout", "1")
    return client


def test_one_thread_works_on_what_is_stored(cluster: Ceph) -> None:
    """Two at once have ended the OSD, by a race in memstore's iterators."""
    tasks = Path(f"/proc/{osd(cluster)}/task").glob("*/comm")
    assert [each.read_text().strip() for each in tasks].count("tp_osd_tp") == 1


def test_a_daemon_that_ended_is_named(box: Sandbox) -> None:
    dead = box.add_ceph("dead")
    try:
        os.kill(osd(dead), signal.SIGKILL)
        with pytest.raises(SandboxError, match="dead has no ceph-osd: no end after"):
            dead.run(["rbd", "ls", "--pool", POOL], timeout=2.0)
    finally:
        box.remove_ceph("dead")


def test_freeze(cluster: Ceph, images: rados.Ioctx) -> None:
    images.write_full("object", b"content")
    cluster.freeze()
    try:
        begun = images.aio_read("object", 7, 0, lambda done, content: None)
        time.sleep(0.3)
        assert not begun.is_complete()
    finally:
        cluster.thaw()
    begun.wait_for_complete()
    assert begun.get_return_value() == 7
    images.remove_object("object")


def test_lost_when_killed(box: Sandbox) -> None:
    lost = box.add_ceph("lost")
    with connection(lost) as client, client.open_ioctx(POOL) as context:
        write(context, "gone", b"x")
    lost.kill()
    assert not lost.is_up()
    lost.start()
    with connection(lost) as client, client.open_ioctx(POOL) as context:
        assert rbd.RBD().list(context) == []
    box.remove_ceph("lost")


# Leaving nothing


def daemons(name: str) -> list[str]:
    """Return the command lines that name a sandbox's cluster."""
    found = []
    for pid in process.all_pids():
        try:
            line = (process.PROC / str(pid) / "cmdline").read_text()
        except OSError:
            continue
        if f"/{name}/clusters/" in line:
            found.append(line)
    return found


def mounts() -> list[str]:
    return sorted(Path("/proc/self/mounts").read_text().splitlines())


def test_nothing_stays() -> None:
    before = mounts()
    with Sandbox("cephnothing") as sandbox:
        pid = sandbox.add_ceph().pid
        spaces = {kind: process.namespace_of(kind, pid) for kind in SPACES}
        assert len(daemons("cephnothing")) > 2
    assert daemons("cephnothing") == []
    assert mounts() == before
    assert not sandbox.directory.exists()
    for other in process.all_pids():
        for kind, space in spaces.items():
            assert process.namespace_of(kind, other) != space


SCRIPT = """
import time
from sandbox import Sandbox
with Sandbox("cephkilled") as sandbox:
    sandbox.add_ceph()
    print("up", flush=True)
    time.sleep(60)
"""


def test_reclaims_what_a_killed_run_left() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout as output:
        assert output.readline() == "up\n"
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    left = daemons("cephkilled")
    assert left
    with Sandbox("cephkilled"):
        assert daemons("cephkilled") == []
    assert not Sandbox("cephkilled").is_up()


def test_bad_name(box: Sandbox) -> None:
    with pytest.raises(SandboxError, match="not a name"):
        box.add_ceph("No such name")
