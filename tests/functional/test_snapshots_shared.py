# SPDX-License-Identifier: Apache-2.0
"""Snapshots of instances whose disks several hosts see, when their host dies."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.sides import Kinds, Side
from tests.functional.test_tenures import hosts, kill_guests, made, put, tenure
from virtmigrate import domainstate, merging, model
from virtmigrate.snapshot import Return, Snapshots, Wanted, creation, reverting
from virtmigrate.snapshot.work import Work

__all__ = ["hosts"]


@pytest.fixture(params=["shared_dir", "rbd"])
def kinds(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with made(request.param, hosts, tmp_path, cluster) as found:
        yield found


@pytest.fixture
def files(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with made("shared_dir", hosts, tmp_path, cluster) as found:
        yield found


def first(kinds: Kinds, instance: Any) -> int:
    """The byte that its host reads at the beginning of the disk."""
    return int(kinds.b.content(instance)[0])


def dies(
    kinds: Kinds,
    instance: Any,
    at: tuple[Any, str],
    work: Callable[[], object],
    *,
    before: bool,
) -> None:
    """Let the host die before or after it calls something, with its guest."""
    owner, name = at
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> None:
        if not before:
            real(*args, **kwargs)
        if kinds.a.state_of(instance) == "running":
            put(kinds.a, 7)
        raise KeyboardInterrupt

    def dead(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(creation.Creation, "recover", dead)
        patch.setattr(reverting.Reverting, "undo", dead)
        patch.setattr(owner, name, dying)
        with pytest.raises(KeyboardInterrupt):
            work()
    kill_guests(kinds.a)


def taken_over(kinds: Kinds, instance: Any) -> Snapshots:
    kinds.b.driver.take_over(instance.uuid, host_is_down=True, power_on=False)
    assert kinds.b.driver.settle() == []
    return kinds.b.driver.snapshots


def ends(kinds: Kinds, instance: Any) -> None:
    """Remove it, on the host that lost it, too: nothing is left."""
    for side in (kinds.a, kinds.b):
        side.driver.destroy(None, instance, None)
    assert not [name for name in kinds.b.volumes() if "vda" in name]
    assert tenure(kinds.b, instance) is None


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_it_dies_while_a_snapshot_is_taken(files: Kinds, before: bool) -> None:
    """What the guest wrote last is there, in whichever layer it came to."""
    instance = files.spawn()
    put(files.a, 1)
    taken = files.a.driver.snapshots.create
    at = (domainstate.States, "freeze")
    dies(files, instance, at, lambda: taken(instance.uuid, Wanted("s")), before=before)
    taken_over(files, instance)
    assert first(files, instance) == 7
    files.b.driver.power_on(None, instance, None)
    ends(files, instance)


@pytest.mark.parametrize("at", ["told", "pivot"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_it_dies_while_a_layer_is_merged(files: Kinds, at: str, before: bool) -> None:
    instance = files.spawn()
    snapshots, uuid = files.a.driver.snapshots, instance.uuid
    put(files.a, 1)
    snapshots.create(uuid, Wanted("s1"))
    put(files.a, 2)
    snapshots.create(uuid, Wanted("s2"))
    put(files.a, 3)
    where = (Work, "foretell") if at == "told" else (merging, "_pivot")
    dies(files, instance, where, lambda: snapshots.delete(uuid, "s2"), before=before)
    there = taken_over(files, instance)
    # It stood still, or had written below already.
    assert first(files, instance) in (3, 7)
    assert [each.name for each in there.all(uuid)[0]] == ["s1"]
    there.revert(uuid, Return("s1", power="off"))
    assert first(files, instance) == 1
    ends(files, instance)


@pytest.mark.parametrize("name", ["kill", "define"])
def test_it_dies_while_it_goes_back(kinds: Kinds, name: str) -> None:
    instance = kinds.spawn()
    snapshots, uuid = kinds.a.driver.snapshots, instance.uuid
    put(kinds.a, 1)
    snapshots.create(uuid, Wanted("s1"))
    put(kinds.a, 2)
    at = (domainstate.States, name)
    dies(kinds, instance, at, lambda: snapshots.revert(uuid, Return("s1")), before=True)
    there = taken_over(kinds, instance)
    assert kinds.b.state_of(instance) == "running"
    kinds.b.driver.power_off(instance)
    assert first(kinds, instance) == 1
    assert [each.name for each in there.all(uuid)[0]] == ["s1"]
    ends(kinds, instance)


def test_who_takes_it_over_has_its_snapshots(kinds: Kinds) -> None:
    instance = kinds.spawn()
    snapshots, uuid = kinds.a.driver.snapshots, instance.uuid
    for number in (1, 2):
        put(kinds.a, number)
        snapshots.create(uuid, Wanted(f"s{number}"))
    put(kinds.a, 3)
    record = tenure(kinds.b, instance)
    assert record is not None
    assert [each.name for each in record.record.snapshots] == ["s1", "s2"]
    kill_guests(kinds.a)
    there = taken_over(kinds, instance)
    assert first(kinds, instance) == 3
    for number in (2, 1):
        there.revert(uuid, Return(f"s{number}", power="off"))
        assert first(kinds, instance) == number
    ends(kinds, instance)
    assert not [name for name in kinds.b.volumes() if "vda" in name]


def test_it_dies_while_a_failed_snapshot_is_undone(files: Kinds) -> None:
    """Who takes it over looks for no layers that are gone."""
    instance = files.spawn()
    uuid = instance.uuid
    put(files.a, 1)
    drop = Work.drop_made

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    def dying(work: Work, operation: str) -> None:
        drop(work, operation)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(domainstate.States, "freeze", fails)
        patch.setattr(Work, "drop_made", dying)
        files.a.driver.snapshots.create(uuid, Wanted("s"))
    kill_guests(files.a)
    there = taken_over(files, instance)
    assert first(files, instance) == 1
    assert there.all(uuid) == ((), None)
    ends(files, instance)


@pytest.fixture
def named(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    """Each host calls what both have by a name of its own."""
    with contextlib.ExitStack() as stack:
        sides = []
        for side, host in zip("ab", hosts, strict=True):
            where = tmp_path / side
            place = places.PLACES["shared_dir"](host, "tenures", where, cluster)
            values = stack.enter_context(place)
            sides.append(Side(host, where, values, f"its{side}"))
            stack.callback(sides[-1].close)
        yield Kinds(sides[0], sides[1], tmp_path)


def test_what_is_left_open_is_finished_by_its_own_names(named: Kinds) -> None:
    instance, a = named.spawn(), named.a
    snapshots, uuid = a.driver.snapshots, instance.uuid
    put(a, 1)
    snapshots.create(uuid, Wanted("s1"))
    put(a, 2)
    here = a.driver.node
    gone = model.DiskRef(
        target="vdx", volume="nowhere", backend="files", role=model.Role.DATA
    )
    found = msgspec.structs.replace(here.entitled(uuid), detached=(gone,))
    here.publish_instance(found)
    here.tenures.amend(found)
    at = (merging, "_pivot")
    dies(named, instance, at, lambda: snapshots.delete(uuid, "s1"), before=True)
    there = taken_over(named, instance)
    record = named.b.driver.node.entitled(uuid)
    assert {ref.backend for ref in record.disks} == {"itsb"}
    assert (record.change, record.detached) == (None, ())
    assert there.all(uuid) == ((), None)
    assert first(named, instance) in (2, 7)
    ends(named, instance)
