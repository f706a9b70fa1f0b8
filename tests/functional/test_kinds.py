# SPDX-License-Identifier: Apache-2.0
"""Moves from any kind of backend to any other: the guest sees the same bytes."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional.sides import (
    SIZE,
    Kinds,
    Side,
    add_disk,
    between,
    is_shared,
    spoil,
)
from virtmigrate import domainxml, errors, manifest, model, stream
from virtmigrate.model import TransferState
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

PAIRS = [("dir-ext4", "rbd"), ("rbd", "dir-xfs"), ("rbd", "rbd")]
PAIRS += [("shared_dir", "shared_dir"), ("dir-xfs", "dir-falloc")]
"""Kinds of backends at the source and at the peer."""


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("kind-alpha"), box.add_host("kind-beta")
    box.remove_host("kind-alpha")
    box.remove_host("kind-beta")


@pytest.fixture(params=PAIRS, ids="-".join)
def kinds(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with between(request.param, hosts, tmp_path, cluster) as made:
        yield made


def test_moved_and_confirmed(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    assert kinds.a.disk(instance)[0] == kinds.a.name
    kinds.move(instance)
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    assert kinds.b.disk(instance)[0] == kinds.b.name
    assert (kinds.sent() == 0) == is_shared(kinds)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.settle()
    assert kinds.b.root(instance) == before
    if not is_shared(kinds):
        assert not [name for name in kinds.a.volumes() if "vda" in name]
    kinds.b.driver.destroy(None, instance, None)
    for side in (kinds.a, kinds.b):
        assert not [name for name in side.volumes() if "vda" in name]


def test_moved_and_reverted(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before, volumes = kinds.a.root(instance), kinds.a.volumes()
    kinds.move(instance)
    spoil(kinds.b, instance)
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.state_of(instance) == "running"
    assert kinds.b.state_of(instance) is None
    assert kinds.a.root(instance) == before
    assert {n for n in kinds.a.volumes() if ".rec." not in n} == {
        n for n in volumes if ".rec." not in n
    }
    kinds.a.driver.destroy(None, instance, None)


def test_resized(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    kinds.move(instance, root_gb=1, memory_mb=80)
    name, volume = kinds.b.disk(instance)
    assert (name, volume.size) == (kinds.b.name, 1024 * MiB)
    assert kinds.b.state_of(instance) == "running"
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.disk(instance)[1].size == SIZE
    assert kinds.a.root(instance) == before
    kinds.move(instance, root_gb=1)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    grown = manifest.Manifest(1024 * MiB)
    assert kinds.b.root(instance) != grown.root()
    kinds.b.driver.destroy(None, instance, None)


def test_a_failed_move_leaves_nothing(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    there = kinds.b.volumes()
    kinds.a.driver._progress = lambda: Cancelling()
    with pytest.raises((errors.MigrationError, errors.Cancelled)):
        kinds.move(instance)
    kinds.a.driver.settle()
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    left = {n for n in kinds.b.volumes() if ".rec." not in n}
    assert left == {n for n in there if ".rec." not in n}
    kinds.a.driver.destroy(None, instance, None)


class Cancelling(Progress):
    """Somebody cancels when the right is about to be given."""

    def phase(self, name: str, total: int = 0) -> None:
        super().phase(name, total)
        if name == "handing over":
            self.cancel()


def test_the_state_is_one_of_the_transfer(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.move(instance)
    (stored,) = (
        each
        for each in kinds.b.driver.node.mailbox.open_transfers()
        if each.body.instance == instance.uuid
    )
    assert stored.body.state is TransferState.SETTLED
    (sent,) = (v for v in stored.body.volumes if v.target == "vda")
    assert (sent.backend, sent.shared) == (kinds.b.name, is_shared(kinds))
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


# Disks that are clones

CLONED = [("rbd", "dir-xfs"), ("rbd", "rbd"), ("dir-xfs", "dir-ext4")]


def stand_on_image(side: Side, instance: Any) -> model.Volume:
    """Make an instance's root disk a clone of an image that holds the same."""
    here, (name, root) = side.driver.node, side.disk(instance)
    backend, pool = here.backend(name), here.backend(name).incoming
    side.driver.power_off(instance)

    def new(name: str, **fields: Any) -> model.Volume:
        state, path = model.VolumeState.INCOMPLETE, pool.volume_path(name)
        values = {"name": name, "pool": pool.name, "path": path, "state": state}
        return msgspec.structs.replace(root, **{**values, **fields})

    def finished(volume: model.Volume, **fields: Any) -> model.Volume:
        pool, path = backend.accept(volume.name)
        values = {"pool": pool, "path": path, "state": model.VolumeState.USABLE}
        return backend.update(msgspec.structs.replace(volume, **values, **fields))

    with stream.Mover() as mover:
        digest = mover.survey(backend.source(root, root.size)).digest()
        made = new(f"image.{uuid.uuid4().hex[:8]}", role=model.Role.IMAGE, owner="")
        image = finished(backend.copy(root, made, mover), digest=digest)
        made = new(f"vda.{uuid.uuid4().hex[:16]}", operation="cloning")
        disk = finished(backend.clone(image, made, mover))
    record = here.instances.read(instance.uuid).body
    refs = tuple(
        msgspec.structs.replace(ref, volume=disk.name) if ref.target == "vda" else ref
        for ref in record.disks
    )
    here.publish_instance(msgspec.structs.replace(record, disks=refs))
    with side.libvirt() as conn:
        text = conn.lookupByUUIDString(instance.uuid).XMLDesc(2)
        conn.defineXML(domainxml.with_disks(text, {"vda": backend.layers(disk.name)}))
    backend.remove(root.name)
    side.driver.power_on(None, instance, None)
    return image


@pytest.mark.parametrize("kinds", CLONED, ids="-".join, indirect=True)
def test_a_clone_moves_whole(kinds: Kinds) -> None:
    """With what it shares with its image, which stays behind."""
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    image = stand_on_image(kinds.a, instance)
    backend = kinds.a.driver.node.backend(kinds.a.name)
    assert kinds.a.root(instance) == before
    assert backend.users(image.name) == {kinds.a.disk(instance)[1].name}
    kinds.move(instance)
    assert kinds.b.root(instance) == before
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.settle()
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    assert (kinds.b.disk(instance)[1].parent == image.name) == is_shared(kinds)
    assert backend.users(image.name) == (
        {kinds.b.disk(instance)[1].name} if is_shared(kinds) else set()
    )
    kinds.b.driver.destroy(None, instance, None)
    backend.remove(image.name)
    for side in (kinds.a, kinds.b):
        assert not [n for n in side.volumes() if "vda" in n or "image" in n]


@pytest.mark.parametrize("kinds", CLONED, ids="-".join, indirect=True)
def test_a_clone_comes_back(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    image = stand_on_image(kinds.a, instance)
    _, disk = kinds.a.disk(instance)
    kinds.move(instance, root_gb=1)
    spoil(kinds.b, instance)
    assert kinds.b.root(instance) != before
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    back = kinds.a.disk(instance)[1]
    assert (back.parent, back.backing) == (disk.parent, disk.backing)
    kinds.a.driver.destroy(None, instance, None)
    kinds.a.driver.node.backend(kinds.a.name).remove(image.name)


@pytest.mark.parametrize("kinds", [PAIRS[0]], ids="-".join, indirect=True)
def test_equal_names_in_two_backends(kinds: Kinds) -> None:
    """A name tells a volume from others of its backend only."""
    instance = kinds.spawn()
    add_disk(kinds.a, instance, "vdb", b"another disk")
    before = kinds.a.root(instance), kinds.a.root(instance, "vdb")
    assert kinds.a.disk(instance)[1].name == kinds.a.disk(instance, "vdb")[1].name
    kinds.move(instance)
    assert (kinds.b.root(instance), kinds.b.root(instance, "vdb")) == before
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)
