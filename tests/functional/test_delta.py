# SPDX-License-Identifier: Apache-2.0
"""What the peer has already is not sent: retired disks, and images of its cache."""

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import Node, World, digest
from tests.functional.test_failures import At
from virtmigrate import domainxml, errors, model
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.manifest import Manifest
from virtmigrate.model import Role, VolumeState
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

SIZE = 32 * MiB


@pytest.fixture
def keeping(world: World) -> World:
    """A world whose hosts keep retired disks."""
    for node in (world.a, world.b):
        node.overrides["keep_retired"] = True
        node.new_driver()
    return world


def spawn(world: World) -> Any:
    image = world.tmp / "dense"
    image.write_bytes(os.urandom(SIZE))
    return world.spawn(world.a, image)


def move(world: World, instance: Any, source: Node, dest: Node) -> int:
    """Move and confirm; return the bytes that were sent."""
    before = source.progress.sent
    ticket = source.driver.migrate_disk_and_power_off(
        None, instance, dest.host.name, None, None
    )
    dest.driver.finish_migration(None, None, instance, ticket, None)
    source.driver.confirm_migration(None, None, instance, None)
    dest.driver.settle()
    return source.progress.sent - before


def change(node: Node, instance: Any, blocks: int) -> str:
    """Change some blocks of the disk of a guest; return the disk's digest then."""
    node.driver.power_off(instance)
    path = node.disk(instance)
    chosen = random.Random(7).sample(range(1, SIZE // MiB), blocks)
    with path.open("r+b") as file:
        for index in chosen:
            file.seek(index * MiB)
            file.write(os.urandom(4096))
    return digest(path)


def retired(node: Node) -> list[model.Volume]:
    return node.driver.node.backend("local").retired()


def test_a_return_sends_what_changed(keeping: World) -> None:
    world = keeping
    instance = spawn(world)
    assert move(world, instance, world.a, world.b) == SIZE
    (kept,) = retired(world.a)
    assert kept.state is VolumeState.RETIRED
    assert world.a.state_of(instance) is None
    expected = change(world.b, instance, 3)
    assert move(world, instance, world.b, world.a) == 3 * MiB
    assert digest(world.a.disk(instance)) == expected
    assert retired(world.a) == []
    assert len(retired(world.b)) == 1
    # And there again: b kept what it sent.
    expected = change(world.a, instance, 2)
    assert move(world, instance, world.a, world.b) == 2 * MiB
    assert digest(world.b.disk(instance)) == expected


def test_a_retired_disk_that_was_touched_is_no_harm(keeping: World) -> None:
    """Somebody wrote to it: what was believed of it is found wrong, and repaired."""
    world = keeping
    instance = spawn(world)
    move(world, instance, world.a, world.b)
    (kept,) = retired(world.a)
    with Path(kept.path).open("r+b") as file:
        file.write(b"touched")
    expected = change(world.b, instance, 2)
    assert move(world, instance, world.b, world.a) == 3 * MiB
    assert digest(world.a.disk(instance)) == expected


@pytest.mark.parametrize("harm", ["no manifest", "bad manifest", "no file"])
def test_a_retired_disk_that_cannot_be_used(keeping: World, harm: str) -> None:
    world = keeping
    instance = spawn(world)
    move(world, instance, world.a, world.b)
    (kept,) = retired(world.a)
    path = world.a.path / "records" / f"{kept.name}.manifest"
    if harm == "no manifest":
        path.unlink()
    elif harm == "bad manifest":
        path.write_bytes(os.urandom(path.stat().st_size))
    else:
        Path(kept.path).unlink()
    expected = digest(world.b.disk(instance))
    assert move(world, instance, world.b, world.a) == SIZE
    assert digest(world.a.disk(instance)) == expected


def test_a_retired_disk_is_never_started(keeping: World) -> None:
    world = keeping
    instance = spawn(world)
    move(world, instance, world.a, world.b)
    with pytest.raises(errors.Error):
        world.a.driver.power_on(None, instance)
    assert world.a.state_of(instance) is None


def test_a_return_that_grows(keeping: World) -> None:
    world = keeping
    instance = spawn(world)
    move(world, instance, world.a, world.b)
    content = world.b.disk(instance).read_bytes()
    flavor = world.flavor(root_gb=1)
    ticket = world.b.driver.migrate_disk_and_power_off(
        None, instance, world.a.host.name, flavor, None
    )
    assert world.b.progress.sent <= MiB
    world.a.driver.finish_migration(None, None, instance, ticket, None)
    world.b.driver.confirm_migration(None, None, instance, None)
    with world.a.disk(instance).open("rb") as file:
        assert file.read(SIZE) == content
        assert not file.read(MiB).strip(b"\0")


def test_what_is_not_proven_is_not_kept(keeping: World) -> None:
    world = keeping
    world.a.overrides["verify"] = "none"
    world.a.new_driver()
    instance = spawn(world)
    world.finish(instance, world.migrate(instance))
    world.a.driver.confirm_migration(None, None, instance, None, accept_unproven=True)
    # What is kept here was never in doubt; what arrived there was.
    (record,) = world.b.driver.node.entitled(instance.uuid).disks
    volumes = world.b.driver.node.backend("local").volumes
    assert volumes.read(record.volume).body.proof is model.Proof.NONE


def configure(node: Node, **options: object) -> None:
    node.overrides.update(options)
    node.new_driver()


def change_block(node: Node, instance: Any, data: bytes) -> bytes:
    """Write to a block of the disk of a guest; return what was there."""
    node.driver.power_off(instance)
    with node.disk(instance).open("r+b") as file:
        before = os.pread(file.fileno(), len(data), MiB)
        os.pwrite(file.fileno(), data, MiB)
    return before


def test_digests_of_a_reverted_move_vouch_for_nothing(keeping: World) -> None:
    """The guest wrote after it, and the move that counts kept no digests.

    It then undoes what it wrote: by the old digests nothing has changed, and what
    is at the source is something else.
    """
    world = keeping
    instance = spawn(world)
    world.migrate(instance)
    world.a.driver.finish_revert_migration(None, instance)
    before = change_block(world.a, instance, b"after the revert")
    configure(world.a, keep_retired=False)
    ticket = world.migrate(instance)
    world.finish(instance, ticket)
    configure(world.a, keep_retired=True)
    world.confirm(instance)
    assert retired(world.a) == []
    change_block(world.b, instance, before)
    expected = digest(world.b.disk(instance))
    configure(world.b, verify="none")
    ticket = world.b.driver.migrate_disk_and_power_off(
        None, instance, world.a.host.name, None, None
    )
    world.a.driver.finish_migration(None, None, instance, ticket, None)
    assert digest(world.a.disk(instance)) == expected


def test_cancel_is_heard_while_the_peer_works(
    keeping: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer takes its time to bring out a retired disk; nobody has to wait."""
    world = keeping
    instance = spawn(world)
    move(world, instance, world.a, world.b)
    release = threading.Event()
    real = base.Backend.manifest

    def slow(self: base.Backend, name: str) -> Manifest | None:
        release.wait(20)
        return real(self, name)

    monkeypatch.setattr(base.Backend, "manifest", slow)
    threading.Timer(1.0, world.b.progress.cancel).start()
    began = time.monotonic()
    try:
        with pytest.raises(errors.MigrationRefused):
            world.b.driver.migrate_disk_and_power_off(
                None, instance, world.a.host.name, None, None
            )
        assert time.monotonic() - began < 10
    finally:
        release.set()
    world.b.progress = Progress()


def test_retired_disks_go_first_when_room_is_short(world: World) -> None:
    world.a.clear()
    world.a.host.mount_storage(100 * MiB)
    try:
        world.a.overrides["keep_retired"] = True
        world.a.new_driver()
        first = spawn(world)
        move(world, first, world.a, world.b)
        assert len(retired(world.a)) == 1
        image = world.tmp / "second"
        image.write_bytes(os.urandom(80 * MiB))
        second = world.spawn(world.b, image)
        assert move(world, second, world.b, world.a) == 80 * MiB
        assert retired(world.a) == []
    finally:
        world.a.clear()
        world.a.host.unmount_storage()


def test_retired_disks_go_first_for_a_new_instance(world: World) -> None:
    world.a.clear()
    world.a.host.mount_storage(100 * MiB)
    try:
        world.a.overrides["keep_retired"] = True
        world.a.new_driver()
        move(world, spawn(world), world.a, world.b)
        assert len(retired(world.a)) == 1
        image = world.tmp / "second"
        image.write_bytes(os.urandom(80 * MiB))
        world.spawn(world.a, image)
        assert retired(world.a) == []
    finally:
        world.a.clear()
        world.a.host.unmount_storage()


# Images


def add_image(node: Node, content: bytes, name: str) -> model.Volume:
    """Have an image in a host's cache, as the cache would."""
    backend = node.driver.node.backend("local")
    path = node.path / "disks" / name
    path.write_bytes(content)
    backend.disks.refresh()
    found = Manifest(len(content))
    for index in range(found.count):
        found.add(index, content[index * MiB : (index + 1) * MiB])
    volume = model.Volume(
        name=name,
        pool=backend.disks.name,
        path=str(path),
        format=DiskFormat.RAW,
        role=Role.IMAGE,
        size=len(content),
        state=VolumeState.USABLE,
        owner="image-cache",
        operation="0" * 16,
        origin=node.host.name,
        digest=found.digest(),
        durable=True,
    )
    backend.volumes.publish(name, volume)
    return volume


def stand_on(world: World, node: Node, instance: Any, image: model.Volume) -> None:
    """Put the instance's disk upon an image, by an overlay."""
    node.driver.power_off(instance)
    backend = node.driver.node.backend("local")
    record = node.driver.node.entitled(instance.uuid)
    (ref,) = record.disks
    top = backend.volumes.read(ref.volume).body
    layer = msgspec.structs.replace(
        top,
        name="vda.overlay",
        path=str(node.path / "disks" / "vda.overlay"),
        format=DiskFormat.QCOW2,
        size=image.size,
        backing=image.name,
        digest=None,
    )
    backend.overlay(layer, image)
    xml = node.driver.node.domains.xml(instance.uuid)
    new = msgspec.structs.replace(ref, volume=layer.name)
    node.driver.node.publish_instance(msgspec.structs.replace(record, disks=(new,)))
    layers = {ref.target: backend.layers(layer.name)}
    node.driver.node.domains.undefine(instance.uuid)
    node.driver.node.domains.define(domainxml.with_disks(xml, layers), autostart=False)
    backend.remove(top.name)
    node.driver.power_on(None, instance)


@pytest.mark.parametrize("has", [True, False], ids=["there", "not-there"])
def test_an_image_that_the_peer_has_is_not_sent(world: World, has: bool) -> None:
    content = os.urandom(SIZE)
    image = add_image(world.a, content, "image-here")
    theirs = add_image(world.b, content, "image-there") if has else None
    instance = world.spawn(world.a)
    stand_on(world, world.a, instance, image)
    ticket = world.migrate(instance)
    sent = world.a.progress.sent
    assert sent <= MiB if has else sent >= SIZE
    backend = world.b.driver.node.backend("local")
    if theirs:
        (hold,) = backend.volumes.read(theirs.name).body.holds
        assert hold.operation in ticket
    world.finish(instance, ticket)
    world.confirm(instance)
    (ref,) = world.b.driver.node.entitled(instance.uuid).disks
    below = backend.chain(ref.volume)[1]
    assert below.name == "image-there" if has else below.role is Role.LAYER
    assert world.read(world.b, instance) == content
    # Images are nobody's: they stay.
    assert world.a.driver.node.backend("local").volumes.find(image.name)
    world.b.driver.destroy(None, instance, None)
    assert bool(backend.volumes.find("image-there")) is has
    if theirs:
        assert backend.volumes.read(theirs.name).body.holds == ()


def test_an_image_is_released_when_the_move_fails(world: World) -> None:
    content = os.urandom(SIZE)
    image = add_image(world.a, content, "image-here")
    theirs = add_image(world.b, content, "image-there")
    instance = world.spawn(world.a)
    stand_on(world, world.a, instance, image)
    world.a.progress = At("copying", 0, lambda: world.a.progress.cancel()).progress
    with pytest.raises(errors.MigrationRolledBack):
        world.migrate(instance)
    backend = world.b.driver.node.backend("local")
    assert backend.volumes.read(theirs.name).body.holds == ()
    assert world.a.state_of(instance) == "running"
