# SPDX-License-Identifier: Apache-2.0
"""Backends of each kind on the real thing, for the contract and for moves.

A new kind adds a function to PLACES. LVM lies in a machine, which is reached over TLS:
there nothing is local.
"""

import base64
import contextlib
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import libvirt

import sandbox
from sandbox.ceph import Ceph
from virtmigrate import backends, conf, host
from virtmigrate.backends import base
from virtmigrate.units import GiB

SECRET = "11111111-cccc-4ccc-8ccc-111111111111"


@contextlib.contextmanager
def of_directory(
    make: Sequence[str],
    preallocation: str,
    on: sandbox.Host,
    name: str,
    tmp: Path,
    _: Callable[[], Ceph],
) -> Iterator[dict[str, Any]]:
    """Files on a file system of their own.

    It lies in a file with holes and is mounted in the sandbox's client namespace,
    which all hosts see. With that namespace go the mount and the loop device, so
    that a killed test leaves neither.

    Arguments:
        make: the command that makes the file system.
        preallocation: the backend's option.
    """
    image, mount = on.directory / f"{tmp.name}.image", on.storage / tmp.name
    with image.open("wb") as file:
        file.truncate(4 * GiB)
    mount.mkdir()
    _run([*make, str(image)])
    _run(["mount", "-o", "loop", str(image), str(mount)])
    try:
        path = str(mount / "backend")
        yield {"kind": "dir", "path": path, "preallocation": preallocation}
    finally:
        # A libvirtd may still look at it.
        _run(["umount", "--lazy", str(mount)])
        image.unlink()
        mount.rmdir()


@contextlib.contextmanager
def of_shared_directory(
    on: sandbox.Host, name: str, tmp: Path, _: Callable[[], Ceph]
) -> Iterator[dict[str, Any]]:
    """Files in a directory that all hosts of one test see."""
    path = on.directory.parent / f"shared-{tmp.parent.name}-{name}"
    path.mkdir(exist_ok=True)
    try:
        yield {"kind": "shared_dir", "path": str(path)}
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def of_ceph(
    on: sandbox.Host, name: str, tmp: Path, cluster: Callable[[], Ceph]
) -> Iterator[dict[str, Any]]:
    """Images in a pool of their own, of a cluster."""
    ceph = cluster()
    if name not in ceph.pools:
        ceph.create_pool(name)
        ceph.add_user(name, [name])
    with libvirt_secret(on, ceph, name):
        yield {
            "kind": "rbd",
            "rbd_pool": name,
            "rbd_user": name,
            "rbd_ceph_conf": str(ceph.conf),
            "rbd_secret_uuid": SECRET,
            "rbd_timeout": 5.0,
        }


@contextlib.contextmanager
def of_lvm(
    on: sandbox.Machine, name: str, tmp: Path, _: Callable[[], Ceph]
) -> Iterator[dict[str, Any]]:
    """Logical volumes in the group of a machine."""
    # test_lvm.py has what is wiped.
    yield {"kind": "lvm", "lvm_group": on.group, "volume_clear": "none"}


EXT4 = ("mkfs.ext4", "-q", "-F")
XFS = ("mkfs.xfs", "-q", "-m", "reflink=1")

PLACES: dict[str, Callable[..., Any]] = {
    "dir-ext4": functools.partial(of_directory, EXT4, "none"),
    "dir-falloc": functools.partial(of_directory, XFS, "falloc"),
    "dir-xfs": functools.partial(of_directory, XFS, "none"),
    "lvm": of_lvm,
    "rbd": of_ceph,
    "shared_dir": of_shared_directory,
}

NEEDS = {
    "dir": (),
    "lvm": ("mmdebstrap", "qemu-system-x86_64"),
    "rbd": ("ceph-mon", "ceph-osd", "ceph-mgr", "rbd"),
}
"""Programs without which a kind cannot be tested here."""

SHARE = {
    r"test_contract\.py.*\[lvm": 2,
    r"test_contract\.py.*\[dir-falloc": 10,
    r"test_backends\.py.*\[shared_dir-tls": 6,
    r"test_consistency\.py.*\[lvm": 1,
    r"test_clone_kinds\.py.*\[lvm": 0,
    r"test_what_the_groups_own_host_can_do\[": 1,
    r"test_nobody_sees_old_bytes\[(discard|none)": 0,
    r"test_lvm\.py.*(_goes_on_|_from_a_|_between_|_layers_|_resized_)": 0,
    r"test_sandbox_machine\.py": 0,
    r"test_snapshot_kills\.py": 6,
    r"test_transient_kills\.py": 2,
    r"test_snapshot_rbd\.py::test_killed": 2,
    r"test_snapshot_branches\.py::test_a_failure": 3,
    r"test_an_active_layer_comes_to_stand_alone": 2,
}
"""How many tests `make test` takes of those that are slow; --full takes all."""

AFAR = frozenset({"lvm"})
"""Kinds whose place is a machine."""

GRACE = {"lvm": 40}
"""Seconds of record_grace, where writing a record takes longer than in memory."""

LEASE = 2
"""Seconds of lock_lease."""

Where = sandbox.Host | sandbox.Machine


def uri_of(on: Where) -> str:
    """Return how the tests reach a host."""
    return on.uri if isinstance(on, sandbox.Machine) else on.local_uri


def free_group(machine: sandbox.Machine) -> None:
    """Take the sandbox's pool of a machine's group away: only one may have it."""
    for verb in ("pool-destroy", "pool-undefine"):
        machine.run(["virsh", "-q", "-c", machine.local_uri, verb, machine.group])


@contextlib.contextmanager
def libvirt_secret(on: sandbox.Host, ceph: Ceph, user: str) -> Iterator[None]:
    """Give the key of a user to a host's libvirt."""
    text = (
        f"<secret ephemeral='yes' private='yes'><uuid>{SECRET}</uuid>"
        f"<usage type='ceph'><name>{user}</name></usage></secret>"
    )
    conn = libvirt.open(on.local_uri)
    try:
        secret = conn.secretDefineXML(text)
        secret.setValue(base64.b64decode(ceph.key(user)))
        yield
        secret.undefine()
    finally:
        conn.close()


@contextlib.contextmanager
def backend(
    kind: str,
    on: Where,
    opened: host.Host,
    tmp: Path,
    cluster: Callable[[], Ceph],
    **options: object,
) -> Iterator[base.Backend]:
    """Yield a backend that nobody else has, with its pools made.

    Arguments:
        options: of its group, besides those of the place.
    """
    name = "b" + tmp.name.encode().hex()[-20:]
    with PLACES[kind](on, name, tmp, cluster) as values:
        path = tmp / "virtmigrate.conf"
        lines = [f"{key} = {value}" for key, value in (values | options).items()]
        path.write_text(
            f"[virtmigrate]\nenabled_backends = {name}\n"
            f"record_grace = {GRACE.get(kind, 1)}\n"
            f"state_path = {tmp / 'state'}\nlock_lease = {LEASE}\n"
            f"[{name}]\nreserved_mib = 1\n" + "\n".join(lines) + "\n"
        )
        found = backends.load(conf.load(path), opened)[name]
        found.ensure()
        try:
            yield found
        finally:
            found.close()
            with opened.session("cleaning up") as session:
                for pool in session.conn.listAllStoragePools(0):
                    if pool.name().startswith(f"virtmigrate-{name}-"):
                        pool.destroy()
                        pool.undefine()


# Private


def _run(argv: Sequence[str]) -> None:
    subprocess.run(argv, check=True, timeout=30)
