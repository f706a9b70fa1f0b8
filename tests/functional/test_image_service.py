# SPDX-License-Identifier: Apache-2.0
"""Images that a service keeps in the same cluster are cloned, not downloaded.

What the service says of its images is made up here; that it keeps them so is not.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.test_imagecache import Place, content, told
from tests.functional.test_imagecache import alpha as alpha
from virtmigrate import errors, sources
from virtmigrate.units import MiB

USER, STORE = "images", "store"
NAME = "8d0b1a4e-the-image"


class Stored:
    """An image of a service that keeps it in the cluster; it cannot be downloaded."""

    origin = "service:one"

    def __init__(self, location: str, data: bytes) -> None:
        self.location = location
        self.data = data
        self.is_up = False

    def described(self) -> sources.Described:
        digest = hashlib.sha512(self.data).hexdigest()
        return sources.Described(
            name="one",
            format="raw",
            size=len(self.data),
            checksum=sources.Checksum("sha512", digest),
            locations=("swift+https://elsewhere/x", self.location),
        )

    def read(self, write: Any, check: Any, start: int = 0) -> None:
        if not self.is_up:
            raise errors.ImageUnavailable(image=self.origin, reason="not to be read")
        for at in range(0, len(self.data), MiB):
            write(self.data[at : at + MiB])


class Service:
    """The pool of an image service, as it keeps its images."""

    def __init__(self, ceph: Ceph, tmp: Path) -> None:
        self.ceph = ceph
        self._tmp = tmp

    def keep(self, data: bytes) -> str:
        """Keep an image; return its location."""
        path = self._tmp / "stored"
        path.write_bytes(data)
        image = f"{STORE}/{NAME}"
        self.ceph.run(["rbd", "import", str(path), image])
        self.ceph.run(["rbd", "snap", "create", f"{image}@snap"])
        self.ceph.run(["rbd", "snap", "protect", f"{image}@snap"])
        fsid = self.ceph.run(["ceph", "fsid"]).strip()
        return f"rbd://{fsid}/{STORE}/{NAME}/snap"

    def remove(self) -> None:
        """Remove it as Glance does: to the trash, where there are clones."""
        image = f"{STORE}/{NAME}"
        for argv in (
            ["rbd", "snap", "unprotect", f"{image}@snap"],
            ["rbd", "snap", "rm", f"{image}@snap"],
        ):
            with contextlib.suppress(sandbox.SandboxError):
                self.ceph.run(argv)
        try:
            self.ceph.run(["rbd", "rm", image])
        except sandbox.SandboxError:
            self.ceph.run(["rbd", "trash", "mv", image])

    def empty_trash(self) -> list[str]:
        """Remove what can be removed; return what is left."""
        self.ceph.run(["rbd", "trash", "purge", STORE])
        return self.ceph.run(["rbd", "trash", "ls", STORE]).split()

    def objects(self) -> dict[str, str]:
        """What lies there, with its bytes' digests; not what Ceph notes of clones."""
        found = {}
        for name in self.ceph.run(["rados", "-p", STORE, "ls"]).split():
            if name.startswith("rbd_data"):
                path = self._tmp / "object"
                self.ceph.run(["rados", "-p", STORE, "get", name, str(path)])
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


@pytest.fixture
def service(cluster: Callable[[], Ceph], tmp_path: Path) -> Iterator[Service]:
    ceph = cluster()
    if STORE not in ceph.pools:
        ceph.create_pool(STORE)
    made = Service(ceph, tmp_path)
    yield made
    if NAME in ceph.run(["rbd", "ls", STORE]):
        made.remove()
    assert made.empty_trash() == []


@pytest.fixture
def place(
    alpha: sandbox.Host, tmp_path: Path, cluster: Callable[[], Ceph], service: Service
) -> Iterator[Place]:
    """A host whose user may read the service's pool, and no more."""
    with places.of_ceph(alpha, USER, tmp_path / "x", cluster) as values:
        pools = f"profile rbd pool={USER}, profile rbd-read-only pool={STORE}"
        rights = {"mon": "profile rbd", "osd": pools, "mgr": f"profile rbd pool={USER}"}
        words = [word for pair in rights.items() for word in pair]
        cluster().run(["ceph", "auth", "caps", f"client.{USER}", *words])
        made = Place(alpha, tmp_path, values, "rbd")
        yield made
        made.clear()
        made.side.close()


def test_cloned_and_not_downloaded(place: Place, service: Service) -> None:
    source = Stored(service.keep(content()), content())
    before = service.objects()
    image = place.cache.obtain(source)
    assert place.root(image) == told(content())
    assert image.digest is not None and image.digest.root == told(content())
    assert image.image is not None and image.image.checksum.startswith("sha512:")
    info = service.ceph.run(["rbd", "info", f"{USER}/{image.name}"])
    assert f"parent: {STORE}/{NAME}@snap" in info
    assert service.objects() == before
    disk = place.clone(source)
    assert place.root(disk) == told(content())
    place.backend.remove(disk.name)


def test_the_service_removes_it(place: Place, service: Service) -> None:
    """While clones exist: what stands on them goes on, and so does the cache."""
    source = Stored(service.keep(content()), content())
    image = place.cache.obtain(source)
    disk = place.clone(source)
    service.remove()
    assert NAME not in service.ceph.run(["rbd", "ls", STORE])
    assert place.root(disk) == place.root(image) == told(content())
    other = place.clone(source)
    assert place.root(other) == told(content())
    for each in (disk, other):
        place.backend.remove(each.name)
    (cached,) = place.cache.shelf.all()
    place.cache.remove(cached)
    assert service.empty_trash() == []


def test_what_is_not_what_was_promised(place: Place, service: Service) -> None:
    location = service.keep(content(b"other"))
    with pytest.raises(errors.ImageRefused, match="promised"):
        place.cache.obtain(Stored(location, content()))
    place.expect_nothing()


def test_what_is_no_raw_image(place: Place, service: Service) -> None:
    """A header that a guest's QEMU must never see is seen where it is stored."""
    data = b"QFI\xfb\0\0\0\3" + content()[8:]
    with pytest.raises(errors.ImageRefused):
        place.cache.obtain(Stored(service.keep(data), data))
    place.expect_nothing()


@pytest.mark.parametrize("how", ["fsid", "pool", "image"])
def test_downloaded_all_the_same(place: Place, service: Service, how: str) -> None:
    """Of another cluster, not to be read, or gone."""
    location = service.keep(content())
    _, _, fsid, pool, image, snap = location.split("/")
    other = {"fsid": fsid[::-1], "pool": "volumes", "image": "none"}
    words = {"fsid": fsid, "pool": pool, "image": image} | {how: other[how]}
    location = f"rbd://{words['fsid']}/{words['pool']}/{words['image']}/{snap}"
    source = Stored(location, content())
    source.is_up = True
    assert place.root(place.cache.obtain(source)) == told(content())
