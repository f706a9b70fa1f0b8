# SPDX-License-Identifier: Apache-2.0
"""What files in directories do that depends on their file system."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.test_contract import OPERATION, SIZE, content, settled, volume
from virtmigrate import errors, host, stream
from virtmigrate.backends import base
from virtmigrate.model import Role, VolumeState


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("dir-alpha")
    box.remove_host("dir-alpha")


@pytest.fixture(scope="module")
def here(alpha: sandbox.Host) -> Iterator[host.Host]:
    with host.Host(alpha.local_uri, name="dir-alpha") as opened:
        yield opened


@pytest.fixture(params=["dir-ext4", "dir-xfs", "dir-falloc"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(
    place: str,
    alpha: sandbox.Host,
    here: host.Host,
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[base.Backend]:
    with places.backend(place, alpha, here, tmp_path, cluster) as found:
        yield found


def test_copies_share_their_blocks_where_the_file_system_can(
    backend: base.Backend, place: str, tmp_path: Path
) -> None:
    found = settled(backend, tmp_path, name="image", role=Role.IMAGE)
    with stream.Mover() as mover:
        made = backend.copy(found, volume(backend), mover)
    path = Path(backend.incoming.path) / made.name
    assert path.read_bytes() == content()
    shares = place == "dir-xfs"
    assert (mover.account.figures().read == 0) == shares
    assert shared(path) == (3 if shares else 0)
    with path.open("r+b") as file:
        file.write(b"other")
    assert Path(found.path).read_bytes() == content()
    assert path.stat().st_size == SIZE


def test_all_room_is_given_at_once_where_that_is_wanted(
    backend: base.Backend, place: str, tmp_path: Path
) -> None:
    whole = place == "dir-falloc"
    before = backend.room()
    made = backend.allocate(volume(backend))
    path = Path(backend.incoming.path) / made.name

    def has(size: int) -> bool:
        """Tell whether it takes all of its room, and reads as zeros."""
        taken = path.stat().st_blocks * 512
        assert backend.incoming.allocated(made.name) == taken
        assert path.read_bytes() == bytes(size)
        return taken >= size

    assert has(SIZE) == whole
    assert (before - backend.room() >= SIZE) == whole
    backend.grow(made.name, 2 * SIZE)
    assert has(2 * SIZE) == whole
    retired = volume(backend, "vda.old", state=VolumeState.RETIRED)
    backend.allocate(retired)
    backend.set_aside(retired, "aside", "name", 3 * SIZE)
    path = Path(backend.incoming.path) / "aside"
    assert (path.stat().st_blocks * 512 >= 3 * SIZE) == whole


@pytest.mark.parametrize("place", ["dir-falloc"])
def test_what_has_no_room_is_refused_when_it_is_made(backend: base.Backend) -> None:
    size = backend.disks.room().capacity
    with pytest.raises(errors.NoSpace):
        backend.allocate(volume(backend, size=size))
    assert backend.volumes.names() == backend.incoming.names() == []
    made = backend.allocate(volume(backend))
    with pytest.raises(errors.NoSpace):
        backend.grow(made.name, size)


def test_where_blocks_cannot_be_shared_they_are_copied(
    backend: base.Backend, alpha: sandbox.Host, tmp_path: Path
) -> None:
    """The source lies on another file system."""
    found = settled(backend, tmp_path, name="image", role=Role.IMAGE)
    Path(found.path).unlink()
    other = backend.pool(f"virtmigrate-{backend.name}-elsewhere")
    other.ensure_directory(str(alpha.storage / f"elsewhere-{backend.name}"))
    other.create_raw("image", SIZE)
    other.write("image", content())
    source = volume(backend, "image", pool=other.name)
    with stream.Mover() as mover:
        made = backend.copy(source, volume(backend), mover)
    path = Path(backend.incoming.path) / made.name
    assert path.read_bytes() == content()
    assert (made.name, shared(path)) == (f"vda.{OPERATION}", 0)


def shared(path: Path) -> int:
    """Return how many of a file's extents are another file's, too."""
    argv = ["filefrag", "-v", str(path)]
    done = subprocess.run(argv, check=True, timeout=30, capture_output=True, text=True)
    return sum("shared" in line for line in done.stdout.splitlines())
