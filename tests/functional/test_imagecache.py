# SPDX-License-Identifier: Apache-2.0
"""The image cache, on each kind of backend: fetched once, never missing, dropped."""

import contextlib
import copy
import dataclasses
import errno
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest
from lxml import etree

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.sides import Side
from virtmigrate import (
    conf,
    consistency,
    door,
    errors,
    filling,
    imagecache,
    manifest,
    model,
    node,
    reading,
    record,
    slots,
    sources,
    staging,
    storagepool,
    stream,
    xml,
)
from virtmigrate.backends import keeping, terms
from virtmigrate.model import Role, VolumeState
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

SIZE = 6 * MiB
LEASE = 1.5
KINDS = ["dir-xfs", "shared_dir", "rbd"]
OPERATION = "0123456789abcdef"


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("image-alpha")
    box.remove_host("image-alpha")


class Counted:
    """A source that counts how often it is read, and can be slow or fail.

    Arguments:
        path: the file.
        delay: seconds before the first byte.
    """

    def __init__(self, path: Path, delay: float = 0, error: Exception | None = None):
        self._source = sources.LocalFile(path, "raw")
        self._delay = delay
        self._error = error
        self.origin = self._source.origin
        self.reads = 0
        self.begun = threading.Event()

    def described(self) -> sources.Described:
        return self._source.described()

    def read(self, write: Any, check: Any, start: int = 0) -> None:
        self.reads += 1
        self.begun.set()
        until = time.monotonic() + self._delay
        while time.monotonic() < until:
            check()
            time.sleep(0.05)
        if self._error is not None:
            raise self._error
        self._source.read(write, check, start)


class Place:
    """One host with a backend of a kind, and its cache."""

    def __init__(
        self, on: sandbox.Host, tmp: Path, values: dict[str, Any], kind: str
    ) -> None:
        self.side = Side(
            on,
            tmp / "side",
            values,
            "b" + uuid.uuid4().hex[:8],
            image_lease=LEASE,
        )
        self.here = self.side.driver.node
        self.backend = self.here.backends[self.side.name]
        self.cache = self.side.driver.images.of(self.backend)
        self.image = tmp / "image.raw"
        self.image.write_bytes(content())
        self.tmp = tmp

    def fresh(self) -> imagecache.ImageCache:
        """The cache as another process of the host has it."""
        return imagecache.Caches(self.here).of(self.backend)

    def source(self, delay: float = 0, error: Exception | None = None) -> Counted:
        return Counted(self.image, delay, error)

    def volume(self, image: model.Volume, size: int = 0) -> model.Volume:
        operation = uuid.uuid4().hex[:16]
        name = f"vda.{operation}"
        return model.Volume(
            name=name,
            pool=self.backend.incoming.name,
            path=self.backend.incoming.volume_path(name),
            format=image.format,
            role=Role.ROOT,
            size=size or image.size,
            state=VolumeState.INCOMPLETE,
            owner=str(uuid.uuid4()),
            operation=operation,
            origin=self.here.name,
        )

    def clone(self, source: Any = None) -> model.Volume:
        with stream.Mover() as mover:
            return self.cache.clone(source or self.source(), self.volume, mover)

    def root(self, volume: model.Volume) -> str:
        with stream.Mover() as mover:
            return mover.survey(self.backend.source(volume, volume.size)).root()

    def images(self) -> list[str]:
        """Volumes that are called as images are, wherever they lie."""
        pools = {p.name: p for p in (self.backend.disks, self.backend.incoming)}
        names = {name for pool in pools.values() for name in pool.names()}
        return sorted(name for name in names if name.startswith("image-"))

    def clear(self) -> None:
        """Remove all, for what is shared with the next test."""
        for stored in [*self.backend.catalog.all()]:
            if stored.body.role is not Role.IMAGE:
                self.backend.remove(stored.name)
        for cached in self.cache.shelf.all():
            if cached.origin.pinned:
                self.cache.pin(cached, pinned=False)
            self.backend.images.release(OPERATION)
            with contextlib.suppress(errors.ImageGone, errors.ImageInUse):
                self.cache.remove(cached)

    def expect_nothing(self) -> None:
        assert self.images() == [] and self.backend.volumes.names() == []
        staged = staging.directory(self.here)
        assert not staged.exists() or not list(staged.iterdir())


@pytest.fixture(params=KINDS)
def place(
    request: pytest.FixtureRequest,
    alpha: sandbox.Host,
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        make = places.PLACES[request.param](alpha, "images", tmp_path / "x", cluster)
        made = Place(alpha, tmp_path, stack.enter_context(make), request.param)
        stack.callback(made.side.close)
        stack.callback(made.clear)
        yield made


def content(seed: bytes = b"image") -> bytes:
    """Data, a hole, and data at the end."""
    data = hashlib.shake_128(seed).digest(MiB)
    return data + bytes(SIZE - 2 * MiB) + data


def told(data: bytes) -> str:
    found = manifest.Manifest(len(data))
    for index in range(found.count):
        start, end = found.span(index)
        found[index] = manifest.digest_of(data[start:end])
    return found.root()


def other(place: Place) -> Path:
    """Another image."""
    path = place.tmp / "other.raw"
    path.write_bytes(content(b"other"))
    return path


@contextlib.contextmanager
def full_staging(place: Place) -> Iterator[None]:
    """Have a disk for staging that is too small for any image."""
    staged = staging.directory(place.here)
    staged.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(staged)]
    subprocess.run(mount, check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", str(staged)], check=True, timeout=30)


# Fetched once


def test_fetched_once_and_recorded(place: Place) -> None:
    source = place.source()
    image = place.cache.obtain(source)
    again = place.cache.obtain(source)
    assert (again, source.reads) == (image, 1)
    assert place.root(image) == told(content())
    assert image.digest is not None and image.digest.root == told(content())
    kept = place.backend.manifest(image.name)
    assert kept is not None and kept.root() == image.digest.root
    assert (image.state, image.role) == (VolumeState.USABLE, Role.IMAGE)
    assert (image.owner, image.durable, image.backing) == ("", True, None)
    origin = image.image
    assert origin is not None
    assert (origin.format, origin.rules) == ("raw", door.RULES)
    assert (origin.source, origin.pinned) == (source.origin, False)
    figures = place.cache.counters
    assert (figures.hits, figures.misses, figures.fetched) == (1, 1, SIZE)
    assert not list(staging.directory(place.here).iterdir())
    assert place.fresh().obtain(place.source()) == image


def test_an_image_of_qcow2_becomes_raw(place: Place) -> None:
    path = place.tmp / "image.qcow2"
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c"]
    subprocess.run([*argv, str(place.image), str(path)], check=True, timeout=30)
    image = place.cache.obtain(sources.LocalFile(path, "qcow2"))
    assert (image.format.value, image.size) == ("raw", SIZE)
    assert place.root(image) == told(content())


def test_another_content_is_another_image(place: Place) -> None:
    image = place.cache.obtain(place.source())
    place.image.write_bytes(content(b"other"))
    other = place.cache.obtain(place.source())
    assert other.name != image.name
    assert place.root(other) == told(content(b"other"))
    assert place.root(image) == told(content())


def test_a_source_that_changes_between(place: Place) -> None:
    """After its key was made, and before it was read."""
    source = place.source(delay=0.5)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(place.cache.obtain, source)
        assert source.begun.wait(30)
        place.image.write_bytes(content(b"other"))
        with pytest.raises(errors.SourceChanged):
            fetched.result(60)
    place.expect_nothing()


def test_many_at_once_fetch_once(place: Place) -> None:
    source = place.source(delay=1)
    caches = [place.fresh() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: caches[n % 4].obtain(source), range(8)))
    assert source.reads == 1 and len({image.name for image in found}) == 1
    assert place.images() == [found[0].name]
    assert sum(cache.counters.waits for cache in caches) == 7


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_one_who_does_not_advance_gives_signs_all_the_same(place: Place) -> None:
    """No byte comes for longer than a lease: nobody takes it over."""
    source = place.source(delay=3 * LEASE)
    with ThreadPoolExecutor(2) as pool:
        caches = [place.fresh(), place.fresh()]
        found = list(pool.map(lambda each: each.obtain(source), caches))
    assert source.reads == 1 and found[0] == found[1]


def test_a_refused_image_leaves_nothing(place: Place) -> None:
    with place.image.open("r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    with pytest.raises(errors.ImageRefused):
        place.cache.obtain(place.source())
    place.expect_nothing()
    place.image.write_bytes(content())
    assert place.root(place.cache.obtain(place.source())) == told(content())


def test_those_who_wait_hear_of_a_failure(place: Place) -> None:
    """And who comes later tries anew."""
    failing = place.source(delay=1, error=errors.ImageRefused(image="x", reason="y"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(place.cache.obtain, failing)
        assert failing.begun.wait(30)
        waiting = place.source()
        with pytest.raises(errors.ImageNotFetched, match="y"):
            place.fresh().obtain(waiting)
        with pytest.raises(errors.ImageRefused):
            first.result(60)
    assert waiting.reads == 0
    place.expect_nothing()
    place.cache.obtain(place.source())


def test_the_slot_of_a_failure_goes(place: Place) -> None:
    """After its age; that of an image that is there stays, and one that is fetched."""
    image = place.cache.obtain(place.source())
    refused = errors.ImageRefused(image="x", reason="")
    failing = Counted(other(place), error=refused)
    held = slots.Slots(place.backend.volumes.pool, 1)
    # What earlier tests left in a pool that is shared.
    held.sweep(place.backend.volumes.newest, 0)
    with pytest.raises(errors.ImageRefused):
        place.cache.obtain(failing)
    assert len(held.all()) == 2
    place.cache.prune()
    assert len(held.all()) == 2
    time.sleep(1.5)
    claim = held.claim("ab" * 16, "x", None, "h")
    assert claim is not None
    place.cache._lease = 1 / slots._PATIENCE
    place.cache.prune(dry_run=True)
    assert len(held.all()) == 3
    assert place.cache.prune() == []
    assert image.image is not None
    assert set(held.all()) == {image.image.key, claim.key}
    assert held.sweep(place.backend.volumes.newest, LEASE) == 0
    claim.fill("volume")
    held.forget(claim.key, "volume")


def test_a_slot_that_was_won_meanwhile_stays(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was old when the sweep looked, and somebody begins to fetch."""
    held = slots.Slots(place.backend.volumes.pool, 1)
    first = held.claim("ab" * 16, "x", None, "h")
    assert first is not None
    won: list[slots.Claim | None] = []

    def late(self: Any, stored: Any, lease: float) -> bool:
        is_ours: bool = stored.body.key == first.key
        if is_ours:
            won.append(held.claim(first.key, "x", stored, "other"))
        return is_ours

    monkeypatch.setattr(slots.Slots, "_is_old", late)
    held.sweep(lambda: (), LEASE)
    assert won[0] is not None
    won[0].fill("volume")
    held.forget(first.key, "volume")


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_who_waits_does_not_wait_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetcher lives and does not advance: the error says who it is."""
    source, hasty = place.source(delay=30), place.fresh()
    monkeypatch.setattr(hasty, "_patience", 2.0)
    progress = Progress()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(place.cache.obtain, source, progress)
        assert source.begun.wait(30)
        began = time.monotonic()
        with pytest.raises(errors.ImageStalled, match=place.here.name):
            hasty.obtain(place.source())
        assert 2 <= time.monotonic() - began < 20
        progress.cancel()
        with pytest.raises(errors.Cancelled):
            first.result(60)


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_the_staging_is_full(place: Place) -> None:
    """A source that does not tell its size, on a disk that is too small for it."""

    class Untold(Counted):
        def described(self) -> sources.Described:
            return dataclasses.replace(super().described(), size=None)

    with full_staging(place):
        with pytest.raises(errors.DiskFull, match="staging"):
            place.cache.obtain(Untold(place.image))
        place.expect_nothing()
    place.cache.obtain(Untold(place.image))


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_the_staging_cannot_be_made(place: Place) -> None:
    """The error says where, for a fetch and for a second look."""
    image = place.cache.obtain(place.source())
    (cached,) = place.cache.shelf.all()
    staged = staging.directory(place.here)
    staged.rmdir()
    staged.write_text("no directory")
    try:
        for attempt in (
            lambda: place.cache.check(cached, Progress()),
            lambda: place.cache.obtain(Counted(other(place))),
        ):
            with pytest.raises(errors.StorageError, match="image_staging_path"):
                attempt()
    finally:
        staged.unlink()
    assert place.images() == [image.name]


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_a_second_look_at_what_cannot_be_read_or_staged(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.cache.obtain(place.source())
    (cached,) = place.cache.shelf.all()
    with full_staging(place), pytest.raises(errors.DiskFull, match="staging"):
        place.cache.check(cached, Progress())

    def broken(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(reading.FileSource, "read", broken)
        with pytest.raises(errors.StorageError, match="cannot be read: Input"):
            place.cache.check(cached, Progress())
    assert place.cache.check(cached, Progress()) == ""


def test_cancelled(place: Place) -> None:
    progress, source = Progress(), place.source(delay=30)
    with ThreadPoolExecutor(1) as pool:
        fetching_ = pool.submit(place.cache.obtain, source, progress)
        assert source.begun.wait(30)
        progress.cancel()
        with pytest.raises(errors.Cancelled):
            fetching_.result(60)
    place.expect_nothing()


@pytest.mark.parametrize("when", ["filled", "settle"])
def test_one_who_was_too_slow_loses(
    place: Place, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It gives no sign of life; another one fetches; then it goes on."""
    go, slow = threading.Event(), place.fresh()
    real = getattr(filling.Filler, when)

    def late(self: filling.Filler, *args: Any) -> Any:
        if threading.current_thread().name.startswith("late"):
            with claims[0]._lock:
                assert go.wait(60)
        return real(self, *args)

    claims: list[slots.Claim] = []
    beating = slots.Claim.beating

    def noted(self: slots.Claim, *args: Any) -> Any:
        claims.append(self)
        return beating(self, *args)

    monkeypatch.setattr(slots.Claim, "beating", noted)
    monkeypatch.setattr(filling.Filler, when, late)
    with ThreadPoolExecutor(1, thread_name_prefix="late") as pool:
        source = place.source()
        first = pool.submit(slow.obtain, source)
        assert source.begun.wait(30)
        image = place.cache.obtain(place.source())
        assert place.images() == [image.name]
        go.set()
        assert first.result(60) == image
    assert place.images() == [image.name]
    assert place.backend.volumes.names() == [image.name]


@pytest.mark.parametrize("when", ["_download", "_brought", "settle", "fill"])
def test_killed_and_taken_over(place: Place, when: str) -> None:
    """By SIGKILL in the middle; nothing of it stays, and it is fetched again."""
    argv = [sys.executable, "-m", "tests.functional.killed_fetch", when]
    argv += [str(place.side.config), place.backend.name, str(place.image)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    staged = list(staging.directory(place.here).iterdir())
    assert len(staged) == 1
    image = place.cache.obtain(place.source())
    assert place.root(image) == told(content())
    place.cache.sweep()
    assert place.images() == [image.name]
    assert not list(staging.directory(place.here).iterdir())


def test_a_sign_of_life_that_was_written_all_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer was lost: it is no other one's."""
    claim = slots.Slots(place.backend.volumes.pool, 1).claim("ab" * 16, "x", None, "h")
    assert claim is not None
    real = record.Store.publish

    def cut(self: Any, *args: Any, **named: Any) -> Any:
        monkeypatch.undo()
        real(self, *args, **named)
        raise errors.HostTimeout(host="h", doing="writing", seconds=1)

    monkeypatch.setattr(record.Store, "publish", cut)
    claim._publish(done=1)
    monkeypatch.setattr(record.Store, "publish", cut)
    claim.fill("volume")
    claim.demand()
    found = place.cache._slots.find("ab" * 16)
    assert found is not None and (found.body.done, found.body.volume) == (1, "volume")
    place.cache._slots.forget("ab" * 16, "volume")


def test_one_who_gave_a_sign_meanwhile_is_not_over(place: Place) -> None:
    """The sign that was looked at is gone when it is asked how old it is."""
    held = slots.Slots(place.backend.volumes.pool, 1)
    claim = held.claim("ab" * 16, "x", None, "h")
    assert claim is not None
    before = held.find(claim.key)
    image = place.cache.obtain(place.source())
    made = msgspec.structs.replace(image, operation=claim.operation)
    for done in range(1, 4):
        claim._publish(done=done)
    assert not held.is_over(before, made, LEASE)
    claim.fill("volume")
    held.forget(claim.key, "volume")


def test_what_became_usable_is_not_cleared(place: Place) -> None:
    """It was incomplete when the sweep looked."""
    image = place.cache.obtain(place.source())
    now = place.backend.volumes.read(image.name)
    before = record.Stored(
        now.name,
        now.generation - 1,
        msgspec.structs.replace(now.body, state=VolumeState.INCOMPLETE),
    )
    assert not place.cache.shelf.clear(before)
    assert place.root(image) == told(content())


def test_what_is_being_fetched_is_not_swept(place: Place) -> None:
    source = place.source(delay=2 * LEASE)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(place.cache.obtain, source)
        assert source.begun.wait(30)
        other = place.fresh()
        while not fetched.done():
            other.sweep()
            time.sleep(0.2)
        assert place.root(fetched.result()) == told(content())


# An answer that was lost


@pytest.mark.parametrize("is_away", [False, True], ids=["back", "away"])
def test_a_volume_whose_maker_did_not_hear_of_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, is_away: bool
) -> None:
    """It goes, and where that cannot be done its record stays, and knows of it."""
    made = place.volume(place.cache.obtain(place.source()))
    pool = type(place.backend.incoming)
    create, delete = pool.create_raw, pool.delete

    def late(self: Any, name: str, *args: Any) -> None:
        create(self, name, *args)
        if name == made.name:
            raise errors.HostTimeout(host="h", doing="making", seconds=1)

    def away(self: Any, name: str) -> None:
        if is_away and name == made.name:
            raise errors.HostTimeout(host="h", doing="deleting", seconds=1)
        delete(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "create_raw", late)
        patch.setattr(pool, "delete", away)
        with pytest.raises(errors.HostTimeout, match="making"):
            place.backend.allocate(made)
    left = place.backend.volumes.find(made.name)
    assert place.backend.incoming.has(made.name) == is_away == (left is not None)
    place.backend.remove(made.name)
    assert not place.backend.incoming.has(made.name)


# Fetched before they are needed


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_seeding_is_held_back(place: Place) -> None:
    place.side.configure(image_seed_bandwidth_mib=4)
    caches, shown = place.side.driver.images, []
    began = time.monotonic()
    told = Progress(lambda report: shown.append(report.phase), interval=0)
    assert caches.seed(place.source(), lambda: told)
    # Once for each of two backends; a limiter lets nothing go before its time.
    assert time.monotonic() - began > 2 * SIZE / (4 * MiB) - 0.2
    assert {"waiting for the turn", "fetching", "filling"} <= set(shown)
    assert not caches.seed(place.source())
    for cache in caches.up():
        for cached in cache.shelf.all():
            cache.remove(cached)


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_seeds_take_turns(place: Place) -> None:
    """And what an instance needs does not wait for them."""
    place.side.configure(image_seed_max=1, queue_timeout=1)
    caches, first = place.side.driver.images, place.source(delay=30)
    progress, there = Progress(), Counted(other(place))
    with ThreadPoolExecutor(1) as pool:
        seeding = pool.submit(caches.seed, first, lambda: progress)
        assert first.begun.wait(30)
        with pytest.raises(errors.HostBusy, match="image-seed"):
            caches.seed(there)
        place.cache.obtain(there)
        progress.cancel()
        with pytest.raises(errors.Cancelled):
            seeding.result(60)
    # What is there needs no turn.
    assert there.reads == 1


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_a_volume_whose_host_hung(
    place: Place, alpha: sandbox.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt goes on with what it was asked for when it wakes up."""
    place.side.configure(call_timeout=3)
    backend = place.side.driver.node.backend(place.backend.name)
    made = place.volume(place.cache.obtain(place.source()))
    create = storagepool.Pool.create_raw

    def hanging(self: Any, name: str, size: int) -> None:
        if name != made.name:
            create(self, name, size)
            return
        alpha.freeze()
        try:
            create(self, name, size)
        finally:
            alpha.thaw()

    monkeypatch.setattr(storagepool.Pool, "create_raw", hanging)
    with pytest.raises(errors.HostTimeout):
        backend.allocate(made)
    time.sleep(1)
    left = backend.volumes.find(made.name)
    assert left is not None or not backend.incoming.has(made.name)
    backend.remove(made.name)


# Counted on


def test_clones_refer_to_their_image(place: Place) -> None:
    first, second = place.clone(), place.clone()
    (cached,) = place.cache.shelf.all()
    names = tuple(sorted((first.name, second.name)))
    assert tuple(sorted(cached.references)) == names or not cached.references
    if cached.references:
        with pytest.raises(errors.ImageInUse, match="vda"):
            place.cache.remove(cached)
        assert place.backend.volumes.find(cached.volume.name) is not None
    for volume in (first, second):
        place.backend.remove(volume.name)
    (cached,) = place.cache.shelf.all()
    assert cached.is_idle
    place.cache.remove(cached)
    place.expect_nothing()


def test_a_clone_and_a_removal_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal looked before the clone was recorded: it gives way."""
    place.cache.obtain(place.source())
    (cached,) = place.cache.shelf.all()
    real = type(place.backend.images).doom
    made: list[model.Volume] = []

    def late(self: Any, seen: Any) -> bool:
        if not made:
            made.append(place.clone())
        return real(self, seen)

    monkeypatch.setattr(type(place.backend.images), "doom", late)
    with pytest.raises(errors.ImageInUse):
        place.cache.remove(cached)
    assert place.backend.volumes.read(cached.volume.name)
    assert made[0].size == SIZE


def test_a_removal_before_the_clone_counts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clone found the image, and it is gone: it is fetched again."""
    place.cache.obtain(place.source())
    (cached,) = place.cache.shelf.all()
    real = type(place.backend.images).count_on
    gone: list[bool] = []

    def late(self: Any, name: str) -> None:
        if not gone:
            gone.append(place.fresh().shelf._doom(place.backend.volumes.read(name)))
        real(self, name)

    monkeypatch.setattr(type(place.backend.images), "count_on", late)
    source = place.source()
    made = place.clone(source)
    assert gone == [True]
    place.cache.sweep()
    (now,) = place.cache.shelf.all()
    assert (source.reads, now.volume.name != cached.volume.name) == (1, True)
    names = {now.volume.name, made.name}
    assert set(place.backend.volumes.names()) == names


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_a_removal_in_the_making(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It won the generation, and has not said what it is: the clone waits for that."""
    image = place.cache.obtain(place.source())
    stored = place.backend.volumes.read(image.name)
    begun, go = threading.Event(), threading.Event()
    write, create = storagepool.Pool.write, storagepool.Pool.create_raw
    generation = f"{image.name}.rec.{stored.generation + 1}"

    with ThreadPoolExecutor(1, thread_name_prefix="doom") as dooming:

        def late_write(
            self: storagepool.Pool, name: str, *args: Any, **named: Any
        ) -> None:
            if name == generation:
                begun.set()
                assert go.wait(60)
            write(self, name, *args, **named)

        def late_create(self: storagepool.Pool, name: str, size: int) -> None:
            is_doom = threading.current_thread().name.startswith("doom")
            if name == generation and not is_doom and not begun.is_set():
                dooming.submit(place.backend.images.doom, stored)
                assert begun.wait(30)
                threading.Timer(0.5, go.set).start()
            create(self, name, size)

        monkeypatch.setattr(storagepool.Pool, "write", late_write)
        monkeypatch.setattr(storagepool.Pool, "create_raw", late_create)
        with pytest.raises(errors.ImageGone):
            place.backend.images.count_on(image.name)
    assert begun.is_set()


def test_killed_while_it_drops(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.cache.obtain(place.source())
    (cached,) = place.cache.shelf.all()

    def die(name: str) -> None:
        raise errors.StorageError(host="x", pool="x", reason="killed")

    with monkeypatch.context() as patch:
        patch.setattr(place.backend, "remove", die)
        with pytest.raises(errors.StorageError):
            place.cache.remove(cached)
    assert place.cache.shelf.all() == []
    place.cache.sweep()
    place.expect_nothing()
    place.cache.obtain(place.source())


# The index


@pytest.fixture
def elsewhere(place: Place) -> Iterator[Place]:
    """The same place as another process has it."""
    here = node.Node(conf.load(place.side.config))
    made = copy.copy(place)
    made.here = here
    made.backend = here.backends[place.backend.name]
    made.cache = imagecache.Caches(here).of(made.backend)
    yield made
    here.close()


@pytest.fixture
def listed(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of pools of records whose volumes were listed."""
    found: list[str] = []
    kind = type(place.backend.volumes.pool)
    real = kind.names

    def names(self: Any) -> list[str]:
        found.append(self.name)
        return real(self)

    monkeypatch.setattr(kind, "names", names)
    return found


def test_a_look_up_lists_nothing(place: Place, listed: list[str]) -> None:
    image = place.cache.obtain(place.source())
    place.cache.obtain(place.source())
    del listed[:]
    assert place.cache.obtain(place.source()) == image
    assert listed == []


def test_a_look_up_is_what_stands_there_now(place: Place, elsewhere: Place) -> None:
    """Another process pinned it, dropped it, and fetched it again."""
    image = place.cache.obtain(place.source())
    (cached,) = elsewhere.cache.shelf.all()
    elsewhere.cache.pin(cached, pinned=True)
    found = place.cache.obtain(place.source())
    assert found.image is not None and found.image.pinned
    elsewhere.cache.pin(cached, pinned=False)
    elsewhere.cache.remove(cached)
    with pytest.raises(errors.ImageGone):
        place.cache.shelf.is_used(image.name)
    again = elsewhere.cache.obtain(place.source())
    assert place.cache.obtain(place.source()) == again != image


def test_what_is_used_is_what_records_say_now(place: Place, elsewhere: Place) -> None:
    image = place.cache.obtain(place.source())
    assert not place.cache.shelf.is_used(image.name)
    hold = model.Hold(operation=OPERATION, until=time.time() + 600)
    assert image.digest is not None
    wanted = keeping.Image(image.digest.root, image.format, image.size)
    elsewhere.backend.images.hold(wanted, hold)
    assert place.cache.shelf.is_used(image.name)
    elsewhere.backend.images.release(OPERATION)
    assert not place.cache.shelf.is_used(image.name)
    made = msgspec.structs.replace(place.volume(image), parent=image.name)
    elsewhere.backend.update(made)
    assert place.cache.shelf.is_used(image.name)
    elsewhere.backend.remove(made.name)
    assert not place.cache.shelf.is_used(image.name)


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_what_is_used_lists_nothing(
    place: Place, elsewhere: Place, listed: list[str]
) -> None:
    """A volume that stands on it is named by the index, and its record is read."""
    image = place.cache.obtain(place.source())
    made = msgspec.structs.replace(place.volume(image), parent=image.name)
    elsewhere.backend.update(made)
    assert place.cache.shelf.is_used(image.name)
    del listed[:]
    assert place.cache.shelf.is_used(image.name) and listed == []
    elsewhere.backend.remove(made.name)
    time.sleep(2.5)
    assert not place.cache.shelf.is_used(image.name)
    del listed[:]
    assert not place.cache.shelf.is_used(image.name) and listed == []


def test_an_index_drops_nothing(place: Place, elsewhere: Place) -> None:
    """What it does not know of is seen before an image goes."""
    image = place.cache.obtain(place.source())
    assert not place.cache.shelf.is_used(image.name)
    (cached,) = place.cache.shelf.all()
    made = msgspec.structs.replace(place.volume(image), parent=image.name)
    elsewhere.backend.update(made)
    place.backend.images.change_origin(image.name, used=1.0)
    limited(place, age=1)
    assert place.cache.shelf.drop([cached]) == place.cache.prune() == []
    elsewhere.backend.remove(made.name)
    assert [each.volume.name for each in place.cache.prune()] == [image.name]


@pytest.mark.parametrize("look", ["sweep", "leftovers"])
def test_a_slot_in_its_second_life(place: Place, elsewhere: Place, look: str) -> None:
    """It has as many generations as the one that was remembered."""
    key = slots.key_of(place.source().origin, place.source().described())
    held = place.cache._slots
    first = held.claim(key, "x", None, "h")
    assert first is not None
    first.fill("gone")
    assert key in held.all()
    elsewhere.cache._slots.forget(key, "gone")
    elsewhere.cache._lease = 60.0  # no sign of life, which would be one generation more
    image = elsewhere.cache.obtain(place.source())
    time.sleep(0.1)
    if look == "sweep":
        assert held.sweep(lambda: {image.name}, 0.001) == 0
    else:
        assert place.cache.shelf.leftovers() == []
    assert place.cache.obtain(place.source()) == image


# Limits


def images(place: Place, count: int) -> list[model.Volume]:
    """Several images, the first one used least recently."""
    found = []
    for number in range(count):
        path = place.tmp / f"image-{number}.raw"
        path.write_bytes(content(str(number).encode()))
        found.append(place.cache.obtain(sources.LocalFile(path, "raw")))
    return found


def limited(place: Place, **limits: int) -> None:
    place.backend.settings = dataclasses.replace(
        place.backend.settings, images=terms.ImageLimits(**limits)
    )


def test_the_least_recently_used_goes_first(place: Place) -> None:
    first, second, third = images(place, 3)
    place.backend.images.count_on(first.name)
    limited(place, count=2)
    assert [each.volume.name for each in place.cache.prune(dry_run=True)] == [
        second.name
    ]
    assert len(place.cache.shelf.all()) == 3
    place.cache.prune()
    assert place.images() == sorted([first.name, third.name])


@pytest.mark.parametrize("limits", [{"bytes": 1}, {"age": 1}, {"free": 2**60}])
def test_limits(place: Place, limits: dict[str, int]) -> None:
    (image,) = images(place, 1)
    assert place.cache.prune() == []
    place.backend.images.change_origin(image.name, used=time.time() - 5)
    limited(place, **limits)
    assert [each.volume.name for each in place.cache.prune()] == [image.name]
    place.expect_nothing()


def test_what_is_pinned_held_or_used_stays(place: Place) -> None:
    pinned, held, used = images(place, 3)
    by_name = {each.volume.name: each for each in place.cache.shelf.all()}
    place.cache.pin(by_name[pinned.name], pinned=True)
    hold = model.Hold(operation=OPERATION, until=time.time() + 600)
    assert held.digest is not None
    wanted = keeping.Image(held.digest.root, held.format, held.size)
    assert place.backend.images.hold(wanted, hold) == held.name
    place.clone(sources.LocalFile(place.tmp / "image-2.raw", "raw"))
    limited(place, count=1, bytes=1)
    stays = {pinned.name, held.name}
    if place.backend.volumes.find(used.name) and by_name:
        stays |= {c.volume.name for c in place.cache.shelf.all() if c.references}
    place.cache.prune()
    assert set(place.images()) == stays


def test_a_record_that_cannot_be_read_keeps_all(place: Place) -> None:
    """It may be of a disk that stands on an image."""
    images(place, 1)
    pool = place.backend.volumes.pool
    pool.create_raw("vda.x.rec.1", 4096)
    pool.write("vda.x.rec.1", b"x" * 4096)
    limited(place, count=1, bytes=1)
    with pytest.raises(errors.RecordBroken, match=r"vda\.x"):
        place.cache.prune()
    pool.delete("vda.x.rec.1")
    assert len(place.cache.prune()) == 1


def test_check_reads_it_again(place: Place) -> None:
    (image,) = images(place, 1)
    place.backend.images.change_origin(image.name, rules=0, checked=0.0)
    (cached,) = place.cache.shelf.all()
    assert place.cache.check(cached, Progress()) == ""
    (cached,) = place.cache.shelf.all()
    assert (cached.origin.rules, cached.origin.checked > 0) == (door.RULES, True)
    assert image.digest is not None
    wrong = msgspec.structs.replace(
        cached.volume, digest=msgspec.structs.replace(image.digest, root="00" * 32)
    )
    place.backend.update(wrong)
    (cached,) = place.cache.shelf.all()
    assert "bytes" in place.cache.check(cached, Progress())
    place.backend.update(msgspec.structs.replace(wrong, digest=image.digest))


# Whole instances


def instance(place: Place, source_path: Path, image_id: str = "one") -> Any:
    made = types.SimpleNamespace(
        uuid=str(uuid.uuid4()),
        name=f"guest-{uuid.uuid4().hex[:6]}",
        flavor=types.SimpleNamespace(
            memory_mb=64,
            vcpus=1,
            root_gb=0,
            ephemeral_gb=0,
            extra_specs={"virtmigrate:backend": place.backend.name},
        ),
    )
    meta = {"id": image_id, "path": str(source_path), "disk_format": "raw"}
    place.side.driver.spawn(None, made, meta)
    return made


def test_instances_stand_on_one_image(place: Place) -> None:
    first, second = (instance(place, place.image) for _ in range(2))
    (cached,) = place.cache.shelf.all()
    assert place.cache.counters.misses == 1
    for each in (first, second):
        assert place.side.state_of(each) == "running"
        assert place.side.root(each) == told(content())
    limited(place, count=0, age=1)
    place.side.driver.destroy(None, first, None)
    place.side.driver.manage_image_cache(None)
    assert place.side.root(second) == told(content())
    place.side.driver.destroy(None, second, None)
    place.backend.images.change_origin(cached.volume.name, used=1.0)
    place.side.driver.manage_image_cache(None)
    place.expect_nothing()


def test_a_spawn_that_fails_leaves_its_image(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise errors.HostError(host="x", reason="injected")

    monkeypatch.setattr(type(place.here.domains), "define", fail)
    with pytest.raises(errors.HostError):
        instance(place, place.image)
    (cached,) = place.cache.shelf.all()
    assert cached.is_idle
    assert place.backend.volumes.names() == [cached.volume.name]


def test_what_libvirt_says_of_an_image_is_not_believed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats, backing files and sizes in libvirt's XML are found by probing."""
    real = libvirt.virStorageVol.XMLDesc

    def lie(self: Any, flags: int = 0) -> str:
        root = xml.parse(real(self, flags))
        for found in root.findall("target/format"):
            found.set("type", "vmdk")
        for found in root.findall("capacity"):
            found.text = str(2**62)
        target = root.find("target")
        assert target is not None
        store = etree.SubElement(root, "backingStore")
        etree.SubElement(store, "path").text = "/etc/passwd"
        return etree.tostring(root, encoding="unicode")

    monkeypatch.setattr(libvirt.virStorageVol, "XMLDesc", lie)
    made = instance(place, place.image)
    (cached,) = place.cache.shelf.all()
    assert (cached.volume.size, cached.volume.format.value) == (SIZE, "raw")
    assert place.side.root(made) == told(content())
    place.side.driver.destroy(None, made, None)
    assert [each.volume.name for each in place.cache.shelf.all()] == [
        cached.volume.name
    ]


# The command


def run(place: Place, *words: str, code: int = 0) -> Any:
    """Run a command of `virtmigrate image`; return what it says as JSON."""
    argv = [sys.executable, "-m", "virtmigrate.cli.main", "--config-file"]
    argv += [str(place.side.config), "image", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if "-f" in words else done.stderr


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_the_command(place: Place) -> None:
    name = place.backend.name
    added = run(place, "add", str(place.image), "--backend", name, "-f", "json")
    assert added["backend"] == name and added["volume"] in place.images()
    (row,) = run(place, "list", "-f", "json")
    key = row["key"]
    assert added["key"].startswith(key)
    assert (row["references"], row["kept"], row["size"]) == (0, "", SIZE)
    shown = run(place, "show", key, "-f", "json")
    assert (shown["source"], shown["pinned"]) == (str(place.image), False)
    run(place, "pin", key)
    assert run(place, "list", "-f", "json")[0]["kept"] == "pinned"
    assert "pinned" in run(place, "remove", key, code=1)
    run(place, "pin", key, "--off")
    made = place.clone()
    assert "vda" in run(place, "remove", key, code=1)
    assert run(place, "show", key, "-f", "json")["references"] == made.name
    assert run(place, "check", "-f", "json")[0]["found"] == "good"
    assert run(place, "prune", "-f", "json") == []
    place.backend.remove(made.name)
    run(place, "remove", key)
    place.expect_nothing()
    assert "has no image" in run(place, "show", key, code=1)


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_the_command_refuses_what_there_is_not(place: Place) -> None:
    place.cache.obtain(place.source())
    assert "has no image typo" in run(place, "check", "typo", code=1)
    assert "no backend typo" in run(place, "check", "--backend", "typo", code=1)
    assert "no backend typo" in run(place, "show", "a", "--backend", "typo", code=1)


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
@pytest.mark.parametrize("words", [("list",), ("check",), ("prune", "--dry-run")])
def test_a_backend_that_is_down(place: Place, words: tuple[str, ...]) -> None:
    """It is named; the others are listed all the same."""
    place.cache.obtain(place.source())
    argv = [sys.executable, "-m", "virtmigrate.cli.main", "--config-file"]
    argv += [str(place.side.config), "image", *words, "-f", "json"]
    with place.side.libvirt() as conn:
        pool = conn.storagePoolLookupByName("virtmigrate-files-records")
        pool.destroy()
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        finally:
            pool.create()
    assert done.returncode == 1
    assert "backend files is left out" in done.stderr
    rows = [] if words[0] == "prune" else [place.backend.name]
    assert [row["backend"] for row in json.loads(done.stdout)] == rows


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_leases_that_are_over_are_not_shown(place: Place) -> None:
    image = place.cache.obtain(place.source())
    now = time.time()
    over = model.Hold(operation="f" * 16, until=now - 1)
    hold = model.Hold(operation=OPERATION, until=now + 600)
    place.backend.update(msgspec.structs.replace(image, holds=(over, hold)))
    assert image.image is not None
    shown = run(place, "show", image.image.key, "-f", "json")
    assert shown["held by"] == OPERATION


def test_a_pin_that_loses_its_generation(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody made a disk of it at the same moment: it is pinned all the same."""
    image = place.cache.obtain(place.source())
    (cached,) = place.cache.shelf.all()
    real = keeping.Images._usable
    others: list[str] = []

    def late(self: keeping.Images, name: str) -> Any:
        found = real(self, name)
        if not others:
            others.append(name)
            self.count_on(name)
        return found

    monkeypatch.setattr(keeping.Images, "_usable", late)
    place.cache.pin(cached, pinned=True)
    (cached,) = place.cache.shelf.all()
    assert cached.origin.pinned and others == [image.name]


@pytest.mark.parametrize("place", ["dir-xfs"], indirect=True)
def test_storage_check_knows_of_images(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is being dropped, and was left, is found, and goes with a repair."""
    place.cache.obtain(place.source())
    assert consistency.check(place.here) == []
    (cached,) = place.cache.shelf.all()
    place.backend.images.doom(place.backend.volumes.read(cached.volume.name))
    (found,) = consistency.check(place.here)
    assert (found.name, found.kind) == (cached.volume.name, consistency.Kind.HALF_MADE)
    assert [said for _, said in consistency.repair([found])] == ["removed"]
    place.expect_nothing()
    assert consistency.check(place.here) == []
