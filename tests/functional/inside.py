# SPDX-License-Identifier: Apache-2.0
"""What only a process on the group's own host can do; run inside a machine.

    python -m tests.functional.inside CONFIGURATION NAME

with one backend of kind lvm. It prints the name of what it showed.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.functional.test_contract import (
    OPERATION,
    OTHER,
    SIZE,
    arrived,
    content,
    settled,
    told,
    volume,
)
from virtmigrate import backends, conf, errors, host, manifest, model, stream
from virtmigrate.backends import lvm, terms
from virtmigrate.model import Role, VolumeState
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


def image_of(backend: lvm.LvmBackend) -> model.Volume:
    """A usable image, on a backend that clones by snapshots."""
    backend.capabilities = dataclasses.replace(
        backend.capabilities, clones=terms.Clones.SNAPSHOT
    )
    fields = {"role": Role.IMAGE, "owner": "", "state": VolumeState.USABLE}
    image = backend.allocate(volume(backend, "image", **fields))
    write(backend, "image", content())
    return image


def write(backend: lvm.LvmBackend, name: str, data: bytes) -> None:
    with Path(backend.disks.volume_path(name)).open("r+b", buffering=0) as device:
        device.write(data)
        os.fsync(device.fileno())


def cloned(
    backend: lvm.LvmBackend, image: model.Volume, name: str, size: int = SIZE
) -> model.Volume:
    with stream.Mover() as mover:
        return backend.clone(image, volume(backend, name, size=size), mover)


def a_snapshot_has_room_for_all(backend: lvm.LvmBackend) -> None:
    image = image_of(backend)
    made, other = (cloned(backend, image, name) for name in ("vda.1", "vda.2"))
    assert made.parent == other.parent == "image"
    assert backend.users("image") == {"vda.1", "vda.2"}
    assert backend.disks.physical(made.name) == SIZE
    assert shown(backend, made.name) == content()
    # Else LVM would drop it.
    write(backend, made.name, PATTERN * (SIZE // MiB))
    assert shown(backend, made.name) == PATTERN * (SIZE // MiB)
    assert shown(backend, "image") == shown(backend, other.name) == content()


def a_longer_clone_is_copied(backend: lvm.LvmBackend) -> None:
    made = cloned(backend, image_of(backend), "vda.1", 2 * SIZE)
    assert made.parent is None
    assert shown(backend, made.name) == content() + bytes(SIZE)


def what_has_snapshots_stays(backend: lvm.LvmBackend) -> None:
    """LVM would take them away with their origin, records or not."""
    made = cloned(backend, image_of(backend), "vda.1")
    aside = f"vda-r1.{OPERATION}", f"vda.{OPERATION}", SIZE
    refused(lambda: backend.remove("image"), errors.VolumeInUse)
    refused(lambda: backend.flatten(made.name), errors.Unsupported)
    refused(lambda: backend.grow(made.name, 2 * SIZE), errors.StorageError)
    refused(lambda: backend.set_aside(made, *aside), errors.Unsupported)
    backend.volumes.remove(made.name)
    refused(lambda: backend.remove("image"), errors.VolumeInUse)
    assert shown(backend, made.name) == content()


def a_snapshot_goes_alone(backend: lvm.LvmBackend) -> None:
    made = cloned(backend, image_of(backend), "vda.1")
    backend.remove(made.name)
    assert backend.drain(100)
    assert shown(backend, "image") == content()
    backend.remove("image")
    assert backend.drain(100)
    assert not {"image", made.name} & set(backend.disks.names())


def a_failed_snapshot_leaves_nothing(backend: lvm.LvmBackend) -> None:
    image, records = image_of(backend), backend.volumes.pool.names()
    words = ["--noheadings", "-o", "vg_free_count", backend.group]
    free = lvm_command("vgs", *words).strip()
    all_of_it = ["--yes", "-Wn", "-Zn", "-l", free, "-n", "all", backend.group]
    lvm_command("lvcreate", *all_of_it)
    refused(
        lambda: backend._volumes.create_snapshot("image", "vda.1"), errors.StorageError
    )
    lvm_command("lvremove", "--yes", f"{backend.group}/all")
    backend.incoming.create_raw("vda.1", SIZE)
    refused(lambda: cloned(backend, image, "vda.1"), errors.VolumeExists)
    assert set(backend.disks.names()) == {*records, "vda.1"}
    assert not any(shown(backend, "vda.1"))


def kept(backend: lvm.LvmBackend) -> str:
    """A volume of the pattern, whose state is kept, and that is zeros now."""
    made = backend.allocate(volume(backend, state=VolumeState.USABLE))
    write(backend, made.name, PATTERN * (SIZE // MiB))
    backend.keep_state(made.name, OPERATION)
    write(backend, made.name, bytes(SIZE))
    return made.name


def states(backend: lvm.LvmBackend) -> list[str]:
    found = lvm_command("lvs", "--noheadings", "-o", "lv_name", backend.group).split()
    return [name for name in found if ".state." in name]


def a_restore_is_gone_on_with(backend: lvm.LvmBackend) -> None:
    """Killed before the state was dropped, and while it was being wiped."""
    name = kept(backend)
    state = f"{name}.state.{OPERATION}"
    backend._copy_back(name, state)
    write(backend, name, bytes(SIZE // 2))
    backend.restore_state(name, OPERATION)
    assert shown(backend, name) == PATTERN * (SIZE // MiB)
    assert backend.drain(100)
    backend.keep_state(name, OPERATION)
    backend._doom(name, state)
    backend._volumes.wipe(state, SIZE)
    assert shown(backend, state) == bytes(SIZE)
    backend.restore_state(name, OPERATION)
    assert shown(backend, name) == PATTERN * (SIZE // MiB)
    # It waits for the old one.
    backend.keep_state(name, OPERATION)
    assert shown(backend, state) == PATTERN * (SIZE // MiB)


def only_what_differs_is_written_back(backend: lvm.LvmBackend) -> None:
    made = backend.allocate(volume(backend, state=VolumeState.USABLE))
    write(backend, made.name, PATTERN * (SIZE // MiB))
    backend.keep_state(made.name, OPERATION)
    write(backend, made.name, bytes(MiB))
    written = sectors_written(backend, made.name)
    backend.restore_state(made.name, OPERATION)
    assert sectors_written(backend, made.name) - written <= 2 * MiB // 512
    assert shown(backend, made.name) == PATTERN * (SIZE // MiB)


def sectors_written(backend: lvm.LvmBackend, name: str) -> int:
    number = Path(backend.disks.volume_path(name)).stat().st_rdev
    device = f"{os.major(number)}:{os.minor(number)}"
    return int(Path(f"/sys/dev/block/{device}/stat").read_text().split()[6])


def what_has_a_state_keeps_its_size(backend: lvm.LvmBackend) -> None:
    name = kept(backend)
    found = backend.volumes.read(name).body
    aside = f"vda-r1.{OPERATION}", f"vda.{OPERATION}", SIZE
    refused(lambda: backend.grow(name, 2 * SIZE), errors.Unsupported)
    refused(lambda: backend.set_aside(found, *aside), errors.Unsupported)
    backend.restore_state(name, OPERATION)
    # Once the state is wiped.
    backend.grow(name, 2 * SIZE)
    assert shown(backend, name) == PATTERN * (SIZE // MiB) + bytes(SIZE)


def a_snapshots_state_is_refused(backend: lvm.LvmBackend) -> None:
    image = image_of(backend)
    made = cloned(backend, image, "vda.1")
    refused(lambda: backend.keep_state(made.name, OPERATION), errors.Unsupported)
    # An image's state is no clone of it.
    backend.keep_state("image", OPERATION)
    assert backend.users("image") == {made.name}
    backend.remove(made.name)
    assert backend.drain(100)
    backend.remove("image")
    assert backend.drain(100)
    assert not states(backend)


def a_state_that_overflowed_is_told(backend: lvm.LvmBackend) -> None:
    made = backend.allocate(volume(backend, state=VolumeState.USABLE))
    state = f"{made.name}.state.{OPERATION}"
    at = f"{backend.group}/{made.name}"
    lvm_command("lvcreate", "--yes", "-s", "-L", "4M", "-n", state, at)
    write(backend, made.name, PATTERN * (SIZE // MiB))
    backend.disks.refresh()
    for call in (backend.keep_state, backend.restore_state):
        refused(functools.partial(call, made.name, OPERATION), errors.StorageError)
    assert shown(backend, made.name) == PATTERN * (SIZE // MiB)
    backend.drop_state(made.name, OPERATION)
    assert not states(backend)
    backend.keep_state(made.name, OPERATION)


def a_state_takes_what_it_can_use(backend: lvm.LvmBackend) -> None:
    """And not twice of it: there is that much room, and no more."""
    made = backend.allocate(volume(backend, state=VolumeState.USABLE))
    words = ["--noheadings", "-o", "vg_free_count", backend.group]
    # As much as the volume, and an extent for LVM's tables.
    spare = SIZE // backend.granularity() + 1
    rest = int(lvm_command("vgs", *words)) - spare
    all_of_it = ["--yes", "-Wn", "-Zn", "-l", str(rest), "-n", "all", backend.group]
    lvm_command("lvcreate", *all_of_it)
    backend.keep_state(made.name, OPERATION)
    refused(lambda: backend.keep_state(made.name, OTHER), errors.DiskFull)
    write(backend, made.name, PATTERN * (SIZE // MiB))
    # There is no room for the record that it is to be wiped.
    backend.restore_state(made.name, OPERATION)
    assert shown(backend, made.name) == bytes(SIZE)
    assert not states(backend)
    lvm_command("lvremove", "--yes", f"{backend.group}/all")


def refused(call: Callable[[], object], kind: type[errors.Error]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"it was not refused as {kind.__name__}")


SHOWN: tuple[Callable[[lvm.LvmBackend], None], ...] = (
    growing_adds_zeros,
    a_killed_growth_is_gone_on_with,
    what_is_retired_becomes_incoming,
    an_open_volume_is_not_wiped,
    another_device_is_refused,
    a_snapshot_has_room_for_all,
    a_longer_clone_is_copied,
    what_has_snapshots_stays,
    a_snapshot_goes_alone,
    a_failed_snapshot_leaves_nothing,
    a_restore_is_gone_on_with,
    only_what_differs_is_written_back,
    what_has_a_state_keeps_its_size,
    a_snapshots_state_is_refused,
    a_state_that_overflowed_is_told,
    a_state_takes_what_it_can_use,
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
