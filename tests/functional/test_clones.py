# SPDX-License-Identifier: Apache-2.0
"""Clones in Ceph: what lies in the cluster, and what becomes of it.

What a clone promises on every kind is in test_contract.py.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places, test_contract
from virtmigrate import errors, host
from virtmigrate.backends import rbd as rbd_kind
from virtmigrate.units import MiB

SIZE = test_contract.SIZE


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("clo-alpha")
    box.remove_host("clo-alpha")


@pytest.fixture(params=["1", "2"], ids=["version-1", "version-2"])
def version(request: pytest.FixtureRequest) -> str:
    """Of the clones that librbd makes; older clusters know the first only."""
    return str(request.param)


@pytest.fixture
def backend(
    alpha: sandbox.Host,
    cluster: Callable[[], Ceph],
    tmp_path: Path,
    version: str,
) -> Iterator[rbd_kind.RbdBackend]:
    with (
        host.Host(alpha.local_uri, name="clo-alpha") as here,
        places.backend("rbd", alpha, here, tmp_path, cluster) as found,
    ):
        assert isinstance(found, rbd_kind.RbdBackend)
        conf = tmp_path / "ceph.conf"
        text = Path(found.settings.options["rbd_ceph_conf"]).read_text()
        conf.write_text(f"{text}\n[client]\nrbd default clone format = {version}\n")
        found.cluster._conf = str(conf)
        found.close()
        yield found


def rbd(backend: rbd_kind.RbdBackend, *words: str) -> str:
    """What Ceph's own command says of the pool."""
    conf, user = backend.cluster._conf, backend.settings.options["rbd_user"]
    argv = ["rbd", "--conf", conf, "--id", user, "--pool", backend.cluster.pool, *words]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30)
    return done.stdout.strip()


def left(backend: rbd_kind.RbdBackend) -> list[str]:
    """All images, also those in the trash, with their snapshots of any namespace."""
    trash = rbd(backend, "trash", "ls", "--all").split("\n")
    images = rbd(backend, "ls").split()
    snapshots = [
        f"{name}@{line}"
        for name in images
        for line in rbd(backend, "snap", "ls", "--all", name).split("\n")[1:]
    ]
    return [each for each in (*images, *snapshots, *trash) if each]


def test_a_clone_shares_its_blocks(
    backend: rbd_kind.RbdBackend, version: str, tmp_path: Path
) -> None:
    image = test_contract.image(backend, tmp_path)
    made = test_contract.clone(backend, image, size=2 * SIZE)
    told = rbd(backend, "info", made.name)
    assert f"parent: {backend.cluster.pool}/image@virtmigrate-clones" in told
    assert ("op_features: clone-child" in told) == (version == "2")
    assert backend.disks.physical(made.name) == 2 * SIZE
    assert backend.disks.allocated(made.name) == 0
    assert backend.disks.allocated("image") > 0
    test_contract.spoil(backend, made)
    assert 0 < backend.disks.allocated(made.name) <= 4 * MiB


def test_nothing_is_left_of_clones(
    backend: rbd_kind.RbdBackend, tmp_path: Path
) -> None:
    image = test_contract.image(backend, tmp_path)
    for name in ("vda.1", "vda.2", "vda.3"):
        test_contract.clone(backend, image, name)
    (snapshot,) = (each for each in left(backend) if each.startswith("image@"))
    assert "virtmigrate-clones" in snapshot
    backend.flatten("vda.3")
    for name in ("vda.1", "vda.2"):
        with pytest.raises(errors.VolumeInUse):
            backend.remove("image")
        backend.remove(name)
    backend.remove("image")
    assert left(backend) == ["vda.3"]
    backend.remove("vda.3")
    assert left(backend) == []


def test_an_image_stays_for_a_clone_without_a_record(
    backend: rbd_kind.RbdBackend, tmp_path: Path
) -> None:
    """The cluster knows it, too."""
    image = test_contract.image(backend, tmp_path)
    made = test_contract.clone(backend, image)
    backend.volumes.remove(made.name)
    for _ in range(2):
        with pytest.raises(errors.VolumeInUse, match=made.name):
            backend.remove("image")
        with pytest.raises(errors.VolumeInUse, match=made.name):
            backend.disks.delete("image")
    assert backend.volumes.read("image").body == image
    again = test_contract.clone(backend, image, "vda.again")
    before = test_contract.told(test_contract.content()).root()
    assert test_contract.seen(backend, again, tmp_path) == before
    backend.disks.delete(made.name)
    backend.remove(again.name)
    backend.remove("image")
    assert left(backend) == []


def test_a_killed_flatten_is_gone_on_with(
    backend: rbd_kind.RbdBackend, tmp_path: Path
) -> None:
    """The cluster is through with it, and the record does not say so."""
    made = test_contract.clone(backend, test_contract.image(backend, tmp_path))
    rbd(backend, "--no-progress", "flatten", made.name)
    assert backend.flatten(made.name).parent is None
    backend.remove("image")
    backend.remove(made.name)
    assert left(backend) == []


def test_a_clone_that_does_not_grow_leaves_nothing(
    backend: rbd_kind.RbdBackend, tmp_path: Path
) -> None:
    image = test_contract.image(backend, tmp_path)
    with pytest.raises(errors.StorageError, match="cloning image"):
        # More objects than the map of an image has room for.
        test_contract.clone(backend, image, size=1 << 52)
    assert backend.volumes.names() == ["image"]
    assert backend.disks.names() == ["image"]
    backend.remove("image")
    assert left(backend) == []
