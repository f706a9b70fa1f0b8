# SPDX-License-Identifier: Apache-2.0
"""Never two, never lost: things that happen at the worst moment."""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import World
from virtmigrate import errors, model
from virtmigrate.formats import DiskFormat
from virtmigrate.migration import undo
from virtmigrate.model import TransferState
from virtmigrate.units import MiB


def moved(world: World) -> Any:
    """An instance that was moved to b and is not confirmed."""
    made = world.spawn(world.a)
    world.finish(made, world.migrate(made))
    return made


def after(owner: Any, name: str, act: Callable[[], object]) -> None:
    """Let something happen right after the next call of a method, once."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, method)
        result = method(*args, **kwargs)
        act()
        return result

    setattr(owner, name, call)


def test_a_confirm_that_is_cut_off_can_still_be_reverted(world: World) -> None:
    made = moved(world)
    transfers = world.a.driver.peer("beta").transfers
    publish = transfers.publish

    def cut(*_: object, **__: object) -> None:
        raise errors.HostUnreachable(host="beta", reason="cable")

    transfers.publish = cut  # type: ignore[method-assign,assignment]
    with pytest.raises(errors.HostUnreachable):
        world.confirm(made)
    transfers.publish = publish  # type: ignore[method-assign]
    world.revert(made)
    world.expect_one(made, world.a)


def test_confirm_and_destroy_at_once(world: World) -> None:
    """Whoever comes first wins; the other is refused, and one copy is left."""
    made = moved(world)

    def confirm() -> None:
        with pytest.raises(errors.NotConfirmable):
            world.confirm(made)

    after(world.b.driver.node.domains, "undefine", confirm)
    world.b.driver.destroy(None, made)
    world.a.driver.finish_revert_migration(None, made)
    world.expect_one(made, world.a)


def test_destroy_while_the_confirm_is_written(world: World) -> None:
    made = moved(world)
    transfers = world.a.driver.peer("beta").transfers
    publish = transfers.publish

    def late(*args: Any, **kwargs: Any) -> Any:
        world.b.driver.destroy(None, made)
        return publish(*args, **kwargs)

    transfers.publish = late  # type: ignore[method-assign]
    with pytest.raises(errors.RecordConflict):
        world.confirm(made)
    transfers.publish = publish  # type: ignore[method-assign]
    world.a.driver.finish_revert_migration(None, made)
    world.expect_one(made, world.a)


def test_a_killed_give_back_is_finished(world: World) -> None:
    made = moved(world)
    backend = world.b.driver.node.backends["local"]
    backend.remove = lambda _: (_ for _ in ()).throw(OSError("died"))  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError, match="died"):
        world.b.driver.destroy(None, made)
    with pytest.raises(errors.NotConfirmable):
        world.confirm(made)
    world.b.new_driver()
    world.a.driver.finish_revert_migration(None, made)
    world.expect_one(made, world.a)


def test_a_broken_transfer_record_is_no_leave_to_delete(world: World) -> None:
    world.share()
    made = world.spawn(world.a)
    disk = world.a.disk(made)
    world.finish(made, world.migrate(made))
    for path in (world.b.path / "mailbox/beta").glob("*.rec.*"):
        if not path.name.startswith("host."):
            path.write_bytes(b"\1" * 4096)
    with pytest.raises(errors.Error):
        world.b.driver.destroy(None, made)
    assert disk.exists()


def test_started_while_it_is_stopped(world: World) -> None:
    """A domain that was started is transient after undefine: the move fails."""
    made = world.spawn(world.a)
    domains = world.a.driver.node.domains
    undefine = domains.undefine

    def late(uuid: str) -> None:
        domains.undefine = undefine  # type: ignore[method-assign]
        domains.start(uuid)
        undefine(uuid)

    domains.undefine = late  # type: ignore[assignment, method-assign]
    with pytest.raises(errors.MigrationRolledBack, match="somebody started it"):
        world.migrate(made)
    assert world.a.state_of(made) == "running"
    assert world.b.state_of(made) is None
    world.expect_one(made, world.a)
    assert not world.a.driver.node.domains.burdens(made.uuid)


def test_spawn_of_what_is_away(world: World) -> None:
    made = moved(world)
    meta = {"path": str(world.image()), "disk_format": "raw"}
    with pytest.raises(errors.InstanceExists):
        world.a.driver.spawn(None, made, meta)
    assert world.a.state_of(made) is None
    world.revert(made)
    world.expect_one(made, world.a)


def test_a_lost_journal_is_no_leave_to_delete(world: World) -> None:
    made = world.spawn(world.a)
    world.migrate(made)
    for path in world.a.driver.node.journals.iterdir():
        path.unlink()
    with pytest.raises(errors.InvalidState):
        world.a.driver.destroy(None, made)
    assert any(name.startswith("disks/") for name in world.a.files())


def test_nothing_is_removed_without_a_record_of_the_instance(world: World) -> None:
    """Disks that hosts share, and records of instances that they do not."""
    world.share()
    made = world.spawn(world.a)
    disk = world.a.disk(made)
    world.b.driver.node.instances.remove(made.uuid)
    world.b.driver.destroy(None, made)
    assert disk.exists()


# What a peer wrote


def forged(world: World, **changes: Any) -> model.Transfer:
    """A transfer as a bad peer could write it into b's mailbox."""
    victim = moved(world)
    world.confirm(victim)
    world.b.driver.settle()
    world.victim = victim  # type: ignore[attr-defined]
    record = world.b.driver.node.entitled(victim.uuid)
    evil = "00000000-0000-4000-8000-00000000000e"
    volume = model.TransferVolume(
        name=record.disks[0].volume,
        backend="local",
        source="x",
        target="vda",
        role=model.Role.ROOT,
        format=DiskFormat.RAW,
        size=8 * MiB,
        length=8 * MiB,
        room=0,
    )
    transfer = model.Transfer(
        operation="fedcba9876543210",
        request="-",
        instance=evil,
        source="alpha",
        peer="beta",
        state=TransferState.TAKEN,
        generation=1,
        volumes=(volume,),
        created=time.time(),
        record=msgspec.structs.replace(record, uuid=evil, name="evil"),
    )
    transfer = msgspec.structs.replace(transfer, **changes)
    world.b.driver.node.mailbox.transfers.publish(transfer.operation, transfer)
    return transfer


@pytest.mark.parametrize("state", ["taken", "returned", "returning", "reserved"])
def test_forged_transfers_touch_nothing(world: World, state: str) -> None:
    forged(world, state=TransferState(state), created=0.0)
    before = [n for n in world.b.files() if "mailbox" not in n]
    world.b.new_driver()
    world.b.driver.settle()
    assert [n for n in world.b.files() if "mailbox" not in n] == before
    assert world.b.state_of(world.victim) == "running"  # type: ignore[attr-defined]
    assert len(world.b.driver.list_instances()) == 1


def test_a_domain_with_more_than_its_disks_is_refused(world: World) -> None:
    """The XML comes from the peer: it may name nothing beside what was sent."""
    made = world.spawn(world.a)
    ticket = world.migrate(made)
    stored = world.b.driver.node.mailbox.transfers.find(ticket.split('"')[5])
    assert stored is not None and stored.body.record is not None
    xml = str(stored.body.record.domain_xml)
    disk = "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
    disk += "<source file='/etc/passwd'/><target dev='vdz' bus='virtio'/></disk>"
    record = msgspec.structs.replace(
        stored.body.record, domain_xml=xml.replace("</devices>", f"{disk}</devices>")
    )
    body = msgspec.structs.replace(stored.body, record=record)
    world.b.driver.node.mailbox.transfers.publish(
        stored.name, body, after=stored.generation
    )
    with pytest.raises(errors.TicketDamaged):
        world.finish(made, ticket)
    assert world.b.state_of(made) is None


# Nothing wedged


def test_merging_a_deeper_chain(world: World) -> None:
    """Back before the first layer was merged: each merge goes one layer down."""
    world.share()
    made = moved(world)
    world.confirm(made)
    before = world.read(world.b, made)
    ticket = world.b.driver.migrate_disk_and_power_off(None, made, "alpha", None)
    world.a.driver.finish_migration(None, None, made, ticket, None)
    world.b.driver.confirm_migration(None, None, made)
    world.a.driver.settle()
    world.a.driver.settle()
    record = world.a.driver.node.entitled(made.uuid)
    top = world.a.driver.node.files.layers(record.disks[0].volume)[0].source
    assert str(world.a.disk(made)) == top
    assert world.read(world.a, made) == before
    ticket = world.migrate(made)
    world.finish(made, ticket)
    assert world.b.state_of(made) == "running"


def test_a_revert_that_dies_after_it_won(world: World) -> None:
    made = world.spawn(world.a)
    world.migrate(made)
    restore = undo.Undo._restore
    undo.Undo._restore = lambda *_: (_ for _ in ()).throw(OSError("died"))  # type: ignore[method-assign]
    try:
        with pytest.raises(OSError, match="died"):
            world.a.driver.finish_revert_migration(None, made)
    finally:
        undo.Undo._restore = restore  # type: ignore[method-assign]
    for path in (world.b.path / "mailbox/beta").glob("*.rec.*"):
        if not path.name.startswith("host."):
            path.unlink()
    world.a.driver.finish_revert_migration(None, made)
    world.expect_one(made, world.a)


def test_an_arrival_without_its_volume_stops_nobody(world: World) -> None:
    made = world.spawn(world.a)
    ticket = world.migrate(made)
    (disk,) = (world.b.path / "incoming").glob("vda.*")
    disk.unlink()
    with pytest.raises(errors.VolumeNotFound):
        world.finish(made, ticket)
    world.b.new_driver()
    world.a.driver.finish_revert_migration(None, made)
    world.expect_one(made, world.a)


def test_what_the_user_turned_off_stays_off(world: World) -> None:
    made = world.spawn(world.a)
    ticket = world.migrate(made)
    world.finish(made, ticket)
    world.b.driver.power_off(made)
    world.finish(made, ticket)
    world.b.new_driver()
    assert world.b.state_of(made) == "shutoff"


def test_a_disk_that_ends_within_a_sector(world: World) -> None:
    image = world.tmp / "odd.raw"
    image.write_bytes(bytes(2 * MiB) + b"x" * 100)
    made = world.spawn(world.a, image)
    assert world.a.disk(made).stat().st_size % 4096 == 0
    world.finish(made, world.migrate(made))
    assert world.read(world.b, made)[: 2 * MiB + 100] == image.read_bytes()


def test_settling_all_the_time_beside_moves(world: World) -> None:
    """Both hosts settle in threads while an instance goes to and fro."""
    made = world.spawn(world.a, world.image(2 * MiB))
    over, raised = threading.Event(), []

    def settle(driver: Any) -> None:
        while not over.is_set():
            try:
                driver.settle()
            except Exception as e:
                raised.append(e)

    threads = [
        threading.Thread(target=settle, args=(node.driver,))
        for node in (world.a, world.b)
    ]
    for thread in threads:
        thread.start()
    try:
        for src, dst in ((world.a, world.b), (world.b, world.a)) * 2:
            ticket = src.driver.migrate_disk_and_power_off(
                None, made, dst.host.name, None
            )
            dst.driver.finish_migration(None, None, made, ticket, None)
            src.driver.confirm_migration(None, None, made)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert raised == []
    world.expect_one(made, world.a)


def test_a_broken_record_is_refused_and_left(world: World) -> None:
    made = world.spawn(world.a)
    (path,) = (world.a.path / "instances").glob(f"{made.uuid}.rec.2")
    for each in (world.a.path / "instances").glob(f"{made.uuid}.rec.*"):
        each.write_bytes(b"\1" * 4096)
    with pytest.raises(errors.MigrationRefused, match="broken"):
        world.migrate(made)
    with pytest.raises(errors.RecordBroken):
        world.a.driver.node.publish_instance(
            model.Instance(
                uuid=made.uuid,
                name="x",
                owner="x",
                host="alpha",
                state=model.InstanceState.HERE,
                operation="x",
                memory=1,
                vcpus=1,
                disks=(),
            )
        )
    assert path.read_bytes() == b"\1" * 4096
    assert world.a.state_of(made) == "running"


@pytest.mark.parametrize("area", ["disks", "incoming", "records"])
def test_what_a_killed_proof_left_is_swept(world: World, area: str) -> None:
    (world.a.path / area / "nonce.alpha.1000.0123").touch()
    (world.a.path / area / "nonce.beta.1000.0123").touch()
    world.a.driver.settle()
    left = [name for name in world.a.files() if "nonce." in name]
    assert left == [f"{area}/nonce.beta.1000.0123"], "another host's stays"
