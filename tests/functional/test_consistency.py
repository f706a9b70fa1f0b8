# SPDX-License-Identifier: Apache-2.0
"""What does not go together is found, and only what is ours is ever touched."""

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.sides import Kinds, Side
from virtmigrate import consistency, errors, model, upgrade
from virtmigrate.backends import base, layout
from virtmigrate.consistency import Kind
from virtmigrate.formats import DiskFormat
from virtmigrate.journal import Journal
from virtmigrate.model import Hold, Role, TransferState, VolumeState
from virtmigrate.units import MiB

OPERATION = "0123456789abcdef"
NAME = f"vda.{OPERATION}"
OTHER = f"vdb.{OPERATION}"
OWNER = "11111111-2222-3333-4444-555555555555"
ELSEWHERE = "elsewhere"


@pytest.fixture(scope="module")
def alpha(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("cons-alpha")
    box.remove_host("cons-alpha")


@pytest.fixture(params=["dir-ext4", "lvm", "rbd", "shared_dir"])
def side(
    request: pytest.FixtureRequest,
    alpha: sandbox.Host,
    tmp_path: Path,
    cluster: Callable[[], Ceph],
    machine: Callable[[], sandbox.Machine],
) -> Iterator[Side]:
    kind: str = request.param
    place, on = places.PLACES[kind], machine() if kind in places.AFAR else alpha
    with place(on, "cons", tmp_path / "a", cluster) as values:
        grace = places.GRACE.get(kind, 2)
        made = Side(on, tmp_path / "a", values, f"the{kind}", grace)
        try:
            yield made
        finally:
            with made.libvirt() as conn:
                for domain in conn.listAllDomains(
                    libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
                ):
                    domain.destroy()
            backend = made.driver.node.backends[made.name]
            for pool in (backend.disks, backend.incoming, backend.volumes.pool):
                for name in pool.names():
                    pool.delete(name)
            made.close()


@pytest.fixture
def backend(side: Side) -> base.Backend:
    return side.driver.node.backends[side.name]


def volume(side: Side, backend: base.Backend, **fields: Any) -> model.Volume:
    name = fields.get("name", NAME)
    made = model.Volume(
        name=name,
        pool=backend.incoming.name,
        path=backend.incoming.volume_path(name),
        format=DiskFormat.RAW,
        role=Role.ROOT,
        size=MiB,
        state=VolumeState.INCOMPLETE,
        owner=OWNER,
        operation=OPERATION,
        origin=side.host.name,
    )
    return msgspec.structs.replace(made, **fields)


def found(side: Side) -> list[tuple[str, Kind]]:
    return [(each.name, each.kind) for each in consistency.check(side.driver.node)]


def repaired(side: Side) -> list[str]:
    """What was done for each finding."""
    return [said for _, said in consistency.repair(consistency.check(side.driver.node))]


def test_nothing_is_found_where_all_is_well(side: Side, tmp_path: Path) -> None:
    instance = Kinds(side, side, tmp_path).spawn()
    before = side.volumes()
    assert found(side) == []
    assert side.volumes() == before
    side.driver.destroy(None, instance, None)
    assert found(side) == []


def test_a_record_without_a_volume(
    side: Side, backend: base.Backend, tmp_path: Path
) -> None:
    instance = Kinds(side, side, tmp_path).spawn()
    _, disk = side.disk(instance)
    side.driver.power_off(instance)
    backend.pool(disk.pool).delete(disk.name)
    assert found(side) == [(disk.name, Kind.MISSING)]
    assert repaired(side) == [""]
    assert backend.volumes.read(disk.name).body == disk
    # Of one that is only retired the record is of no use.
    backend.update(
        msgspec.structs.replace(disk, state=VolumeState.RETIRED, owner=OWNER)
    )
    assert any(repaired(side))
    assert backend.volumes.find(disk.name) is None


def test_a_volume_without_a_record(side: Side, backend: base.Backend) -> None:
    backend.incoming.create_raw(NAME, MiB)
    foreign = ["disk.raw", "backup.0123", "image"]
    for name in foreign:
        backend.disks.create_raw(name, MiB)
    # Another host of a shared storage may be receiving it.
    shared = backend.capabilities.shared
    assert found(side) == ([] if shared else [(NAME, Kind.ORPHANED)])
    side.driver.node.conf.set_override("reclaim_age", 60, "virtmigrate")
    assert not any(repaired(side))
    assert {NAME, *foreign} <= {*backend.incoming.names(), *backend.disks.names()}


def test_what_an_operation_left_half_made(side: Side, backend: base.Backend) -> None:
    backend.allocate(volume(side, backend))
    backend.disks.create_raw("foreign", MiB)
    assert found(side) == [(NAME, Kind.HALF_MADE)]
    assert repaired(side) == ["removed"]
    assert found(side) == []
    assert "foreign" in backend.disks.names()
    # Some kinds keep records beside the volumes.
    left = {name.partition(".rec.")[0] for name in backend.volumes.pool.names()}
    assert left - {"foreign"} == {layout.NAME}
    assert {*backend.incoming.names(), *backend.disks.names()} == {"foreign"}


def test_what_is_being_made_is_left_alone(side: Side, backend: base.Backend) -> None:
    here = side.driver.node
    backend.allocate(volume(side, backend))
    before = consistency.check(here)
    with here.locks.instance(OWNER):
        assert found(side) == []
        assert consistency.repair(before) == [(before[0], "")]
    journal = Journal.create(here.journals, OPERATION)
    assert found(side) == []
    assert consistency.repair(before) == [(before[0], "")]
    journal.close()
    assert found(side) == [(NAME, Kind.HALF_MADE)]
    # It became what it was to be after somebody looked.
    ready = volume(side, backend, state=VolumeState.USABLE)
    backend.update(ready)
    assert consistency.repair(before) == [(before[0], "")]
    assert backend.volumes.read(NAME).body == ready
    assert backend.incoming.has(NAME)


def test_what_another_host_makes_is_left_alone(
    side: Side, backend: base.Backend
) -> None:
    backend.allocate(volume(side, backend, origin=ELSEWHERE))
    record = model.Instance(
        uuid=OWNER,
        name="guest",
        owner="x",
        host=ELSEWHERE,
        state=model.InstanceState.HERE,
        operation=OPERATION,
        memory=1,
        vcpus=1,
        disks=(),
    )
    side.driver.node.publish_instance(record)
    other = f"vdb.{OPERATION}"
    backend.allocate(volume(side, backend, name=other))
    usable = volume(side, backend, name=other, state=VolumeState.USABLE)
    for size in (1, 2, 3):
        backend.volumes.publish(
            other, msgspec.structs.replace(usable, size=size), after=size
        )
    before = side.volumes()
    assert found(side) == []
    assert repaired(side) == []
    assert side.volumes() == before


def test_what_a_move_that_is_over_left(side: Side, backend: base.Backend) -> None:
    sent = model.TransferVolume(
        name=NAME,
        backend=backend.name,
        source="vda.old",
        target="vda",
        role=Role.ROOT,
        format=DiskFormat.RAW,
        size=MiB,
        length=MiB,
        room=MiB,
    )
    transfer = model.Transfer(
        operation=OPERATION,
        request="",
        instance=OWNER,
        source=ELSEWHERE,
        peer=side.host.name,
        state=TransferState.RESERVED,
        generation=0,
        volumes=(sent,),
        created=0.0,
    )
    transfers = side.driver.node.mailbox.transfers
    transfers.publish(OPERATION, transfer)
    backend.incoming.create_raw(NAME, MiB)
    assert found(side) == []
    over = msgspec.structs.replace(transfer, state=TransferState.WITHDRAWN)
    transfers.publish(OPERATION, over, after=1)
    assert found(side) == [(NAME, Kind.HALF_MADE)]
    assert repaired(side) == ["removed"]
    assert not backend.incoming.has(NAME)


def test_what_nobody_holds(side: Side, backend: base.Backend) -> None:
    backend.allocate(volume(side, backend))
    backend.update(volume(side, backend, state=VolumeState.USABLE))
    # Where others have the storage and not the records, they may have the instance.
    shared = backend.capabilities.shared
    assert found(side) == ([] if shared else [(NAME, Kind.UNHELD)])
    assert not any(repaired(side))
    assert backend.incoming.has(NAME)


def test_a_clone_without_its_image(side: Side, backend: base.Backend) -> None:
    for name, fields in (
        ("image", {"role": Role.IMAGE, "owner": ""}),
        (NAME, {"parent": "image"}),
        (OTHER, {"backing": "image"}),
    ):
        usable = volume(side, backend, name=name, state=VolumeState.USABLE, **fields)
        backend.allocate(usable)
    assert not [each for each in found(side) if each[1] is Kind.MISSING]
    backend.volumes.remove("image")
    missing = [each for each in found(side) if each[1] is Kind.MISSING]
    assert sorted(missing) == sorted([(NAME, Kind.MISSING), (OTHER, Kind.MISSING)])
    repaired(side)
    assert backend.volumes.find(NAME) and backend.volumes.find(OTHER)


def test_what_is_being_wiped_is_left_alone(side: Side, backend: base.Backend) -> None:
    backend.allocate(volume(side, backend, state=VolumeState.DOOMED))
    assert found(side) == []


def test_old_generations(side: Side, backend: base.Backend, tmp_path: Path) -> None:
    instance = Kinds(side, side, tmp_path).spawn()
    _, disk = side.disk(instance)
    generation = backend.volumes.read(disk.name).generation
    for each in range(generation, generation + 3):
        backend.volumes.publish(disk.name, disk, after=each)
    assert found(side) == [(disk.name, Kind.OLD)]
    assert repaired(side) == ["pruned"]
    assert found(side) == []
    assert backend.volumes.read(disk.name).body == disk


def test_holds_that_are_over(side: Side, backend: base.Backend) -> None:
    holds = (Hold(operation="a", until=1.0), Hold(operation="b", until=2.0**40))
    image = volume(
        side, backend, role=Role.IMAGE, owner="", holds=holds, state=VolumeState.USABLE
    )
    backend.allocate(image)
    assert found(side) == [(NAME, Kind.EXPIRED)]
    assert repaired(side) == ["dropped"]
    assert backend.volumes.read(NAME).body.holds == holds[1:]
    assert found(side) == []


def test_an_instance_without_domain_or_disk(
    side: Side, backend: base.Backend, tmp_path: Path
) -> None:
    instance = Kinds(side, side, tmp_path).spawn()
    here, (_, disk) = side.driver.node, side.disk(instance)
    here.domains.kill(instance.uuid)
    here.domains.undefine(instance.uuid)
    backend.remove(disk.name)
    assert found(side) == [(instance.uuid, Kind.MISSING)] * 2
    assert repaired(side) == ["", ""]
    assert here.own_record(instance.uuid) is not None


def test_an_instance_that_left_without_a_journal(side: Side) -> None:
    record = model.Instance(
        uuid=str(uuid.uuid4()),
        name="guest",
        owner="x",
        host=side.host.name,
        state=model.InstanceState.AWAY,
        operation=OPERATION,
        memory=1,
        vcpus=1,
        disks=(),
    )
    side.driver.node.publish_instance(record)
    assert found(side) == [(record.uuid, Kind.MISSING)]
    Journal.create(side.driver.node.journals, OPERATION)
    assert found(side) == []


# The layout


def test_an_upgrade_goes_on_where_it_was_killed(
    side: Side, backend: base.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def second(on: base.Backend) -> None:
        done.append(f"2 {on.layout.read().body.upgrading}")
        if done.count("2 3") == 1:
            raise KeyboardInterrupt

    backend.allocate(volume(side, backend))
    before = backend.volumes.read(NAME)
    assert upgrade.run(backend).steps == ()
    monkeypatch.setattr(layout, "VERSION", 3)
    with pytest.raises(errors.ConfigurationError, match="no step from 1 to 2"):
        upgrade.run(backend)
    monkeypatch.setattr(upgrade, "STEPS", {1: lambda _: done.append("1"), 2: second})
    assert upgrade.plan(backend).steps == (2, 3)
    with pytest.raises(errors.LayoutRefused, match="storage upgrade"):
        backend.ensure()
    with pytest.raises(KeyboardInterrupt):
        upgrade.run(backend)
    with pytest.raises(errors.LayoutRefused, match="begun"):
        backend.ensure()
    assert upgrade.plan(backend).steps == (3,)
    upgrade.run(backend)
    assert done == ["1", "2 3", "2 3"]
    backend.ensure()
    assert upgrade.plan(backend).steps == ()
    assert backend.volumes.read(NAME) == before
    monkeypatch.setattr(layout, "VERSION", 2)
    for refused in (backend.ensure, lambda: upgrade.run(backend)):
        with pytest.raises(errors.LayoutRefused, match="newer release"):
            refused()
    monkeypatch.undo()
    stored = backend.layout.read()
    backend.layout.change(stored, version=layout.VERSION)


# The command


def test_the_commands(side: Side, backend: base.Backend) -> None:
    def run(*words: str, code: int) -> Any:
        program = [sys.executable, "-m", "virtmigrate.cli.main"]
        argv = [*program, "--config-file", str(side.config), "storage", *words]
        argv += ["-f", "json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    assert run("check", code=0) == []
    backend.allocate(volume(side, backend))
    (row,) = run("check", code=1)
    assert (row["backend"], row["finding"]) == (backend.name, "half-made")
    assert backend.volumes.find(NAME) is not None
    (row,) = run("check", "--repair", code=0)
    assert row["done"] == "removed"
    assert backend.volumes.find(NAME) is None
    for words in (("upgrade", "--dry-run"), ("upgrade",)):
        rows = run(*words, code=0)
        assert {row["backend"]: row["result"] for row in rows} == {
            "files": "layout 1 is current",
            backend.name: "layout 1 is current",
        }
