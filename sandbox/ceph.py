# SPDX-License-Identifier: Apache-2.0
"""A Ceph cluster beside the hosts: one monitor, one OSD that keeps all in memory.

Clients have to authenticate (cephx). A manager without modules counts the bytes.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import struct
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from sandbox import errors, host, namespace, process

ADMIN = "admin"
USER = "virtmigrate"
POOL = "volumes"
PORT = 6789  # of the monitor; msgr v2 is on 3300
PLACEMENT_GROUPS = 8
CAPACITY = 4 * 1024**3  # bytes that the OSD takes; none is reserved
DAEMONS = ("ceph-mon", "ceph-osd", "ceph-mgr")
START_TIMEOUT = 20.0
STOP_TIMEOUT = 60.0  # the OSD writes what it holds to its directory
MONITOR_CAPS = {"mon": "allow *"}
ADMIN_CAPS = {"mon": "allow *", "osd": "allow *", "mgr": "allow *", "mds": "allow *"}
MANAGER_CAPS = {"mon": "allow profile mgr", "osd": "allow *"}
OSD_CAPS = {"mon": "allow profile osd", "osd": "allow *"}


class Ceph:
    """A cluster on the sandbox's bridge, with an address of its own.

    Its content stays over stop() and start(), and is lost by kill(). Not safe
    for use by several threads at once.
    """

    def __init__(self, name: str, place: host.Place) -> None:
        self.name = name
        self.address = place.address
        self.directory = place.directory
        self.fsid = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{place.sandbox}"))
        self.conf = self.directory / "ceph.conf"
        self.monitors = [(self.address, PORT)]
        self.logs = self.directory / "log"
        self._place = place
        self._data = self.directory / "data"
        self._clean = self.directory / "clean"  # there after stop() only
        kinds = ("mount", "net", "uts", "pid")
        self._namespace = namespace.Namespace(self.directory, kinds)

    # For clients

    def keyring(self, user: str = USER) -> Path:
        """Return the file with a user's key; the configuration names it, too."""
        return self.directory / f"ceph.client.{user}.keyring"

    def key(self, user: str = USER) -> str:
        """Return a user's key in base64, as a libvirt secret holds it."""
        return read_key(self.keyring(user))

    @property
    def pools(self) -> list[str]:
        """The names of the pools."""
        text = self.run(["ceph", "osd", "pool", "ls", "--format", "json"])
        names: list[str] = json.loads(text)
        return names

    def create_pool(self, name: str) -> None:
        """Make a pool for images. Only the admin may use it; see add_user()."""
        groups = str(PLACEMENT_GROUPS)
        self.run(["ceph", "osd", "pool", "create", name, groups, groups])
        self.run(["rbd", "pool", "init", name])

    def add_user(self, name: str, pools: Sequence[str]) -> None:
        """Make a user with the rights that Cinder's has, or change its pools."""
        write_keyring(self.keyring(name), f"client.{name}", user_caps(pools))
        self.run(["ceph", "auth", "import", "-i", str(self.keyring(name))])

    def run(self, argv: Sequence[str], *, timeout: float = 30.0) -> str:
        """Run ceph, rbd or rados as the admin, and return what it prints.

        Raises SandboxError, which names the daemons that do not run.
        """
        command = [argv[0], "--conf", str(self.conf), *argv[1:]]
        try:
            return process.run(self._client(*command), timeout=timeout).stdout
        except errors.SandboxError as error:
            gone = [each for each in DAEMONS if not self._daemons(each)]
            if not gone:
                raise
            raise errors.SandboxError(
                f"{self.name} has no {', '.join(gone)}: {error}"
            ) from error

    # The whole cluster

    def start(self) -> None:
        """Start the cluster, and wait until it reads and writes.

        It has what it had at stop(). Otherwise it is a new one: the same fsid and
        users, the pool ``volumes``, and nothing in it.
        """
        self._end()
        fresh = not self._clean.exists()
        self._clean.unlink(missing_ok=True)
        if fresh:
            self._write_files()
        self._namespace.start(
            [["-t", "proc", "proc", "/proc"], ["-t", "sysfs", "sysfs", "/sys"]],
            hostname=self.name,
            inside=self._place.client.enter("net", "mount"),
        )
        self._connect_bridge()
        if fresh:
            self._start_fresh()
        else:
            self._start_daemon("mon", "a")
            self._start_daemon("osd", "0")
            self._start_daemon("mgr", "a")
        self._wait_ready()

    def stop(self) -> None:
        """Shut the cluster down; what it holds is on disk then."""
        if not self.is_up():
            return
        self._shut("ceph-osd")
        self._shut("ceph-mgr")
        self._shut("ceph-mon")
        self._clean.touch()
        self._end()

    def kill(self) -> None:
        """End the cluster at once, with all that it holds."""
        self._clean.unlink(missing_ok=True)
        self._end()

    def is_up(self) -> bool:
        """Return whether the cluster's namespaces are there."""
        return self._namespace.is_up()

    @property
    def pid(self) -> int:
        """The pid of the cluster's first process."""
        return self._namespace.pid

    def freeze(self) -> None:
        """Stop the OSD's execution: requests wait, and are answered after thaw()."""
        os.kill(self._daemon("ceph-osd").pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen OSD go on."""
        os.kill(self._daemon("ceph-osd").pid, signal.SIGCONT)

    def link(self, *, up: bool) -> None:
        """Connect the cluster to the bridge, or cut it off."""
        state = "up" if up else "down"
        process.run(self._client("ip", "link", "set", self._port, state))

    # Private

    @property
    def _port(self) -> str:
        return f"c-{self.name}"

    def _client(self, *argv: str) -> list[str]:
        return [*self._place.client.enter("net", "mount"), *argv]

    def _inside(self, *argv: str) -> str:
        return process.run([*self._namespace.enter(), *argv]).stdout

    def _end(self) -> None:
        self._namespace.stop()
        process.run(self._client("ip", "link", "del", self._port), check=False)

    def _write_files(self) -> None:
        shutil.rmtree(self._data, ignore_errors=True)
        for path in (self.logs, *(self._data / kind for kind in ("mon", "mgr", "osd"))):
            path.mkdir(parents=True, exist_ok=True)
        self.conf.write_text(configuration(self))
        write_keyring(self._data / "mon.keyring", "mon.", MONITOR_CAPS)
        write_keyring(self._data / "osd/keyring", "osd.0", OSD_CAPS)
        write_keyring(self._data / "mgr/keyring", "mgr.a", MANAGER_CAPS)
        write_keyring(self.keyring(ADMIN), f"client.{ADMIN}", ADMIN_CAPS)
        write_keyring(self.keyring(), f"client.{USER}", user_caps([POOL]))
        # The monitor begins with all that its keyring names.
        users = sorted(self.directory.glob("ceph.client.*.keyring"))
        with (self._data / "mon.keyring").open("a") as file:
            for path in (*self._data.glob("*/keyring"), *users):
                file.write(path.read_text())

    def _connect_bridge(self) -> None:
        peer = ["name", "eth0", "netns", str(self.pid)]
        veth = ["type", "veth", "peer", *peer]
        process.run(self._client("ip", "link", "add", self._port, *veth))
        bridge = ["master", host.BRIDGE, "up"]
        process.run(self._client("ip", "link", "set", self._port, *bridge))
        for command in (
            "link set lo up",
            f"link set eth0 address {host.mac(self.address)} up",
            f"address add {self.address}/{self._place.prefix} dev eth0",
        ):
            self._inside("ip", *command.split())

    def _start_fresh(self) -> None:
        """Make both daemons' stores, and start them."""
        conf = ["--conf", str(self.conf)]
        keyring = str(self._data / "mon.keyring")
        fresh = ["--mkfs", "--keyring", keyring]
        self._inside("ceph-mon", *conf, "--id", "a", *fresh)
        self._start_daemon("mon", "a")
        number = str(uuid.uuid4())
        self.run(["ceph", "osd", "new", number, "0"])
        self._inside("ceph-osd", *conf, "--id", "0", "--mkfs", "--osd-uuid", number)
        self._start_daemon("osd", "0")
        self._start_daemon("mgr", "a")
        self.create_pool(POOL)

    def _start_daemon(self, kind: str, number: str) -> None:
        self._inside(f"ceph-{kind}", "--conf", str(self.conf), "--id", number)

    def _wait_ready(self) -> None:
        """Wait until each pool answers: a request waits for the daemons."""
        deadline = time.monotonic() + START_TIMEOUT
        for pool in self.pools:
            rest = max(deadline - time.monotonic(), 0.1)
            self.run(["rbd", "ls", "--pool", pool], timeout=rest)
        rest = max(deadline - time.monotonic(), 0.1)
        process.wait_until(self._counts, rest, f"the room of {self.name}")

    def _counts(self) -> bool:
        """Return whether the manager has told the monitor what room there is."""
        found = json.loads(self.run(["ceph", "df", "--format", "json"]))
        return int(found["stats"]["total_bytes"]) > 0

    def _daemons(self, program: str) -> list[process.Record]:
        found = process.in_namespace("pid", self.pid)
        return [each for each in found if process.name_of(each.pid) == program]

    def _daemon(self, program: str) -> process.Record:
        for record in self._daemons(program):
            return record
        raise errors.SandboxError(f"{program} of {self.name} does not run")

    def _shut(self, program: str) -> None:
        record = self._daemon(program)
        os.kill(record.pid, signal.SIGTERM)
        os.kill(record.pid, signal.SIGCONT)  # it may be frozen
        process.wait_until(
            lambda: not record.is_alive(),
            STOP_TIMEOUT,
            f"the end of {program} of {self.name}",
        )


def configuration(cluster: Ceph) -> str:
    """Return ceph.conf, for daemons and clients."""
    directory, address = cluster.directory, cluster.address
    return f"""[global]
fsid = {cluster.fsid}
mon host = [v2:{address}:3300,v1:{address}:{PORT}]
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
public addr = {address}
keyring = {directory}/ceph.$name.keyring
admin socket =
run dir = {directory}/data

[mon]
mon initial members = a
mon data = {directory}/data/mon
keyring = {directory}/data/mon.keyring
log file = {directory}/log/mon.log
mon allow pool size one = true
mon allow pool delete = true
mon data avail crit = 1
# One monitor need not collect changes: each step of the start takes a second less.
paxos propose interval = 0.05
paxos min wait = 0.01
# Clients may use what came with Mimic: clones whose base needs no protection.
mon osd initial require min compat client = mimic
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off

[mgr]
mgr data = {directory}/data/mgr
keyring = {directory}/data/mgr/keyring
log file = {directory}/log/mgr.log
mgr initial modules =
mgr tick period = 1
mgr stats period = 1

[osd]
osd data = {directory}/data/osd
keyring = {directory}/data/osd/keyring
log file = {directory}/log/osd.log
osd objectstore = memstore
# A placement group whose lease ends while the daemon is frozen waits for a replica to
# renew it, and with one copy there is none: 0.8 of 20 s is too short for the tests.
osd pool default read lease ratio = 1000
memstore device bytes = {CAPACITY}
# Its iterators race with writes of other threads: all placement groups note their
# snapshots in one object, and trimming one while another is made ended the OSD.
osd op num shards = 1
osd op num threads per shard = 1
# Otherwise SIGTERM ends it before it has written what it holds.
osd fast shutdown = false
osd crush chooseleaf type = 0
"""


def user_caps(pools: Sequence[str]) -> dict[str, str]:
    """Return the rights that Cinder's documentation gives its user."""
    access = ", ".join(f"profile rbd pool={name}" for name in pools)
    return {"mon": "profile rbd", "osd": access, "mgr": access}


def write_keyring(path: Path, entity: str, caps: dict[str, str]) -> None:
    """Write a keyring file; a key that is there is kept."""
    key = read_key(path) if path.exists() else new_key()
    lines = [f"[{entity}]", f"key = {key}"]
    lines += [f'caps {service} = "{text}"' for service, text in caps.items()]
    path.write_text("\n".join(lines) + "\n")


def read_key(path: Path) -> str:
    """Return the key in a keyring file."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" = ")
        if name == "key":
            return value
    raise errors.SandboxError(f"no key in {path}")


def new_key() -> str:
    """Return a new key: type AES, time, length, 16 random bytes."""
    head = struct.pack("<HIIH", 1, int(time.time()), 0, 16)
    return base64.b64encode(head + os.urandom(16)).decode()
