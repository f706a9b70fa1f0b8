# SPDX-License-Identifier: Apache-2.0
"""What every backend promises, shown on each kind, on the real thing.

What a kind cannot do it says by its capabilities, and refuses by Unsupported. A new
kind adds a function to places.py, and not a test.
"""

import concurrent.futures
import contextlib
import random
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import conftest, places
from virtmigrate import (
    backends,
    domainxml,
    errors,
    host,
    manifest,
    model,
    reading,
    stream,
)
from virtmigrate.backends import base, keeping, layout, terms
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Hold, Proof, Role, VolumeState
from virtmigrate.units import KiB, MiB, round_up

OWNER = "11111111-2222-3333-4444-555555555555"
OPERATION = "0123456789abcdef"
OTHER = "fedcba9876543210"
SIZE = 8 * MiB


@pytest.fixture(scope="module", params=sorted(places.PLACES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("con-alpha")
    box.remove_host("con-alpha")


@pytest.fixture(scope="module")
def alpha(
    kind: str, request: pytest.FixtureRequest, machine: Callable[[], sandbox.Machine]
) -> places.Where:
    if kind in places.AFAR:
        return machine()
    found: sandbox.Host = request.getfixturevalue("plain")
    return found


@pytest.fixture(scope="module")
def here(alpha: places.Where) -> Iterator[host.Host]:
    with host.Host(places.uri_of(alpha), name="con-alpha") as opened:
        yield opened


@pytest.fixture(scope="module")
def backend(
    kind: str,
    alpha: places.Where,
    here: host.Host,
    tmp_path_factory: pytest.TempPathFactory,
    cluster: Callable[[], Ceph],
) -> Iterator[base.Backend]:
    tmp = tmp_path_factory.mktemp(f"con-{kind}")
    with places.backend(kind, alpha, here, tmp, cluster) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_stays(backend: base.Backend) -> Iterator[None]:
    """Each test begins with an empty backend, and shows that all can be removed."""
    yield
    # What stands on an image goes first.
    for name in sorted(backend.volumes.names(), key=lambda name: name == "image"):
        backend.remove(name)
    assert backend.drain(timeout=60)
    for pool in (backend.incoming, backend.disks, backend.volumes.pool):
        for name in pool.names():
            if not name.startswith(layout.NAME):
                pool.delete(name)


def volume(backend: base.Backend, name: str = "", **fields: Any) -> model.Volume:
    name = name or f"vda.{OPERATION}"
    made = model.Volume(
        name=name,
        pool=backend.incoming.name,
        path=backend.incoming.volume_path(name),
        format=DiskFormat.RAW,
        role=Role.ROOT,
        size=SIZE,
        state=VolumeState.INCOMPLETE,
        owner=OWNER,
        operation=OPERATION,
        origin="alpha",
    )
    return msgspec.structs.replace(made, **fields)


def content(seed: int = 1, size: int = SIZE) -> bytes:
    """Data at both ends and in the middle, and holes between."""
    rng = random.Random(seed)
    data = bytearray(size)
    for start in (0, size // 2 + 4 * KiB, size - 64 * KiB):
        data[start : start + 64 * KiB] = rng.randbytes(64 * KiB)
    return bytes(data)


def told(data: bytes) -> manifest.Manifest:
    found = manifest.Manifest(len(data))
    for index in range(found.count):
        start, end = found.span(index)
        found.add(index, data[start:end])
    return found


def fill(backend: base.Backend, name: str, data: bytes, tmp: Path) -> None:
    """Write data as spawning does."""
    path = tmp / "data"
    path.write_bytes(data)
    with stream.Mover() as mover:
        mover.copy(reading.FileSource(path, len(data)), backend.target(name, len(data)))


def arrived(backend: base.Backend, name: str) -> manifest.Manifest:
    with stream.Mover() as mover, backend.arrived(name) as found:
        assert found.flush() == is_near(backend)
        return mover.survey(found.source)


def is_near(backend: base.Backend) -> bool:
    """Whether this process can do what libvirt cannot."""
    return backend.kind not in places.AFAR or backend.disks.is_local()


def settled(backend: base.Backend, tmp: Path, **fields: Any) -> model.Volume:
    """A usable volume with content, as an arrival leaves it."""
    data = fields.pop("data", content())
    made = volume(backend, **fields)
    backend.allocate(
        msgspec.structs.replace(made, state=VolumeState.INCOMPLETE, size=len(data))
    )
    fill(backend, made.name, data, tmp)
    pool, path = backend.accept(made.name)
    backend.keep_manifest(made.name, told(data))
    state = made.state
    if state is VolumeState.INCOMPLETE:
        state = VolumeState.USABLE
    return backend.update(
        msgspec.structs.replace(
            made,
            pool=pool,
            path=path,
            size=len(data),
            state=state,
            durable=backend.persist(pool, made.name),
            digest=told(data).digest(),
        )
    )


def read(backend: base.Backend, found: model.Volume) -> manifest.Manifest:
    with stream.Mover() as mover:
        return mover.survey(backend.source(found, found.size))


def test_every_kind_has_a_place() -> None:
    assert {name.partition("-")[0] for name in places.PLACES} == set(backends.KINDS)


# Making and filling


def test_making_it_again_changes_nothing(backend: base.Backend) -> None:
    backend.allocate(volume(backend))
    backend.ensure()
    assert backend.volumes.names() == [f"vda.{OPERATION}"]


def test_a_new_volume_is_zeros_of_its_size(backend: base.Backend) -> None:
    made = backend.allocate(volume(backend))
    assert backend.incoming.physical(made.name) == SIZE
    assert arrived(backend, made.name).root() == manifest.Manifest(SIZE).root()
    assert backend.volumes.read(made.name).body.state is VolumeState.INCOMPLETE


def test_a_name_is_taken_once(backend: base.Backend, tmp_path: Path) -> None:
    made = backend.allocate(volume(backend))
    fill(backend, made.name, content(), tmp_path)
    with pytest.raises((errors.VolumeExists, errors.RecordConflict)):
        backend.allocate(volume(backend))
    with pytest.raises(errors.VolumeExists):
        backend.incoming.create_raw(made.name, SIZE)
    assert arrived(backend, made.name).root() == told(content()).root()


def test_of_many_one_makes_it(backend: base.Backend) -> None:
    start = threading.Barrier(4, timeout=20)

    def make(number: int) -> bool:
        start.wait()
        try:
            backend.incoming.create_raw("race", MiB)
        except errors.VolumeExists:
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(make, range(4))) == [False, False, False, True]


def test_what_is_written_is_read(backend: base.Backend, tmp_path: Path) -> None:
    made = backend.allocate(volume(backend))
    fill(backend, made.name, content(), tmp_path)
    found = arrived(backend, made.name)
    assert found.root() == told(content()).root()


def test_holes_are_not_read(backend: base.Backend, tmp_path: Path) -> None:
    size = 64 * MiB
    made = backend.allocate(volume(backend, size=size))
    fill(backend, made.name, content(size=size), tmp_path)
    if backend.capabilities.thick or backend.preallocates:
        # Where a hole has room, what the kernel reads ahead of it counts as data.
        assert backend.incoming.allocated(made.name) >= size
        return
    with stream.Mover() as mover, backend.arrived(made.name) as found:
        mover.survey(found.source)
    assert mover.account.figures().read <= 16 * MiB
    assert backend.incoming.allocated(made.name) <= 16 * MiB


def test_what_is_not_there_is_said(backend: base.Backend) -> None:
    with pytest.raises(errors.VolumeNotFound, match="nothing"):
        backend.incoming.physical("nothing")
    with pytest.raises(errors.VolumeNotFound), backend.arrived("nothing") as found:
        found.source.__enter__()
    backend.incoming.delete("nothing")


# Becoming a disk


def test_accepted_is_a_disk(backend: base.Backend, tmp_path: Path) -> None:
    found = settled(backend, tmp_path)
    assert backend.accept(found.name) == (found.pool, found.path)
    assert found.durable == is_near(backend)
    assert read(backend, found).root() == told(content()).root()


def test_a_domain_runs_on_it(
    backend: base.Backend, alpha: places.Where, tmp_path: Path
) -> None:
    """QEMU opens the layer that the backend names, and holds it."""
    found = settled(backend, tmp_path)
    (layer,) = backend.layers(found.name)
    assert layer.fmt is DiskFormat.RAW
    text = domainxml.build(
        domainxml.Domain(
            uuid=OWNER,
            name="contract",
            memory=64 * MiB,
            vcpus=1,
            virt_type="qemu",
            machine="q35",
            disks=(domainxml.Disk(target="vda", chain=(layer,)),),
        )
    )
    conn = libvirt.open(places.uri_of(alpha))
    try:
        domain = conn.createXML(text, libvirt.VIR_DOMAIN_START_PAUSED)
        try:
            assert domain.blockInfo("vda")[0] == SIZE
            kind = "file" if backend.capabilities.files else "(dev|protocol)"
            assert re.search(f"<source {kind}=", text)
        finally:
            domain.destroy()
    finally:
        conn.close()


def test_removed_is_gone(backend: base.Backend, tmp_path: Path) -> None:
    found = settled(backend, tmp_path)
    for _ in range(2):
        backend.remove(found.name)
        assert backend.drain(timeout=60)
        assert backend.volumes.find(found.name) is None
        assert found.name not in backend.disks.names()
        left = backend.volumes.pool.names()
        assert [name for name in left if not name.startswith(layout.NAME)] == []


# Growing


def test_it_grows_by_zeros(backend: base.Backend, tmp_path: Path) -> None:
    made = backend.allocate(volume(backend))
    fill(backend, made.name, content(), tmp_path)
    if not is_near(backend):
        with pytest.raises(errors.Unsupported, match=backend.name):
            backend.grow(made.name, 2 * SIZE)
        assert backend.incoming.physical(made.name) == SIZE
        return
    for size in (2 * SIZE, 2 * SIZE, SIZE):
        backend.grow(made.name, size)
        assert backend.incoming.physical(made.name) == 2 * SIZE
        grown = content() + bytes(SIZE)
        assert arrived(backend, made.name).root() == told(grown).root()


# Copying


@pytest.mark.parametrize("size", [SIZE, SIZE + 64 * KiB])
def test_a_copy_changes_alone(backend: base.Backend, tmp_path: Path, size: int) -> None:
    found = settled(backend, tmp_path, name="image", role=Role.IMAGE)
    expected = told(content() + bytes(size - SIZE)).root()
    with stream.Mover() as mover:
        made = backend.copy(found, volume(backend, size=size), mover)
        assert backend.volumes.read(made.name).body == made
        assert arrived(backend, made.name).root() == expected
        with pytest.raises((errors.VolumeExists, errors.RecordConflict)):
            backend.copy(found, made, mover)
    assert arrived(backend, made.name).root() == expected
    with backend.target(made.name, size).writer(size, lambda: None) as writer:
        writer.write(0, b"other")
    assert read(backend, found).root() == told(content()).root()
    assert arrived(backend, made.name).root() != expected
    backend.remove("image")
    assert backend.incoming.physical(made.name) == size


def test_what_is_longer_or_no_raw_volume_is_not_copied(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path, name="image", role=Role.IMAGE)
    layer = msgspec.structs.replace(found, format=DiskFormat.QCOW2)
    with stream.Mover() as mover:
        for source, size in ((found, SIZE - 64 * KiB), (layer, SIZE)):
            with pytest.raises(errors.Unsupported, match="image"):
                backend.copy(source, volume(backend, size=size), mover)
    assert backend.volumes.names() == ["image"]


def test_a_copy_that_fails_leaves_nothing(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path, name="image", role=Role.IMAGE)
    backend.pool(found.pool).delete("image")
    with stream.Mover() as mover, pytest.raises(errors.Error):
        backend.copy(found, volume(backend), mover)
    assert backend.volumes.names() == ["image"]
    assert backend.incoming.names() == []


# Clones


CLONE = f"vda.{OPERATION}"


def image(backend: base.Backend, tmp: Path) -> model.Volume:
    """A usable image, in the cache of a backend."""
    return settled(backend, tmp, name="image", role=Role.IMAGE, owner="", operation="")


def clone(
    backend: base.Backend, found: model.Volume, name: str = CLONE, size: int = SIZE
) -> model.Volume:
    """A disk that is made of an image."""
    with stream.Mover() as mover:
        made = backend.clone(found, volume(backend, name, size=size), mover)
    assert backend.volumes.read(name).body == made
    pool, path = backend.accept(name)
    return backend.update(
        msgspec.structs.replace(made, pool=pool, path=path, state=VolumeState.USABLE)
    )


def seen(backend: base.Backend, found: model.Volume, tmp: Path) -> str:
    """Digest of what the guest of a disk reads."""
    if found.format is DiskFormat.RAW:
        return read(backend, found).root()
    path = tmp / "seen"
    view = conftest.guest_view(backend.layers(found.name))
    argv = ["qemu-img", "convert", "-U", "-O", "raw", view, str(path)]
    subprocess.run(argv, check=True, timeout=60)
    return told(path.read_bytes()).root()


def spoil(backend: base.Backend, found: model.Volume) -> None:
    """Write to a disk as its guest would."""
    if found.format is DiskFormat.RAW:
        with contextlib.ExitStack() as stack:
            if backend.disks.name != backend.incoming.name:
                file = stack.enter_context(Path(found.path).open("r+b"))
                file.write(b"spoilt")
                return
            target = backend.target(found.name, found.size)
            writer = stack.enter_context(target.writer(found.size, lambda: None))
            writer.write(0, b"spoilt")
        return
    argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", found.path]
    subprocess.run(argv, check=True, timeout=30, stdout=subprocess.DEVNULL)


def names(backend: base.Backend) -> set[str]:
    """All volumes, whatever they are of."""
    return {*backend.incoming.names(), *backend.disks.names()} - {
        name for name in backend.disks.names() if ".rec." in name or ".man" in name
    }


def test_a_clone_holds_what_its_image_does(
    backend: base.Backend, tmp_path: Path
) -> None:
    made = clone(backend, image(backend, tmp_path))
    assert seen(backend, made, tmp_path) == told(content()).root()
    how = backend.capabilities.clones
    stands = (made.format, made.backing, made.parent)
    shares = how is terms.Clones.SHARED
    if how is terms.Clones.OVERLAY:
        assert stands == (DiskFormat.QCOW2, "image", None)
    else:
        assert stands == (DiskFormat.RAW, None, "image" if shares else None)
    users = {made.name} if made.backing or made.parent else set()
    assert backend.users("image") == users


def test_a_longer_clone_ends_in_zeros(backend: base.Backend, tmp_path: Path) -> None:
    made = clone(backend, image(backend, tmp_path), size=3 * SIZE)
    assert made.size == 3 * SIZE
    expected = told(content() + bytes(2 * SIZE)).root()
    assert seen(backend, made, tmp_path) == expected


def test_clones_change_alone(backend: base.Backend, tmp_path: Path) -> None:
    found = image(backend, tmp_path)
    first, second = clone(backend, found, "vda.1"), clone(backend, found, "vda.2")
    before = told(content()).root()
    spoil(backend, first)
    assert seen(backend, first, tmp_path) != before
    assert seen(backend, second, tmp_path) == before
    assert read(backend, found).root() == before
    backend.remove(first.name)
    assert seen(backend, second, tmp_path) == before


def test_a_clone_says_what_it_stands_on_before_it_is_made(
    backend: base.Backend, tmp_path: Path
) -> None:
    """Who removes the image sees it, or is seen by the fence."""
    found = image(backend, tmp_path)
    noted: list[model.Volume] = []

    def fence() -> None:
        noted.append(backend.volumes.read(CLONE).body)
        assert CLONE not in names(backend)

    with stream.Mover() as mover:
        made = backend.clone(found, volume(backend), mover, fence)
    assert noted == [made]
    assert made.state is VolumeState.INCOMPLETE


def test_a_fenced_clone_leaves_nothing(backend: base.Backend, tmp_path: Path) -> None:
    found, before = image(backend, tmp_path), names(backend)

    def fence() -> None:
        raise errors.InvalidState(instance="", host="", state="", reason="it goes")

    with stream.Mover() as mover, pytest.raises(errors.InvalidState):
        backend.clone(found, volume(backend), mover, fence)
    assert backend.volumes.names() == ["image"]
    assert names(backend) == before
    backend.remove("image")


def test_a_clone_that_fails_leaves_nothing(
    backend: base.Backend, tmp_path: Path
) -> None:
    """Its storage refuses, and then its image is gone."""
    found, before = image(backend, tmp_path), names(backend)
    backend.incoming.create_raw(CLONE, MiB)
    with stream.Mover() as mover:
        with pytest.raises(errors.VolumeExists):
            backend.clone(found, volume(backend), mover)
        assert backend.volumes.names() == ["image"]
        assert names(backend) == before | {CLONE}, "it deleted what another made"
        backend.incoming.delete(CLONE)
        backend.pool(found.pool).delete("image")
        with pytest.raises(errors.Error):
            backend.clone(found, volume(backend), mover)
    assert backend.volumes.names() == ["image"]
    assert names(backend) == before - {"image"}


def test_a_killed_clone_is_made_again(backend: base.Backend, tmp_path: Path) -> None:
    found = image(backend, tmp_path)
    with stream.Mover() as mover:
        backend.clone(found, volume(backend), mover)
        with pytest.raises(errors.RecordConflict):
            backend.clone(found, volume(backend, operation=OTHER), mover)
    assert seen(backend, clone(backend, found), tmp_path) == told(content()).root()
    with stream.Mover() as mover, pytest.raises(errors.RecordConflict):
        backend.clone(found, volume(backend), mover)
    assert backend.volumes.read(CLONE).body.state is VolumeState.USABLE


def test_what_is_no_usable_image_is_not_cloned(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = image(backend, tmp_path)
    wrong = [
        msgspec.structs.replace(found, role=Role.ROOT),
        msgspec.structs.replace(found, state=VolumeState.INCOMPLETE),
        msgspec.structs.replace(found, size=2 * SIZE),
    ]
    with stream.Mover() as mover:
        for each in wrong:
            with pytest.raises(errors.Unsupported, match="image"):
                backend.clone(each, volume(backend), mover)
    assert backend.volumes.names() == ["image"]


def test_an_image_with_clones_stays(backend: base.Backend, tmp_path: Path) -> None:
    made = clone(backend, image(backend, tmp_path))
    if not (made.backing or made.parent):
        backend.remove("image")
        assert seen(backend, made, tmp_path) == told(content()).root()
        return
    for state in (VolumeState.INCOMPLETE, VolumeState.RETIRED, VolumeState.USABLE):
        backend.update(msgspec.structs.replace(made, state=state))
        with pytest.raises(errors.VolumeInUse, match=f"image .* {CLONE}"):
            backend.remove("image")
    found = backend.volumes.read("image").body
    assert read(backend, found).root() == told(content()).root()
    assert seen(backend, made, tmp_path) == told(content()).root()
    backend.remove(made.name)
    assert backend.drain(timeout=60)
    backend.remove("image")
    assert backend.drain(timeout=60)
    assert backend.volumes.names() == [] and names(backend) == set()


def test_an_image_goes_with_its_own_instance(
    backend: base.Backend, tmp_path: Path
) -> None:
    """One that came with it by a move; in whatever order they go."""
    found = settled(backend, tmp_path, name="image", role=Role.IMAGE)
    top = volume(backend, "top", backing="image", state=VolumeState.USABLE)
    backend.volumes.publish("top", top)
    backend.remove("image")
    assert backend.volumes.find(found.name) is None


def test_a_flattened_clone_stands_alone(backend: base.Backend, tmp_path: Path) -> None:
    made = clone(backend, image(backend, tmp_path), size=2 * SIZE)
    spoil(backend, made)
    before = seen(backend, made, tmp_path)
    if made.backing:
        with pytest.raises(errors.Unsupported, match=backend.name):
            backend.flatten(made.name)
        assert seen(backend, made, tmp_path) == before
        return
    for _ in range(2):
        flat = backend.flatten(made.name)
        assert flat == msgspec.structs.replace(made, parent=None)
        assert backend.volumes.read(made.name).body == flat
    backend.remove("image")
    assert seen(backend, flat, tmp_path) == before


def test_a_clone_is_copied(backend: base.Backend, tmp_path: Path) -> None:
    made = clone(backend, image(backend, tmp_path))
    spoil(backend, made)
    with stream.Mover() as mover:
        if made.backing:
            with pytest.raises(errors.Unsupported, match=backend.name):
                backend.copy(made, volume(backend, "copy"), mover)
            return
        copied = backend.copy(made, volume(backend, "copy"), mover)
    assert (copied.backing, copied.parent) == (None, None)
    expected = seen(backend, made, tmp_path)
    backend.remove(made.name)
    assert arrived(backend, copied.name).root() == expected


def test_a_retired_clone_is_reclaimed(backend: base.Backend, tmp_path: Path) -> None:
    made = clone(backend, image(backend, tmp_path))
    backend.update(msgspec.structs.replace(made, state=VolumeState.RETIRED))
    aside = f"vda-r1.{OTHER}", f"vda.{OTHER}", SIZE
    if made.parent:
        with pytest.raises(errors.Unsupported, match=backend.name):
            backend.set_aside(made, *aside)
        assert seen(backend, made, tmp_path) == told(content()).root()
    freed = backend.reclaim(lambda freed: False)
    assert (freed < SIZE) == bool(made.backing or made.parent) or freed <= SIZE
    assert backend.users("image") == set()
    backend.remove("image")


def test_a_retired_copy_keeps_nothing(backend: base.Backend, tmp_path: Path) -> None:
    """It goes before what was frozen below it, and no copy that is in use does."""
    below = settled(backend, tmp_path, name="below", state=VolumeState.FROZEN)
    for name in ("left", "right"):
        top = volume(backend, name, backing="below", state=VolumeState.USABLE)
        backend.volumes.publish(name, msgspec.structs.replace(top, owner=name))
    for state in (VolumeState.FROZEN, VolumeState.RETIRED):
        backend.update(msgspec.structs.replace(below, state=state))
        with pytest.raises(errors.VolumeInUse, match=r"below .* left, right"):
            backend.remove("below")
    assert backend.reclaim(lambda freed: False) == 0
    for name in ("left", "right"):
        found = backend.volumes.read(name).body
        backend.update(msgspec.structs.replace(found, state=VolumeState.RETIRED))
        if name == "left":
            with pytest.raises(errors.VolumeInUse, match=r"below .* right"):
                backend.remove("below")
            assert backend.volumes.names() == ["below", "left", "right"]
    with backend.claims.of("left"), pytest.raises(errors.VolumeInUse, match="left"):
        backend.remove("below")
    backend.remove("below")
    assert backend.drain(timeout=60)
    assert backend.volumes.names() == []


def test_the_state_of_a_clone_is_kept(backend: base.Backend, tmp_path: Path) -> None:
    if not backend.capabilities.snapshots:
        return  # refused, see below
    made = clone(backend, image(backend, tmp_path))
    spoil(backend, made)
    before = seen(backend, made, tmp_path)
    backend.keep_state(made.name, OTHER)
    grow_if_it_can(backend, made.name)
    fill(backend, made.name, content(2), tmp_path)
    if made.parent:
        with pytest.raises(errors.Unsupported, match="keeps its state"):
            backend.flatten(made.name)
    backend.restore_state(made.name, OTHER)
    assert seen(backend, made, tmp_path) == before
    flat = backend.flatten(made.name)
    assert seen(backend, flat, tmp_path) == before
    backend.remove("image")
    assert seen(backend, flat, tmp_path) == before


# The layout


def test_one_layout_is_written(backend: base.Backend) -> None:
    """Of several that make the backend at once."""
    pool = backend.volumes.pool
    for name in pool.names():
        pool.delete(name)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: backend.layout.ensure(), range(4)))
    found = backend.layout.read()
    assert (found.generation, found.body.version) == (1, layout.VERSION)
    assert backend.volumes.names() == []


@pytest.mark.parametrize("version", [layout.VERSION - 1, layout.VERSION + 1])
def test_another_layout_is_refused(backend: base.Backend, version: int) -> None:
    before = backend.layout.read()
    found = backend.layout.change(before, version=version)
    with pytest.raises(errors.LayoutRefused, match=backend.name):
        backend.ensure()
    assert backend.layout.read() == found
    backend.layout.change(found, version=layout.VERSION)
    backend.ensure()


# Records


def test_a_record_is_swapped_by_one(backend: base.Backend) -> None:
    backend.volumes.publish("vol", volume(backend, "vol"))
    start = threading.Barrier(4, timeout=20)

    def publish(number: int) -> bool:
        start.wait()
        body = volume(backend, "vol", size=number)
        with contextlib.suppress(errors.RecordConflict):
            backend.volumes.publish("vol", body, after=1)
            return True
        return False

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        won = list(threads.map(publish, range(4)))
    assert won.count(True) == 1
    assert backend.volumes.read("vol").body.size == won.index(True)


def test_a_torn_record_leaves_the_older(backend: base.Backend) -> None:
    backend.volumes.publish("vol", volume(backend, "vol"))
    pool = backend.volumes.pool
    pool.create_raw("vol.rec.2", 4096)
    pool.write("vol.rec.2", b"virtmigrate-record 1 2")
    assert backend.volumes.read("vol").generation == 1
    backend.volumes.publish("vol", volume(backend, "vol", size=7), after=1)
    assert backend.volumes.read("vol").body.size == 7


def test_a_manifest_is_believed_when_it_is_proven(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path)
    kept = backend.manifest(found.name)
    assert kept is not None and kept.root() == told(content()).root()
    backend.update(msgspec.structs.replace(found, proof=Proof.SAMPLED))
    assert backend.manifest(found.name) is None
    other = told(content(2)).digest()
    backend.update(msgspec.structs.replace(found, digest=other))
    assert backend.manifest(found.name) is None


def test_records_last_longer_than_a_connection(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path)
    backend.close()
    backend.host.close()
    assert backend.volumes.read(found.name).body == found
    assert read(backend, found).root() == told(content()).root()


# Keeping a state


def test_a_state_is_kept_or_refused(backend: base.Backend, tmp_path: Path) -> None:
    found = settled(backend, tmp_path)
    if not backend.capabilities.snapshots:
        for call in (backend.keep_state, backend.restore_state, backend.drop_state):
            with pytest.raises(errors.Unsupported, match=backend.name):
                call(found.name, OPERATION)
        return
    for _ in range(2):
        backend.keep_state(found.name, OPERATION)
    grow_if_it_can(backend, found.name)
    fill(backend, found.name, content(2), tmp_path)
    for _ in range(2):
        backend.restore_state(found.name, OPERATION)
        assert read(backend, found).root() == told(content()).root()
    # Nothing is kept any more: what is written now stays.
    fill(backend, found.name, content(3), tmp_path)
    written = read(backend, found).root()
    assert written != told(content()).root()
    backend.restore_state(found.name, OPERATION)
    assert read(backend, found).root() == written


def grow_if_it_can(backend: base.Backend, name: str) -> None:
    """A volume whose state is kept; or it is refused, and stays as it is."""
    try:
        backend.grow(name, 2 * SIZE)
    except errors.Unsupported:
        assert backend.disks.physical(name) == SIZE
    else:
        assert backend.disks.physical(name) == 2 * SIZE


def test_a_volume_goes_with_its_states(backend: base.Backend, tmp_path: Path) -> None:
    found = settled(backend, tmp_path)
    if not backend.capabilities.snapshots:
        return  # refused, see above
    backend.keep_state(found.name, OPERATION)
    backend.remove(found.name)
    assert backend.drain(timeout=60)
    # One of the same name has no state that it could become.
    found = settled(backend, tmp_path, data=content(2))
    backend.restore_state(found.name, OPERATION)
    assert read(backend, found).root() == told(content(2)).root()


def test_a_state_is_dropped(backend: base.Backend, tmp_path: Path) -> None:
    found = settled(backend, tmp_path)
    if not backend.capabilities.snapshots:
        with pytest.raises(errors.Unsupported, match=backend.name):
            backend.drop_state(found.name, OPERATION)
        return
    backend.keep_state(found.name, OPERATION)
    backend.keep_state(found.name, OTHER)
    for _ in range(2):
        backend.drop_state(found.name, OPERATION)
    fill(backend, found.name, content(2), tmp_path)
    backend.restore_state(found.name, OPERATION)
    assert read(backend, found).root() != told(content()).root()
    backend.restore_state(found.name, OTHER)
    assert read(backend, found).root() == told(content()).root()
    backend.drop_state("nothing", OPERATION)


def test_a_layer_is_put_over_it_or_refused(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path)
    top = volume(backend, "top.x", format=DiskFormat.QCOW2, backing=found.name)
    top = msgspec.structs.replace(top, pool=found.pool)
    if not backend.capabilities.overlays:
        with pytest.raises(errors.Unsupported, match=backend.name):
            backend.overlay(top, found)
        assert backend.volumes.find("top.x") is None
        return
    backend.overlay(top, found)
    assert [each.fmt for each in backend.layers("top.x")] == [
        DiskFormat.QCOW2,
        DiskFormat.RAW,
    ]


# What earlier moves left


def test_what_is_retired_becomes_incoming(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path, name="vda.old", state=VolumeState.RETIRED)
    assert [each.name for each in backend.retired(OWNER)] == ["vda.old"]
    aside, name = f"vda-r1.{OPERATION}", f"vda.{OPERATION}"
    if not is_near(backend):
        with pytest.raises(errors.Unsupported, match=backend.name):
            backend.set_aside(found, aside, name, 2 * SIZE)
        with pytest.raises(errors.Unsupported, match=backend.name):
            backend.switch(aside, name)
        assert read(backend, found).root() == told(content()).root()
        return
    set_aside = backend.set_aside(found, aside, name, 2 * SIZE)
    assert set_aside is terms.Reuse.MOVED
    # Who was killed then finds it, and knows nothing of its bytes.
    again = backend.set_aside(found, aside, name, 2 * SIZE)
    assert again is terms.Reuse.UNPROVEN
    backend.switch(aside, name)
    again = backend.set_aside(found, aside, name, 2 * SIZE)
    assert again is terms.Reuse.SWITCHED
    backend.remove(found.name)
    assert arrived(backend, name).root() == told(content() + bytes(SIZE)).root()
    backend.incoming.delete(name)
    assert backend.set_aside(found, aside, name, SIZE) is terms.Reuse.GONE


def test_what_the_source_made_is_not_replaced(
    backend: base.Backend, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path, name="vda.old", state=VolumeState.RETIRED)
    aside, name = f"vda-r1.{OPERATION}", f"vda.{OPERATION}"
    if not is_near(backend):
        return  # refused, see above
    backend.set_aside(found, aside, name, SIZE)
    backend.incoming.create_raw(name, SIZE)
    with pytest.raises(errors.VolumeExists):
        backend.switch(aside, name)
    assert arrived(backend, name).root() == manifest.Manifest(SIZE).root()


def test_the_oldest_goes_first(backend: base.Backend, tmp_path: Path) -> None:
    for number, owner in enumerate((OWNER, "b", "c")):
        name = f"vda.{number}"
        settled(backend, tmp_path, name=name, owner=owner, state=VolumeState.RETIRED)
    asked: list[int] = []

    def enough(freed: int) -> bool:
        asked.append(freed)
        return len(asked) > 2

    assert backend.reclaim(enough, last=OWNER) > 0
    assert [each.name for each in backend.retired()] == ["vda.0"]


def test_an_image_is_held(backend: base.Backend, tmp_path: Path) -> None:
    found = settled(backend, tmp_path, name="image", role=Role.IMAGE)
    assert found.digest is not None
    wanted = keeping.Image(found.digest.root, found.format, found.size)
    hold = Hold(operation=OPERATION, until=2**40)
    assert backend.images.hold(wanted, hold) == "image"
    assert backend.volumes.read("image").body.holds == (hold,)
    assert backend.images.release(OPERATION) == 1
    assert backend.volumes.read("image").body.holds == ()


# Storage


def test_room_is_counted(backend: base.Backend) -> None:
    room = backend.disks.room()
    assert 0 < room.free <= room.capacity
    # A file system may still be giving back what was deleted.
    counted = backend.room() + backend.settings.reserved
    assert room.free <= counted <= backend.disks.room().free
    assert backend.storage() == backend.storage() != ""


def test_libvirt_sees_what_we_make(backend: base.Backend, alpha: places.Where) -> None:
    """Peers prove by it that they have the same storage, and make volumes."""
    name = f"virtmigrate-{backend.name}-incoming"
    if backend.incoming.name != name:
        name = backend.incoming.name
    conn = libvirt.open(alpha.uri)
    try:
        pool = conn.storagePoolLookupByName(name)
        with backend.incoming.nonce() as nonce:
            pool.refresh(0)
            assert nonce in {each.name() for each in pool.listAllVolumes(0)}
        text = "<volume><name>theirs</name><capacity>1048576</capacity></volume>"
        pool.createXML(text, 0)
        size = round_up(MiB, backend.granularity())
        assert backend.incoming.physical("theirs") == size
        pool.storageVolLookupByName("theirs").delete(0)
        assert "theirs" not in backend.incoming.names()
    finally:
        conn.close()
