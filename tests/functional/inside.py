# SPDX-License-Identifier: Apache-2.0
"""What only a process on the group's own host can do; run inside a machine.

    python -m tests.functional.inside CONFIGURATION NAME

with one backend of kind lvm. It prints the name of what it showed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.functional.test_contract import (
    OPERATION,
    SIZE,
    arrived,
    content,
    settled,
    told,
    volume,
)
from virtmigrate import backends, conf, errors, host, manifest
from virtmigrate.backends import lvm, terms
from virtmigrate.model import VolumeState
from virtmigrate.units import MiB

PATTERN = b"\xa5" * MiB
TMP = Path("/tmp")


def lvm_command(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def soil(group: str) -> None:
    """Leave a pattern in all that is free nearby."""
    lvm_command("lvcreate", "--yes", "-L", "64M", "-n", "soil", group)
    with Path(f"/dev/{group}/soil").open("r+b", buffering=0) as device:
        for _ in range(64):
            device.write(PATTERN)
        os.fsync(device.fileno())
    lvm_command("lvremove", "--yes", f"{group}/soil")


def shown(backend: lvm.LvmBackend, name: str) -> bytes:
    return Path(backend.disks.volume_path(name)).read_bytes()


def growing_adds_zeros(backend: lvm.LvmBackend) -> None:
    made = backend.allocate(volume(backend))
    assert not any(shown(backend, made.name))
    soil(backend.group)
    backend.grow(made.name, 2 * SIZE)
    backend.grow(made.name, SIZE)
    assert backend.disks.physical(made.name) == 2 * SIZE
    assert shown(backend, made.name) == bytes(2 * SIZE)


def a_killed_growth_is_gone_on_with(backend: lvm.LvmBackend) -> None:
    made = backend.allocate(volume(backend))
    at = f"{backend.group}/{made.name}"
    soil(backend.group)
    lvm_command("lvchange", "--addtag", f"virtmigrate-grow-{SIZE}", at)
    lvm_command("lvextend", "--yes", "--size", f"{2 * SIZE}b", at)
    assert any(shown(backend, made.name)), "the tail shows no old bytes: nothing shown"
    backend.grow(made.name, 2 * SIZE)
    assert shown(backend, made.name) == bytes(2 * SIZE)
    assert not lvm_command("lvs", "--noheadings", "-o", "lv_tags", at).strip()


def what_is_retired_becomes_incoming(backend: lvm.LvmBackend) -> None:
    found = settled(backend, TMP, name="vda.old", state=VolumeState.RETIRED)
    assert found.durable
    aside, name = f"vda-r1.{OPERATION}", f"vda.{OPERATION}"
    wanted = aside, name, 2 * SIZE
    assert backend.set_aside(found, *wanted) is terms.Reuse.MOVED
    assert backend.set_aside(found, *wanted) is terms.Reuse.UNPROVEN
    backend.switch(aside, name)
    assert backend.set_aside(found, *wanted) is terms.Reuse.SWITCHED
    backend.remove(found.name)
    assert backend.volumes.find(found.name) is None
    assert arrived(backend, name).root() == told(content() + bytes(SIZE)).root()
    backend.incoming.create_raw(aside, SIZE)
    try:
        backend.switch(aside, name)
    except errors.VolumeExists:
        pass
    else:
        raise AssertionError("it was replaced")
    assert arrived(backend, name).root() == told(content() + bytes(SIZE)).root()


def an_open_volume_is_not_wiped(backend: lvm.LvmBackend) -> None:
    found = settled(backend, TMP)
    path = backend.local_file(backend.disks, found.name)
    assert path is not None
    with path.open("rb"):
        backend.remove(found.name)
        assert backend.drain(30)
        assert backend.volumes.read(found.name).body.state is VolumeState.DOOMED
        assert manifest.Manifest(SIZE).root() != told(shown(backend, found.name)).root()
    backend.sweep()
    assert backend.drain(30)
    assert found.name not in backend.disks.names()


def another_device_is_refused(backend: lvm.LvmBackend) -> None:
    made = backend.allocate(volume(backend))
    link = Path(backend.disks.volume_path(made.name))
    right = link.readlink()
    link.unlink()
    try:
        for wrong in ("/dev/vda", "/etc/passwd"):
            link.symlink_to(wrong)
            try:
                backend.local_file(backend.disks, made.name)
            except errors.StorageError as e:
                assert "leads to" in str(e), e
            else:
                raise AssertionError(f"{wrong} was taken")
            finally:
                link.unlink()
    finally:
        link.symlink_to(right)


SHOWN: tuple[Callable[[lvm.LvmBackend], None], ...] = (
    growing_adds_zeros,
    a_killed_growth_is_gone_on_with,
    what_is_retired_becomes_incoming,
    an_open_volume_is_not_wiped,
    another_device_is_refused,
)


def main() -> None:
    options = conf.load(Path(sys.argv[1]))
    with host.Host("qemu:///system") as here:
        (backend,) = backends.load(options, here).values()
        assert isinstance(backend, lvm.LvmBackend)
        backend.ensure()
        (each,) = (each for each in SHOWN if each.__name__ == sys.argv[2])
        began = time.monotonic()
        each(backend)
        print(f"{each.__name__} {time.monotonic() - began:.1f}", flush=True)
        backend.close()


if __name__ == "__main__":
    main()
