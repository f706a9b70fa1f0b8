# SPDX-License-Identifier: Apache-2.0
"""Clones where disks have no layers, or other hosts see them: refused by name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import cloneworld, places
from tests.functional.guestdisk import LENGTH, OFFSET, write
from tests.functional.sides import Kinds, Side, add_disk
from virtmigrate import consistency, errors
from virtmigrate.units import MiB

WHY = {
    "lvm": "disk vda: backend thelvm has no layers",
    "rbd": "disk vda: backend therbd has no layers",
    "shared_dir": "disk vda: other hosts see backend theshared_dir",
}


@pytest.fixture(scope="module")
def host(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("clone-kinds")
    box.remove_host("clone-kinds")


@pytest.fixture
def side(
    request: pytest.FixtureRequest,
    host: sandbox.Host,
    machine: Callable[[], sandbox.Machine],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Side]:
    """A host with disks of one kind, and files in a directory."""
    kind = str(request.param)
    on = machine() if kind in places.AFAR else host
    with places.PLACES[kind](on, "clones", tmp_path, cluster) as values:
        grace = places.GRACE.get(kind, 2)
        allowed = {"enable_live_clone": True}
        made = Side(on, tmp_path / "side", values, f"the{kind}", grace, **allowed)
        try:
            yield made
        finally:
            made.close()


def refused(side: Side, guest: Any) -> str:
    """What is said; nothing was touched, no record either."""
    before, state = side.volumes(), side.state_of(guest)
    with pytest.raises(errors.CloneRefused) as caught:
        side.driver.clone(None, guest, cloneworld.new(1), risk=cloneworld.RISK)
    assert side.volumes() == before
    assert side.state_of(guest) == state
    assert side.driver.list_instance_uuids() == [guest.uuid]
    assert not list(side.config.with_name("state").glob("clones/*"))
    return str(caught.value)


@pytest.mark.parametrize("side", WHY, indirect=True)
def test_refused(side: Side, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of one that runs, and of one that is off; it is what it was."""
    guest = Kinds(side, side, tmp_path).spawn()
    kind = request.node.callspec.params["side"]
    write(side, guest, 7)
    assert WHY[kind] in refused(side, guest)
    # It stands on nothing of others.
    side.driver.detach_clone(None, guest)
    side.driver.power_off(guest)
    assert WHY[kind] in refused(side, guest)
    assert side.content(guest)[OFFSET : OFFSET + LENGTH] == bytes([7]) * LENGTH
    assert consistency.check(side.driver.node) == []
    side.driver.destroy(None, guest)


@pytest.mark.parametrize("side", ["rbd"], indirect=True)
def test_one_disk_of_two(side: Side, tmp_path: Path) -> None:
    """What could be cloned is not, either."""
    guest = Kinds(side, side, tmp_path).spawn()
    add_disk(side, guest, "vdb", bytes(MiB))
    said = refused(side, guest)
    assert WHY["rbd"] in said
    assert "vdb" not in said
    side.driver.destroy(None, guest)
