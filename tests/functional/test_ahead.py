# SPDX-License-Identifier: Apache-2.0
"""Disks that are sent while their guests run: less downtime, and never less proof."""

import os
import time
from typing import Any

import libvirt
import msgspec
import pytest

from tests.functional.conftest import World, digest
from tests.functional.test_delta import add_image, stand_on
from tests.functional.test_failures import At
from virtmigrate import errors
from virtmigrate.model import TransferState
from virtmigrate.progress import Progress, Report
from virtmigrate.units import MiB

SIZE = 24 * MiB


@pytest.fixture
def eager(world: World) -> World:
    world.a.overrides["send_ahead"] = True
    world.a.new_driver()
    return world


def spawn(world: World) -> Any:
    image = world.tmp / "dense"
    image.write_bytes(os.urandom(SIZE))
    return world.spawn(world.a, image)


class Sent:
    """Keeps how much was sent until the guest was stopped, and looks at it then."""

    def __init__(self, world: World, instance: Any) -> None:
        self.ahead = -1
        self.states: set[str | None] = set()
        self._world, self._instance = world, instance
        self.progress = Progress(self, interval=0)

    def __call__(self, report: Report) -> None:
        if report.phase.startswith("sending"):
            self.states.add(self._world.a.state_of(self._instance))
        if report.phase == "stopping" and self.ahead < 0:
            self.ahead = report.sent


def finish(world: World, instance: Any, ticket: str, before: str) -> None:
    (path,) = (world.b.path / "incoming").glob("vda.*")
    assert digest(path) == before
    world.finish(instance, ticket)
    world.confirm(instance)
    world.expect_one(instance, world.b)


def test_all_is_there_before_the_guest_stops(eager: World) -> None:
    instance = spawn(eager)
    before = digest(eager.a.disk(instance))
    sent = Sent(eager, instance)
    eager.a.progress = sent.progress
    ticket = eager.migrate(instance)
    assert sent.ahead == SIZE
    assert sent.progress.sent == SIZE, "nothing changed, so nothing was sent again"
    assert sent.states == {"running"}
    finish(eager, instance, ticket, before)


def test_what_changes_after_it_was_sent_is_sent_again(eager: World) -> None:
    instance = spawn(eager)
    disk = eager.a.disk(instance)

    def write() -> None:
        # As a guest would, behind what was read already.
        with disk.open("r+b") as file:
            file.write(b"changed meanwhile")
            file.seek(5 * MiB)
            before = file.read(MiB + 1)
            file.seek(5 * MiB)
            # Every byte differs: one at random is what it was, once in 256 times.
            file.write(bytes(byte ^ 0xFF for byte in before))

    trouble = At("sending vda ahead", 0.9, write)
    eager.a.progress = trouble.progress
    ticket = eager.migrate(instance)
    assert trouble.happened
    assert eager.a.progress.sent == SIZE + 3 * MiB
    finish(eager, instance, ticket, digest(disk))


def test_a_peer_that_dies_costs_no_downtime(eager: World) -> None:
    instance = spawn(eager)
    boots = eager.a.driver.get_info(instance).id
    trouble = At("sending vda ahead", 0.5, eager.b.host.kill_libvirtd)
    eager.a.progress = trouble.progress
    try:
        with pytest.raises(errors.MigrationRefused):
            eager.migrate(instance)
    finally:
        eager.b.host.start_libvirtd()
    assert trouble.happened
    assert eager.a.driver.get_info(instance).id == boots
    eager.expect_one(instance, eager.a)


def test_cancelled_while_it_runs(eager: World) -> None:
    instance = spawn(eager)
    boots = eager.a.driver.get_info(instance).id
    trouble = At("sending vda ahead", 0.5, lambda: eager.a.progress.cancel())
    eager.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRefused):
        eager.migrate(instance)
    assert eager.a.driver.get_info(instance).id == boots
    eager.expect_one(instance, eager.a)


def test_a_guest_that_is_off_is_sent_once(eager: World) -> None:
    instance = spawn(eager)
    eager.a.driver.power_off(instance)
    phases = []
    eager.a.progress = Progress(lambda report: phases.append(report.phase))
    eager.migrate(instance)
    assert not [phase for phase in phases if "ahead" in phase]
    eager.revert(instance)


@pytest.mark.parametrize("receiver", [True, False], ids=["helped", "alone"])
def test_a_qcow2_file_that_grows_meanwhile(eager: World, receiver: bool) -> None:
    """Its length is another one when the guest is off than when it was planned."""
    eager.b.overrides["receiver"] = receiver
    eager.b.new_driver()
    eager.a.overrides["receiver_timeout"] = 0.3 if not receiver else 3.0
    eager.a.new_driver()
    content = os.urandom(SIZE)
    image = add_image(eager.a, content, "image-here")
    instance = spawn(eager)
    stand_on(eager, eager.a, instance, image)
    overlay = eager.a.disk(instance)
    before = overlay.stat().st_size

    def grow() -> None:
        with overlay.open("r+b") as file:
            file.truncate(before + 3 * MiB + 4096)

    trouble = At("sending vda ahead", 0, grow)
    eager.a.progress = trouble.progress
    ticket = eager.migrate(instance)
    assert trouble.happened
    (path,) = (eager.b.path / "incoming").glob("vda.*")
    assert path.stat().st_size == overlay.stat().st_size > before
    assert digest(path) == digest(overlay)
    # Nothing but a longer file: the image, which is a layer there, went once.
    assert eager.a.progress.sent <= SIZE + 3 * MiB
    eager.finish(instance, ticket)
    eager.confirm(instance)
    assert eager.read(eager.b, instance) == content


# What happens to the guest while its disks are sent


def test_a_disk_that_is_switched_meanwhile_is_refused(eager: World) -> None:
    """Somebody's snapshot: from then on the guest writes to another file."""
    instance = spawn(eager)
    eager.tmp.chmod(0o777)
    boots = eager.a.driver.get_info(instance).id
    xml = (
        "<domainsnapshot><disks><disk name='vda' snapshot='external'>"
        f"<source file='{eager.tmp}/snap.qcow2'/></disk></disks></domainsnapshot>"
    )
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    )

    def snapshot() -> None:
        with eager.a.libvirt() as conn:
            domain = conn.lookupByUUIDString(instance.uuid)
            domain.snapshotCreateXML(xml, flags)

    trouble = At("sending vda ahead", 0.3, snapshot)
    eager.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRefused, match=r"snap\.qcow2"):
        eager.migrate(instance)
    assert trouble.happened
    assert eager.a.driver.get_info(instance).id == boots


def test_a_disk_that_is_switched_while_it_stops_is_put_back(eager: World) -> None:
    instance = spawn(eager)
    real = eager.a.driver.node.domains.stop

    def stop(uuid: str, timeout: float, retry_interval: float) -> bool:
        stopped = real(uuid, timeout, retry_interval)
        with eager.a.libvirt() as conn:
            domain = conn.lookupByUUIDString(uuid)
            other = domain.XMLDesc(2).replace("/vda.", "/other.")
            conn.defineXML(other)
        return stopped

    eager.a.driver.power_off(instance)
    eager.a.driver.node.domains.stop = stop  # type: ignore[method-assign]
    with pytest.raises(errors.MigrationRolledBack, match="its record says"):
        eager.migrate(instance)


def test_a_guest_that_was_shut_down_meanwhile_stays_off(eager: World) -> None:
    instance = spawn(eager)

    def off() -> None:
        with eager.a.libvirt() as conn:
            conn.lookupByUUIDString(instance.uuid).destroy()

    trouble = At("sending vda ahead", 0.5, off)
    eager.a.progress = trouble.progress
    ticket = eager.migrate(instance)
    eager.finish(instance, ticket)
    assert eager.b.state_of(instance) == "shutoff"
    eager.revert(instance)
    assert eager.a.state_of(instance) == "shutoff"


def test_a_reservation_that_was_given_up_costs_no_downtime(eager: World) -> None:
    instance = spawn(eager)
    boots = eager.a.driver.get_info(instance).id

    def withdraw() -> None:
        # What the peer's settle does after reclaim_age.
        transfers = eager.b.driver.node.mailbox.transfers
        (stored,) = eager.b.driver.node.mailbox.open_transfers()
        body = msgspec.structs.replace(stored.body, state=TransferState.WITHDRAWN)
        transfers.publish(stored.name, body, after=stored.generation)

    trouble = At("sending vda ahead", 0.9, withdraw)
    eager.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRefused, match="gave the reservation"):
        eager.migrate(instance)
    assert eager.a.driver.get_info(instance).id == boots
    eager.expect_one(instance, eager.a)


def test_a_reservation_is_renewed_before_the_guest_stops(eager: World) -> None:
    """So that hours of sending do not count against what comes now."""
    instance = spawn(eager)
    transfers = eager.b.driver.node.mailbox

    def age() -> None:
        (stored,) = transfers.open_transfers()
        body = msgspec.structs.replace(stored.body, created=1.0)
        transfers.transfers.publish(stored.name, body, after=stored.generation)

    trouble = At("sending vda ahead", 0.9, age)
    eager.a.progress = trouble.progress
    began = time.time()
    eager.migrate(instance)
    (stored,) = transfers.open_transfers()
    assert stored.body.created >= began
    eager.revert(instance)
