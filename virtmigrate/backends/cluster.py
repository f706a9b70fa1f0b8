# SPDX-License-Identifier: Apache-2.0
"""A pool of a Ceph cluster, by librados and librbd.

The bindings come with Debian's python3-rados and python3-rbd; see docs/backends.md
for how a virtual environment finds them.
"""

import contextlib
import errno
import importlib
import struct
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from oslo_log import log as logging

from virtmigrate import errors

if TYPE_CHECKING:
    import rados
    import rbd

LOG = logging.getLogger(__name__)

SNAPSHOT = "virtmigrate-"
"""What the names of our snapshots begin with."""

CLONES = f"{SNAPSHOT}clones"
"""The snapshot of an image that its clones are made of."""


class Cluster:
    """One pool of a cluster, as one user. Safe to share between threads.

    Connected with the first use, and again after close().

    Arguments:
        host: the name of this host, for errors.
        conf: path of ceph.conf.
        user: without "client."; its keyring is where ceph.conf says.
        pool: the RADOS pool.
        timeout: seconds that the cluster may take to answer.
    """

    def __init__(
        self, host: str, conf: str, user: str, pool: str, timeout: float
    ) -> None:
        self.host = host
        self.pool = pool
        self._conf = conf
        self._user = user
        self._timeout = timeout
        self._lock = threading.Lock()
        self._handle: rados.Rados | None = None
        self._contexts: dict[str, rados.Ioctx] = {}

    def close(self) -> None:
        """Close the connection; nobody may be using it."""
        with self._lock:
            for context in self._contexts.values():
                context.close()
            self._contexts.clear()
            if self._handle is not None:
                self._handle.shutdown()
                self._handle = None

    def context(self, namespace: str = "") -> "rados.Ioctx":
        """Return a handle of the pool, or of a namespace in it."""
        with self._lock:
            if namespace not in self._contexts:
                context = self._connected().open_ioctx(self.pool)
                context.set_namespace(namespace)
                self._contexts[namespace] = context
            return self._contexts[namespace]

    @contextlib.contextmanager
    def other(self, pool: str) -> Iterator["rados.Ioctx"]:
        """Yield a handle of another pool of the cluster. Inside translated()."""
        with self._lock:
            context = self._connected().open_ioctx(pool)
        try:
            yield context
        finally:
            context.close()

    @contextlib.contextmanager
    def working(
        self, doing: str, volume: str = "?"
    ) -> Iterator[tuple["rbd.RBD", "rados.Ioctx"]]:
        """Yield what images are managed with; Ceph's errors become ours.

        Raises VolumeNotFound, VolumeExists, StorageDown, StorageError.
        """
        with self.translated(doing, volume):
            yield _rbd().RBD(), self.context()

    @contextlib.contextmanager
    def image(
        self, name: str, doing: str, *, read_only: bool = True, snapshot: str = ""
    ) -> Iterator["rbd.Image"]:
        """Yield an opened image, or a snapshot of one; raises as working()."""
        kept = snapshot or None
        with (
            self.working(doing, name) as (_, context),
            _rbd().Image(context, name, kept, read_only=read_only) as image,
        ):
            yield image

    @contextlib.contextmanager
    def translated(self, doing: str, volume: str = "?") -> Iterator[None]:
        """Make Ceph's errors ours."""
        rados, rbd = _rados(), _rbd()
        where = {"host": self.host, "pool": self.pool}
        try:
            yield
        except (rbd.ImageNotFound, rados.ObjectNotFound) as e:
            raise errors.VolumeNotFound(**where, volume=volume) from e
        except (rbd.ImageExists, rados.ObjectExists) as e:
            raise errors.VolumeExists(**where, volume=volume) from e
        except rbd.ImageBusy as e:
            raise errors.VolumeInUse(**where, volume=volume, users="somebody") from e
        except rados.TimedOut as e:
            raise self._down(doing) from e
        except (rados.Error, rbd.Error) as e:
            if abs(getattr(e, "errno", 0) or 0) in _AWAY:
                raise self._down(doing) from e
            raise errors.StorageError(**where, reason=f"{doing}: {e}") from e

    def create_object(self, namespace: str, name: str, size: int) -> None:
        """Make an object of size zeros, exclusively; inside translated()."""
        rados, context = _rados(), self.context(namespace)
        with rados.WriteOpCtx() as op:
            op.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
            if size:
                op.write(bytes(size))
            context.operate_write_op(op, name)

    def keys(self, namespace: str, name: str) -> list[str]:
        """Return all keys of an object; none without it. Inside translated()."""
        rados, context = _rados(), self.context(namespace)
        found: list[str] = []
        while True:
            after = found[-1] if found else ""
            with rados.ReadOpCtx() as op:
                part, _ = context.get_omap_keys(op, after, _KEYS)
                try:
                    context.operate_read_op(op, name)
                except rados.ObjectNotFound:
                    return found
                new = [str(key) for key, _ in part]
            found += new
            if len(new) < _KEYS:
                return found

    def value(self, namespace: str, name: str, key: str) -> bytes:
        """Return the value of a key; ObjectNotFound without it. Inside translated()."""
        rados, context = _rados(), self.context(namespace)
        with rados.ReadOpCtx() as op:
            found, _ = context.get_omap_vals_by_keys(op, (key,))
            context.operate_read_op(op, name)
            for _, value in found:
                return bytes(value)
        raise rados.ObjectNotFound(f"{name} has no key {key}")

    def set_key(
        self, namespace: str, name: str, key: str, value: bytes, *, is_new: bool
    ) -> None:
        """Set a key that is not there, or one that is; in one step, for all hosts.

        Raises ObjectExists, ObjectNotFound. Inside translated().
        """
        rados, context = _rados(), self.context(namespace)
        equal, more = rados.LIBRADOS_CMPXATTR_OP_EQ, rados.LIBRADOS_CMPXATTR_OP_GT
        with rados.WriteOpCtx() as op:
            if is_new:
                op.new(rados.LIBRADOS_CREATE_IDEMPOTENT)
            # A key that is not there compares like an empty one.
            op.omap_cmp(key, "", equal if is_new else more)
            context.set_omap(op, (key,), (value,))
            try:
                context.operate_write_op(op, name)
            except rados.Error as e:
                if getattr(e, "errno", 0) != errno.ECANCELED:
                    raise
                kind = rados.ObjectExists if is_new else rados.ObjectNotFound
                raise kind(f"{name}: key {key}") from e

    def remove_key(self, namespace: str, name: str, key: str) -> None:
        """Remove a key; nothing happens without it. Inside translated()."""
        rados, context = _rados(), self.context(namespace)
        with rados.WriteOpCtx() as op:
            context.remove_omap_keys(op, (key,))
            context.operate_write_op(op, name)

    def lock(self, namespace: str, name: str, cookie: str, lease: float) -> bool:
        """Take the lock of an object, which it makes; False while another has it.

        It is free when the lease is over. Inside translated().
        """
        rados, context = _rados(), self.context(namespace)
        try:
            context.lock_exclusive(name, _LOCK, cookie, duration=int(lease))
        except rados.ObjectBusy:
            return False
        return True

    def renew_lock(self, namespace: str, name: str, cookie: str, lease: float) -> None:
        """Have a lock for another lease; ObjectNotFound if it is not ours any more.

        Inside translated().
        """
        context = self.context(namespace)
        context.lock_exclusive(
            name, _LOCK, cookie, duration=int(lease), flags=_MUST_RENEW
        )

    def unlock(self, namespace: str, name: str, cookie: str) -> None:
        """Remove an object with the lock of it, in one step, if that is ours.

        Inside translated().
        """
        rados, context = _rados(), self.context(namespace)
        with rados.WriteOpCtx() as op:
            op.execute("lock", "assert_locked", _locked_by(cookie))
            op.remove()
            try:
                context.operate_write_op(op, name)
            except (rados.ObjectBusy, rados.ObjectNotFound):
                LOG.info("lock=%s was not ours any more", name)

    def clients(self, image: "rbd.Image") -> set[str]:
        """Return the addresses of all that have an image open to write to it, or its
        lock, but ours.

        A watch ends some time after its client is cut off, and a lock does not. Inside
        translated().
        """
        assert self._handle is not None
        # Of an image that nobody has locked there is a list, which is empty.
        lockers = dict(image.list_lockers() or {}).get("lockers", ())
        found = {str(each["addr"]) for each in image.watchers_list()}
        found |= {str(address) for _, _, address in lockers}
        return found - {str(self._handle.get_addrs())}

    def fence(self, client: str) -> None:
        """Have the cluster refuse all that a client sends from now on.

        Whoever reads or writes after this, by our connection, sees nothing change that
        it wrote later. Raises StorageDown, StorageError.
        """
        with self.translated(f"blocklisting {client}"):
            self.context()
            assert self._handle is not None
            self._handle.blocklist_add(client, _FOR_GOOD)
        LOG.warning("host=%s client %s is blocklisted", self.host, client)

    def fsid(self) -> str:
        """Return the id of the cluster."""
        with self.translated("asking for its id"):
            self.context()
            assert self._handle is not None
            return str(self._handle.get_fsid())

    def monitors(self) -> tuple[str, ...]:
        """Return the addresses of the monitors that ceph.conf names."""
        with self.translated("reading ceph.conf"):
            self.context()
            assert self._handle is not None
            return monitors(str(self._handle.conf_get("mon_host")))

    def room(self) -> tuple[int, int]:
        """Return the bytes that the cluster has, and those that are free."""
        with self.translated("asking for room"):
            self.context()
            assert self._handle is not None
            stats: dict[str, Any] = self._handle.get_cluster_stats()
        return int(stats["kb"]) * 1024, int(stats["kb_avail"]) * 1024

    # Private

    def _connected(self) -> "rados.Rados":
        if self._handle is None:
            rados = _rados()
            seconds = str(max(1, int(self._timeout)))
            handle = rados.Rados(
                conffile=self._conf,
                rados_id=self._user,
                conf={
                    "client_mount_timeout": seconds,
                    "rados_mon_op_timeout": seconds,
                    "rados_osd_op_timeout": seconds,
                },
            )
            try:
                handle.connect(timeout=self._timeout)
            except BaseException:
                handle.shutdown()
                raise
            self._handle = handle
        return self._handle

    def _down(self, doing: str) -> errors.StorageDown:
        return errors.StorageDown(
            host=self.host, pool=self.pool, seconds=self._timeout, reason=doing
        )


def monitors(text: str) -> tuple[str, ...]:
    """Return "address:port" of what a ceph.conf says of mon_host.

    Of the addresses of one monitor, in brackets, libvirt takes that of the first
    protocol (v1).
    """
    found = []
    for entry in _entries(text):
        # Brackets also stand around an address of IPv6.
        each = entry[1:-1].split(",") if entry.startswith("[v") else [entry]
        old = [a.removeprefix("v1:") for a in each if not a.startswith("v2:")]
        found += [a.partition("/")[0].removesuffix(":0") for a in old[:1]]
    return tuple(found)


# Private

_LOCK = "virtmigrate"
"""The name of the lock of an object."""

_EXCLUSIVE = 1
_MUST_RENEW = 2
"""As Ceph's class `lock` has them."""

_FOR_GOOD = 10 * 365 * 86400
"""Seconds on Ceph's blocklist, which forgets after an hour what comes without: a host
that was cut off would go on writing then."""

_KEYS = 1000
"""Keys that are asked for at once."""

_AWAY = (errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTUNREACH)


def _locked_by(cookie: str) -> bytes:
    """Return what Ceph's class `lock` is asked: version, length, name, type, cookie
    and tag."""
    name, mark = _LOCK.encode(), cookie.encode()
    body = struct.pack("<I", len(name)) + name + bytes([_EXCLUSIVE])
    body += struct.pack("<I", len(mark)) + mark + struct.pack("<I", 0)
    return struct.pack("<BBI", 1, 1, len(body)) + body


def _entries(text: str) -> list[str]:
    """Split at what separates monitors: commas and spaces outside of brackets."""
    entries, depth = [""], 0
    for char in text:
        depth += {"[": 1, "]": -1}.get(char, 0)
        if char in ", " and not depth:
            entries.append("")
        else:
            entries[-1] += char
    return [entry for entry in entries if entry]


def _rados() -> Any:
    return _imported("rados")


def _rbd() -> Any:
    return _imported("rbd")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise errors.ConfigurationError(
            reason="a backend of kind rbd needs the packages python3-rados and "
            f"python3-rbd, where this Python finds them: {e}"
        ) from e
