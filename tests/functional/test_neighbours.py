# SPDX-License-Identifier: Apache-2.0
"""What a peer's cache has comes from there; whatever fails, from its source."""

import dataclasses
import hashlib
import subprocess
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional.sides import Kinds, Side, between
from tests.functional.test_imagecache import SIZE, Counted, content, told
from virtmigrate import (
    assistance,
    door,
    errors,
    imagecache,
    model,
    neighbours,
    reading,
    slots,
    sources,
)
from virtmigrate.progress import Progress


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("nb-alpha"), box.add_host("nb-beta")
    box.remove_host("nb-alpha")
    box.remove_host("nb-beta")


@pytest.fixture
def kinds(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    """The second one asks the first one."""
    pair = getattr(request, "param", ("dir-ext4", "dir-xfs"))
    with between(pair, hosts, tmp_path, cluster) as made:
        made.image.write_bytes(content())
        made.b.configure(image_peers=made.a.host.name)
        yield made
        # Others have the cluster's pool after us.
        for side in (made.a, made.b):
            backend = side.driver.node.backend(side.name)
            for each in cache(side).shelf.all():
                for operation in each.holders:
                    backend.images.release(operation)
                cache(side).remove(each)


class Known(Counted):
    """A source with a strong checksum, which makes one key on all hosts."""

    def __init__(self, path: Path, fmt: str = "raw") -> None:
        super().__init__(path)
        self._format = fmt
        self._hex = hashlib.sha256(path.read_bytes()).hexdigest()

    def described(self) -> sources.Described:
        found = super().described()
        checksum = sources.Checksum("sha256", self._hex)
        return dataclasses.replace(found, checksum=checksum, format=self._format)


def cache(side: Side) -> imagecache.ImageCache:
    return side.driver.images.of(side.driver.node.backend(side.name))


def root(side: Side, image: model.Volume) -> str:
    backend = side.driver.node.backend(side.name)
    with side.driver.node.mover() as mover:
        return mover.survey(backend.source(image, image.size)).root()


def expect_no_trace(side: Side) -> None:
    """Neither a lease nor a transfer of it is left at the peer."""
    for each in cache(side).shelf.all():
        assert not each.volume.holds
    assert set(side.driver.node.mailbox.transfers.names()) == {"host"}


def expect_from_its_source(kinds: Kinds, source: Counted) -> model.Volume:
    reads = source.reads
    image = cache(kinds.b).obtain(source)
    assert source.reads == reads + 1
    assert root(kinds.b, image) == told(content())
    backend = kinds.b.driver.node.backend(kinds.b.name)
    assert backend.volumes.names() == [image.name]
    return image


@pytest.mark.parametrize(
    "kinds",
    [("dir-ext4", "dir-xfs"), ("dir-xfs", "rbd")],
    ids="-".join,
    indirect=True,
)
def test_what_a_peer_has_comes_from_there(kinds: Kinds) -> None:
    source, shown = Known(kinds.image), []
    theirs = cache(kinds.a).obtain(source)
    told_of = Progress(lambda report: shown.append(report.phase), interval=0)
    image = cache(kinds.b).obtain(source, told_of)
    assert source.reads == 1 and f"copying from {kinds.a.host.name}" in shown
    assert root(kinds.b, image) == told(content())
    assert image.digest == theirs.digest
    assert image.image is not None and theirs.image is not None
    assert image.image.key == theirs.image.key
    assert image.image.checksum == theirs.image.checksum
    expect_no_trace(kinds.a)
    assert cache(kinds.b).obtain(source) == image


def test_what_was_converted_comes_raw(kinds: Kinds, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c"]
    subprocess.run([*argv, str(kinds.image), str(path)], check=True, timeout=30)
    source = Known(path, "qcow2")
    cache(kinds.a).obtain(source)
    image = cache(kinds.b).obtain(source)
    assert (source.reads, image.format.value, image.size) == (1, "raw", SIZE)
    assert root(kinds.b, image) == told(content())
    expect_no_trace(kinds.a)


@pytest.mark.parametrize("kinds", [("rbd", "dir-xfs")], ids="-".join, indirect=True)
def test_what_libvirt_cannot_read_there(kinds: Kinds) -> None:
    source = Known(kinds.image)
    cache(kinds.a).obtain(source)
    expect_from_its_source(kinds, source)
    expect_no_trace(kinds.a)


def test_without_a_digest_nobody_is_asked(kinds: Kinds) -> None:
    source = Counted(kinds.image)
    cache(kinds.a).obtain(source)
    expect_from_its_source(kinds, source)


def test_a_peer_that_has_nothing_or_is_away(kinds: Kinds) -> None:
    expect_from_its_source(kinds, Known(kinds.image))
    expect_no_trace(kinds.a)
    (cached,) = cache(kinds.b).shelf.all()
    cache(kinds.b).remove(cached)
    kinds.b.configure(image_peers=f"nowhere,{kinds.a.host.name}")
    source = Known(kinds.image)
    cache(kinds.a).obtain(source)
    cache(kinds.b).obtain(source)
    assert source.reads == 1


def test_a_peer_without_a_receiver(kinds: Kinds) -> None:
    source = Known(kinds.image)
    cache(kinds.a).obtain(source)
    kinds.a.configure(receiver=False)
    kinds.b.configure(receiver_timeout=1)
    expect_from_its_source(kinds, source)
    expect_no_trace(kinds.a)


def test_a_peer_of_another_release(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Known(kinds.image)
    cache(kinds.a).obtain(source)
    monkeypatch.setattr("virtmigrate.neighbours.__version__", "0.0.1")
    expect_from_its_source(kinds, source)


def test_an_image_that_passed_older_rules(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Known(kinds.image)
    cache(kinds.a).obtain(source)
    monkeypatch.setattr(door, "RULES", door.RULES + 1)
    expect_from_its_source(kinds, source)


def test_bytes_that_are_not_those_of_the_record(kinds: Kinds) -> None:
    source = Known(kinds.image)
    theirs = cache(kinds.a).obtain(source)
    with Path(theirs.path).open("r+b") as file:
        file.write(b"spoilt")
    expect_from_its_source(kinds, source)
    expect_no_trace(kinds.a)


def test_a_record_that_is_not_of_its_source(kinds: Kinds, tmp_path: Path) -> None:
    """The peer has other bytes under that key, with a manifest: the checksum tells."""
    other = tmp_path / "other"
    other.write_bytes(content(b"other"))
    source = Known(kinds.image)
    real = cache(kinds.a).obtain(source)
    wrong = cache(kinds.a).obtain(sources.LocalFile(other, "raw"))
    backend = kinds.a.driver.node.backend(kinds.a.name)
    backend.update(msgspec.structs.replace(wrong, image=real.image))
    backend.remove(real.name)
    expect_from_its_source(kinds, source)
    expect_no_trace(kinds.a)
    backend.update(wrong)


def test_a_peer_that_goes_away_in_the_middle(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Known(kinds.image)
    cache(kinds.a).obtain(source)

    def gone(self: Any, start: int, end: int) -> bytes:
        raise errors.HostUnreachable(host="a", reason="gone")

    with monkeypatch.context() as patch:
        patch.setattr(reading.VolumeSource, "read", gone)
        expect_from_its_source(kinds, source)
    expect_no_trace(kinds.a)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_peer_that_hangs(
    kinds: Kinds,
    hosts: tuple[sandbox.Host, sandbox.Host],
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """It costs what waiting for any host costs, and no more."""
    source, there = Known(kinds.image), hosts[0]
    cache(kinds.a).obtain(source)
    real = reading.VolumeSource.read

    def freezing(self: Any, start: int, end: int) -> bytes | None:
        there.freeze()
        return real(self, start, end)

    began = time.monotonic()
    try:
        if when == "before":
            there.freeze()
        monkeypatch.setattr(reading.VolumeSource, "read", freezing)
        expect_from_its_source(kinds, source)
    finally:
        there.thaw()
    assert time.monotonic() - began < 100


def test_it_is_held_meanwhile(kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    source, held = Known(kinds.image), []
    cache(kinds.a).obtain(source)
    real = reading.VolumeSource.read

    def noted(self: Any, start: int, end: int) -> bytes | None:
        (cached,) = cache(kinds.a).shelf.all()
        held.append(cached.is_held)
        with pytest.raises(errors.ImageInUse):
            cache(kinds.a).remove(cached)
        return real(self, start, end)

    monkeypatch.setattr(reading.VolumeSource, "read", noted)
    cache(kinds.b).obtain(source)
    assert source.reads == 1 and held and all(held)
    expect_no_trace(kinds.a)


def test_cancelled_while_it_comes_from_a_peer(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, progress = Known(kinds.image), Progress()
    cache(kinds.a).obtain(source)

    def cancel(self: Any, start: int, end: int) -> bytes:
        progress.cancel()
        return bytes(end - start)

    monkeypatch.setattr(reading.VolumeSource, "read", cancel)
    with pytest.raises(errors.Cancelled):
        cache(kinds.b).obtain(source, progress)
    assert source.reads == 1
    assert kinds.b.driver.node.backend(kinds.b.name).volumes.names() == []
    expect_no_trace(kinds.a)


def test_what_a_killed_one_left_at_the_peer(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer gives it up by itself."""
    source = Known(kinds.image)
    cache(kinds.a).obtain(source)
    key = slots.key_of(source.origin, source.described())
    long_ago = types.SimpleNamespace(time=lambda: 1.0)
    monkeypatch.setattr(neighbours, "time", long_ago)
    monkeypatch.setattr(neighbours, "_leave", lambda *_: None)
    near = neighbours.Neighbours(kinds.b.driver.node)
    with near.holding(key, "0123456789abcdef", lambda: None) as found:
        assert found is not None and found.peer == kinds.a.host.name
    (cached,) = cache(kinds.a).shelf.all()
    assert cached.holders == ("0123456789abcdef",)
    for _ in range(2):
        assert kinds.a.driver.settle() == []
    assert set(kinds.a.driver.node.mailbox.transfers.names()) == {"host"}
    (hold,) = cache(kinds.a).shelf.all()[0].volume.holds
    assert hold.until < time.time() + assistance.LOAN
    backend = kinds.a.driver.node.backend(kinds.a.name)
    assert backend.images.release("0123456789abcdef") == 1
