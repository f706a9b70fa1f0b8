# SPDX-License-Identifier: Apache-2.0
"""Cold migration between two real hosts."""

import contextlib
import os
import time
from pathlib import Path

import msgspec
import pytest

from sandbox import watch
from tests.functional.conftest import World, digest
from virtmigrate import errors
from virtmigrate.units import GiB, MiB


def test_migrate_and_confirm(world: World) -> None:
    instance = world.spawn(world.a)
    assert world.a.state_of(instance) == "running"
    before = digest(world.a.disk(instance))

    ticket = world.migrate(instance)
    assert world.a.state_of(instance) is None
    world.finish(instance, ticket)
    assert world.b.state_of(instance) == "running"
    assert digest(world.b.disk(instance)) == before

    world.a.driver.confirm_migration(None, None, instance, None)
    world.b.driver.settle()
    assert world.a.files() == []
    kinds = {name.partition("/")[0] for name in world.b.files()}
    assert kinds == {"disks", "records", "instances"}


def test_migrate_and_revert(world: World) -> None:
    instance = world.spawn(world.a)
    before = digest(world.a.disk(instance))
    owned = world.a.files()

    ticket = world.migrate(instance)
    world.finish(instance, ticket)
    with pytest.raises(errors.NotRevertible):
        world.a.driver.finish_revert_migration(None, instance)
    world.b.driver.destroy(None, instance, None)
    assert world.b.state_of(instance) is None
    world.a.driver.finish_revert_migration(None, instance)

    assert world.a.state_of(instance) == "running"
    assert digest(world.a.disk(instance)) == before
    disks = [name for name in owned if name.startswith("disks/")]
    assert [n for n in world.a.files() if n.startswith("disks/")] == disks
    world.b.driver.settle()
    assert [n for n in world.b.files() if "instances/" not in n] == []


def test_resize_grows_root_and_adds_memory(world: World) -> None:
    instance = world.spawn(world.a, root_gb=1)
    ticket = world.migrate(instance, root_gb=2, memory_mb=96, vcpus=2)
    world.finish(instance, ticket, resize_instance=True)

    disk = world.b.disk(instance)
    assert disk.stat().st_size == 2 * GiB
    info = world.b.driver.get_info(instance)
    assert (info.max_memory, info.vcpus) == (96 * MiB, 2)


def test_shrinking_is_refused_before_anything_is_touched(world: World) -> None:
    instance = world.spawn(world.a, root_gb=2)
    with pytest.raises(errors.MigrationRefused, match="shrink"):
        world.migrate(instance, root_gb=1)
    assert world.a.state_of(instance) == "running"


def test_several_disks_and_a_config_drive(world: World) -> None:
    instance = world.instance(ephemeral_gb=1)
    instance.config_drive_path = str(world.image(MiB, seed=7))
    meta = {"path": str(world.image()), "disk_format": "raw"}
    world.a.driver.spawn(None, instance, meta)
    before = {t: digest(world.a.disk(instance, t)) for t in ("vda", "vdb", "sda")}

    ticket = world.migrate(instance, ephemeral_gb=2)
    world.finish(instance, ticket)

    assert world.b.disk(instance, "vdb").stat().st_size == 2 * GiB
    for target in ("vda", "sda"):
        assert digest(world.b.disk(instance, target)) == before[target]


def test_interfaces_are_plugged_at_the_peer(world: World) -> None:
    vif = {"address": "52:54:00:11:22:33", "type": "bridge"}
    instance = world.instance()
    meta = {"path": str(world.image()), "disk_format": "raw"}
    here = [{**vif, "network": {"bridge": "br0"}, "devname": "taphere"}]
    there = [{**vif, "network": {"bridge": "br0"}, "devname": "tapthere"}]
    world.a.driver.spawn(None, instance, meta, network_info=here)
    assert "taphere" in world.a.xml(instance)
    ticket = world.migrate(instance)
    world.finish(instance, ticket, network_info=there)
    xml = world.b.xml(instance)
    assert "tapthere" in xml and "taphere" not in xml and vif["address"] in xml


def test_an_instance_that_is_off_stays_off(world: World) -> None:
    instance = world.spawn(world.a)
    world.a.driver.power_off(instance)
    ticket = world.migrate(instance)
    world.finish(instance, ticket)
    assert world.b.state_of(instance) == "shutoff"
    world.b.driver.power_on(None, instance)
    assert world.b.state_of(instance) == "running"


def test_each_method_can_be_called_again(world: World) -> None:
    instance = world.spawn(world.a)
    ticket = world.migrate(instance)
    assert world.migrate(instance) == ticket
    world.a.new_driver()
    assert world.migrate(instance) == ticket
    world.finish(instance, ticket)
    world.b.new_driver()
    world.finish(instance, ticket)
    for _ in range(2):
        world.a.driver.confirm_migration(None, None, instance, None)
    world.a.new_driver().confirm_migration(None, None, instance, None)
    assert world.b.state_of(instance) == "running"
    with pytest.raises(errors.Error):
        world.a.driver.finish_revert_migration(None, instance)


def test_revert_before_the_peer_took_it(world: World) -> None:
    instance = world.spawn(world.a)
    before = digest(world.a.disk(instance))
    ticket = world.migrate(instance)
    world.a.driver.finish_revert_migration(None, instance)
    assert world.a.state_of(instance) == "running"
    assert digest(world.a.disk(instance)) == before
    with pytest.raises(errors.NotEntitled):
        world.finish(instance, ticket)
    assert world.b.state_of(instance) is None
    assert world.b.files() == []


def test_confirm_waits_for_the_peer(world: World) -> None:
    instance = world.spawn(world.a)
    owned = world.a.files()
    ticket = world.migrate(instance)
    with pytest.raises(errors.NotConfirmable):
        world.a.driver.confirm_migration(None, None, instance, None)
    assert [n for n in owned if "disks/" in n] == [
        n for n in world.a.files() if "disks/" in n
    ]
    world.finish(instance, ticket)
    world.a.driver.confirm_migration(None, None, instance, None)


def test_a_damaged_ticket_is_refused(world: World) -> None:
    instance = world.spawn(world.a)
    ticket = world.migrate(instance)
    with pytest.raises(errors.TicketDamaged):
        world.finish(instance, ticket.replace("vda", "vdb"))
    world.finish(instance, ticket)
    assert world.b.state_of(instance) == "running"


def test_moving_on_and_back(world: World) -> None:
    """A chain of moves leaves nothing behind and keeps the content."""
    instance = world.spawn(world.a)
    before = digest(world.a.disk(instance))
    there, back = (world.a, world.b), (world.b, world.a)
    for src, dst in (there, back, there):
        ticket = src.driver.migrate_disk_and_power_off(
            None, instance, dst.host.name, None, None
        )
        dst.driver.finish_migration(None, None, instance, ticket, None)
        src.driver.confirm_migration(None, None, instance, None)
        dst.driver.settle()
        assert [n for n in src.files() if "instances/" not in n] == []
    assert digest(world.b.disk(instance)) == before


def test_nobody_may_start_it_while_it_moves(world: World) -> None:
    instance = world.spawn(world.a)
    world.migrate(instance)
    with pytest.raises(errors.NotEntitled):
        world.a.driver.power_on(None, instance)
    with pytest.raises(errors.RecordMissing):
        world.b.driver.power_on(None, instance)


def test_a_confirmed_move_is_not_reverted(world: World) -> None:
    """The confirm dies halfway and the peer closes: still never two."""
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    broken = world.a.driver.node.backends["local"]
    remove = broken.remove
    broken.remove = dying  # type: ignore[method-assign]
    with pytest.raises(OSError, match="died"):
        world.confirm(instance)
    broken.remove = remove  # type: ignore[method-assign]
    world.b.driver.settle()
    with pytest.raises(errors.NotRevertible):
        world.a.driver.finish_revert_migration(None, instance)
    assert world.a.state_of(instance) is None
    world.expect_one(instance, world.b)


def dying(name: str) -> None:
    raise OSError("died")


def test_a_lost_transfer_record_is_no_right_to_run(world: World) -> None:
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    for path in (world.b.path / "mailbox").rglob("*.rec.*"):
        if not path.name.startswith("host."):
            path.unlink()
    with pytest.raises(errors.MigrationUndecided, match="lost the record"):
        world.a.driver.finish_revert_migration(None, instance)
    assert world.a.state_of(instance) is None


@pytest.mark.parametrize("place", ["apart", "shared"])
def test_destroy_at_the_source_while_it_is_away(world: World, place: str) -> None:
    if place == "shared":
        world.share()
    instance = world.spawn(world.a)
    before = world.a.disk(instance).read_bytes()
    ticket = world.migrate(instance)
    with pytest.raises(errors.InvalidState, match="confirm or revert"):
        world.a.driver.destroy(None, instance)
    world.finish(instance, ticket)
    with contextlib.suppress(errors.InvalidState):
        world.a.driver.destroy(None, instance)
    assert world.b.state_of(instance) == "running"
    assert world.read(world.b, instance) == before


def test_moving_on_before_confirm_is_refused(world: World) -> None:
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    with pytest.raises(errors.MigrationRefused, match="neither confirmed"):
        world.b.driver.migrate_disk_and_power_off(None, instance, "alpha", None)
    world.confirm(instance)
    world.expect_one(instance, world.b)


def test_power_on_is_remembered_over_a_restart(world: World) -> None:
    """finish_migration(power_on=False) fails halfway; the restart keeps it off."""
    instance = world.spawn(world.a)
    ticket = world.migrate(instance)
    domains = world.b.driver.node.domains
    domains.define = lambda *_, **__: dying("")  # type: ignore[method-assign]
    with pytest.raises(OSError, match="died"):
        world.finish(instance, ticket, power_on=False)
    world.b.new_driver()
    assert world.b.state_of(instance) == "shutoff"


def test_a_revert_that_cannot_ask_is_done_later(world: World) -> None:
    instance = world.spawn(world.a)
    world.migrate(instance)
    world.b.host.stop_libvirtd()
    try:
        with pytest.raises(errors.MigrationUndecided):
            world.a.driver.finish_revert_migration(None, instance)
        assert world.a.state_of(instance) is None
    finally:
        world.b.host.start_libvirtd()
    world.a.driver.settle()
    world.expect_one(instance, world.a)


def test_broken_records_and_journals_of_others_stop_nobody(world: World) -> None:
    (world.b.path / "mailbox/beta/0123.rec.1").write_bytes(b"half a record")
    world.a.driver.node.journals.mkdir(parents=True, exist_ok=True)
    (world.a.driver.node.journals / "x.journal").write_bytes(b"damaged\nlines\nhere\n")
    world.b.new_driver()
    world.a.new_driver()
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    world.confirm(instance)
    assert world.b.state_of(instance) == "running"


def test_room_that_is_to_stay_free(world: World) -> None:
    world.b.backend["reserved_mib"] = 10**9
    world.b.new_driver()
    instance = world.spawn(world.a)
    with pytest.raises(errors.MigrationRefused, match="room"):
        world.migrate(instance)


@pytest.mark.parametrize("versions", [{"records": (99,)}, {"tickets": (99,)}])
def test_a_peer_that_reads_nothing_of_ours_is_refused(
    world: World, versions: dict[str, tuple[int, ...]]
) -> None:
    cards = world.b.driver.node.mailbox.cards
    stored = cards.read("host")
    other = msgspec.structs.replace(stored.body, **versions)
    cards.publish("host", other, after=stored.generation)
    instance = world.spawn(world.a)
    with pytest.raises(errors.MigrationRefused, match="reads"):
        world.migrate(instance)
    assert world.a.state_of(instance) == "running"


def test_a_saved_instance_is_refused(world: World) -> None:
    instance = world.spawn(world.a)
    world.a.driver.suspend(None, instance)
    with pytest.raises(errors.MigrationRefused, match="managed save"):
        world.migrate(instance)
    world.a.driver.resume(None, instance)
    assert world.a.state_of(instance) == "running"


def test_only_qemu_is_started(world: World) -> None:
    """No process of ours is made for a move; libvirtd makes QEMU and helpers."""
    hosts = (world.a.host, world.b.host)
    instance = world.spawn(world.a)
    with (
        watch.programs([h.libvirtd_pid for h in hosts]) as theirs,
        watch.programs([os.getpid()]) as ours,
    ):
        world.finish(instance, world.migrate(instance))
        world.confirm(instance)
    assert ours.names == set()
    assert theirs.names == {"qemu-system-x86_64"}


def test_uefi_variables_go_along(world: World) -> None:
    instance = world.instance(memory_mb=128)
    firmware = Path("/usr/share/OVMF")
    meta = {
        "path": str(world.image()),
        "disk_format": "raw",
        "loader": str(firmware / "OVMF_CODE_4M.fd"),
        "nvram_template": str(firmware / "OVMF_VARS_4M.fd"),
    }
    world.a.driver.spawn(None, instance, meta)
    world.a.driver.power_off(instance)
    (before,) = (world.a.path / "disks").glob("nvram.*")
    content = before.read_bytes()

    ticket = world.migrate(instance)
    world.finish(instance, ticket)
    (after,) = (world.b.path / "disks").glob("nvram.*")
    assert after.read_bytes() == content
    world.b.driver.power_on(None, instance)
    assert str(after) in world.b.xml(instance)
    world.confirm(instance)
    world.expect_one(instance, world.b)


def test_an_operators_word_that_the_peer_is_lost(world: World) -> None:
    """It counts while the peer is away; what the peer has then stays untouched."""
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    with pytest.raises(errors.NotRevertible, match="has it"):
        world.a.driver.finish_revert_migration(None, instance, peer_is_lost=True)
    there = world.b.disk(instance)
    world.b.host.stop_libvirtd()
    try:
        world.a.driver.finish_revert_migration(None, instance, peer_is_lost=True)
        assert world.a.state_of(instance) == "running"
    finally:
        world.b.host.start_libvirtd()
    (left,) = world.a.driver.settle()
    assert "has it" in left
    assert there.exists()
    assert len(world.a.driver.open_operations()) == 1, left
    world.b.driver.destroy(None, instance, None)
    world.expect_one(instance, world.a)


def test_a_debt_at_a_lost_peer_is_written_off(world: World) -> None:
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    ((operation, *_),) = world.a.driver.open_operations()
    with pytest.raises(errors.MigrationError, match="more than a clean-up"):
        world.a.driver.write_off(operation)
    world.b.host.stop_libvirtd()
    try:
        world.a.driver.finish_revert_migration(None, instance, peer_is_lost=True)
        assert world.a.driver.open_operations()
        with pytest.raises(errors.MigrationError, match="might come back"):
            world.a.driver.write_off(operation)
    finally:
        world.b.host.start_libvirtd()
    with pytest.raises(errors.MigrationError, match="the peer has it"):
        world.a.driver.write_off(operation)
    world.b.driver.node.mailbox.transfers.remove(operation)
    (left,) = world.a.driver.settle()
    assert "lost the record" in left
    with pytest.raises(errors.MigrationError, match="may run it"):
        world.a.driver.write_off(operation)
    world.a.driver.write_off(operation, peer_is_lost=True)
    assert world.a.driver.open_operations() == []
    with pytest.raises(errors.MigrationError, match="no such move"):
        world.a.driver.write_off(operation)
    assert world.a.state_of(instance) == "running"


def test_a_debt_is_written_off_on_an_operators_word(world: World) -> None:
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    ((operation, *_),) = world.a.driver.open_operations()
    world.b.host.stop_libvirtd()
    try:
        world.a.driver.finish_revert_migration(None, instance, peer_is_lost=True)
        world.a.driver.write_off(operation, peer_is_lost=True)
        assert world.a.driver.open_operations() == []
    finally:
        world.b.host.start_libvirtd()


def test_debts_are_paid_from_time_to_time(world: World) -> None:
    world.a.overrides["settle_interval"] = 0.2
    instance = world.spawn(world.a)
    world.migrate(instance)
    world.a.new_driver()
    try:
        world.b.host.stop_libvirtd()
        try:
            with pytest.raises(errors.MigrationUndecided):
                world.a.driver.finish_revert_migration(None, instance)
        finally:
            world.b.host.start_libvirtd()
        deadline = time.monotonic() + 20
        while world.a.state_of(instance) != "running" and time.monotonic() < deadline:
            time.sleep(0.1)
        assert world.a.state_of(instance) == "running"
    finally:
        world.a.driver.cleanup_host("alpha")
        world.a.overrides["settle_interval"] = 0.0
        world.a.new_driver()


def test_a_suspended_instance_is_destroyed(world: World) -> None:
    instance = world.spawn(world.a)
    world.a.driver.suspend(None, instance)
    world.a.driver.destroy(None, instance, None)
    assert world.a.state_of(instance) is None
    assert not list((world.a.path / "disks").iterdir())
