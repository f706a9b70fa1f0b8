# SPDX-License-Identifier: Apache-2.0
"""Instances on cached images move: what the peer's cache has is not sent."""

import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional.sides import Kinds, Side, between
from tests.functional.test_imagecache import SIZE, content, told
from virtmigrate import errors, sources
from virtmigrate.backends import keeping
from virtmigrate.units import MiB


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("im-alpha"), box.add_host("im-beta")
    box.remove_host("im-alpha")
    box.remove_host("im-beta")


@pytest.fixture
def kinds(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    pair = getattr(request, "param", ("dir-ext4", "dir-xfs"))
    with between(pair, hosts, tmp_path, cluster) as made:
        made.image.write_bytes(content())
        yield made
        # Others have the cluster's pool after us.
        for side in (made.a, made.b):
            cache = side.driver.images.of(side.driver.node.backend(side.name))
            for each in cache.shelf.all():
                cache.remove(each)


def spawn(kinds: Kinds) -> Any:
    made = types.SimpleNamespace(
        uuid=str(uuid.uuid4()),
        name=f"guest-{uuid.uuid4().hex[:6]}",
        flavor=kinds.flavor(kinds.a),
    )
    meta = {"id": "one", "path": str(kinds.image), "disk_format": "raw"}
    kinds.a.driver.spawn(None, made, meta)
    return made


def cached(side: Side, path: Path) -> Any:
    cache = side.driver.images.of(side.driver.node.backend(side.name))
    return cache.obtain(sources.LocalFile(path, "raw"))


def test_what_the_peer_has_is_not_sent(kinds: Kinds, tmp_path: Path) -> None:
    """It came there under another name, from elsewhere: the bytes tell."""
    theirs = tmp_path / "theirs"
    theirs.write_bytes(content())
    image = cached(kinds.b, theirs)
    instance = spawn(kinds)
    kinds.move(instance)
    assert kinds.sent() < MiB < SIZE
    assert kinds.b.disk(instance)[1].backing == image.name
    assert kinds.b.root(instance) == told(content())
    kinds.a.driver.confirm_migration(None, None, instance, None)
    backend = kinds.b.driver.node.backend(kinds.b.name)
    (there,) = kinds.b.driver.images.of(backend).shelf.all()
    assert not there.is_held and len(there.references) == 1
    with pytest.raises(errors.ImageInUse):
        kinds.b.driver.images.of(backend).remove(there)
    kinds.b.driver.destroy(None, instance, None)
    kinds.b.driver.images.of(backend).remove(there)


@pytest.mark.parametrize(
    "kinds",
    [("dir-ext4", "dir-xfs"), ("rbd", "dir-xfs"), ("dir-xfs", "rbd")],
    ids="-".join,
    indirect=True,
)
def test_its_source_is_gone(kinds: Kinds) -> None:
    """A host that never saw the image gets it from the source's cache."""
    instance = spawn(kinds)
    kinds.image.unlink()
    kinds.move(instance)
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == told(content())
    kinds.a.driver.confirm_migration(None, None, instance, None)
    assert kinds.b.root(instance) == told(content())
    kinds.b.driver.destroy(None, instance, None)


def test_an_image_that_goes_while_it_is_counted_on(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease of the move ended early: the instance goes back, whole."""
    image = cached(kinds.b, kinds.image)
    instance = spawn(kinds)
    backend = kinds.b.driver.node.backend(kinds.b.name)
    real = keeping.Images.count_on

    def late(self: keeping.Images, name: str) -> None:
        if name == image.name:
            assert self.doom(backend.volumes.read(name))
        real(self, name)

    monkeypatch.setattr(keeping.Images, "count_on", late)
    with pytest.raises(errors.ImageGone):
        kinds.move(instance)
    monkeypatch.undo()
    assert kinds.b.state_of(instance) is None
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == told(content())
    kinds.b.driver.settle()
    assert not [n for n in kinds.b.volumes() if "vda" in n]
    kinds.a.driver.destroy(None, instance, None)
