# SPDX-License-Identifier: Apache-2.0
"""Copies that end early, and are gone on with where they were."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import World, digest
from tests.functional.test_failures import At
from tests.functional.test_kills import settings
from virtmigrate import errors, xml
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

SIZE = 48 * MiB
STRETCH = 4 * MiB
AT_RISK = 2 * STRETCH
"""What two workers may have sent without an acknowledgement."""


@pytest.fixture
def patient(world: World) -> World:
    """A world whose copies are tried again, and kept."""
    for node in (world.a, world.b):
        node.overrides |= {
            "retry_timeout": 20.0,
            "resume_age": 600,
            "stream_length": STRETCH // MiB,
        }
        node.new_driver()
    return world


def dense(world: World, size: int = SIZE) -> Path:
    path = world.tmp / "dense"
    path.write_bytes(os.urandom(size))
    return path


def spawn(world: World) -> tuple[Any, str]:
    instance = world.spawn(world.a, dense(world))
    return instance, digest(world.a.disk(instance))


def finish(world: World, instance: Any, ticket: str, before: str) -> None:
    """End the move, and see that what arrived is what was there at power-off."""
    (path,) = (world.b.path / "incoming").glob("vda.*")
    assert digest(path) == before
    world.finish(instance, ticket)
    world.confirm(instance)
    world.expect_one(instance, world.b)


def test_the_peers_libvirtd_is_killed_and_started_again(patient: World) -> None:
    instance, before = spawn(patient)
    host = patient.b.host

    def restart() -> None:
        host.kill_libvirtd()
        threading.Timer(1.0, host.start_libvirtd).start()

    trouble = At("copying", 0.4, restart)
    patient.a.progress = trouble.progress
    ticket = patient.migrate(instance)
    assert trouble.happened
    assert patient.a.progress.sent <= SIZE + AT_RISK
    finish(patient, instance, ticket, before)


def test_the_peers_libvirtd_is_started_again_while_it_verifies(
    patient: World,
) -> None:
    """Asking its receiver is tried again, too: the guest is off meanwhile."""
    instance, before = spawn(patient)
    host = patient.b.host

    def restart() -> None:
        host.kill_libvirtd()
        threading.Timer(1.0, host.start_libvirtd).start()

    trouble = At("verifying", 0, restart)
    patient.a.progress = trouble.progress
    ticket = patient.migrate(instance)
    assert trouble.happened
    finish(patient, instance, ticket, before)


def test_the_peer_goes_away_for_long_and_the_next_attempt_goes_on(
    patient: World,
) -> None:
    patient.a.overrides["retry_timeout"] = 0.5
    patient.a.new_driver()
    instance, before = spawn(patient)
    trouble = At("copying", 0.6, patient.b.host.kill_libvirtd)
    patient.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRolledBack, match="waits there"):
        patient.migrate(instance)
    first = patient.a.progress.sent
    assert patient.a.state_of(instance) == "running"
    (path,) = (patient.b.path / "incoming").glob("vda.*")
    patient.b.host.start_libvirtd()
    patient.a.progress = Progress()
    ticket = patient.migrate(instance)
    assert (patient.b.path / "incoming" / path.name).exists()
    assert patient.a.progress.sent <= SIZE - first + AT_RISK
    finish(patient, instance, ticket, before)


def test_a_killed_process_loses_only_what_was_not_acknowledged(
    patient: World,
) -> None:
    instance, before = spawn(patient)
    sent = run_killed(patient, instance, 0.6)
    for node in (patient.a, patient.b):
        node.new_driver()
    assert patient.a.state_of(instance) == "running", "its guest comes first"
    ticket = patient.migrate(instance)
    assert patient.a.progress.sent <= SIZE - sent + AT_RISK
    finish(patient, instance, ticket, before)


def test_what_changed_meanwhile_is_sent_again(patient: World) -> None:
    """The guest ran again between the attempts, and wrote where it was copied."""
    instance, _ = spawn(patient)
    run_killed(patient, instance, 0.9)
    for node in (patient.a, patient.b):
        node.new_driver()
    patient.a.driver.power_off(instance)
    disk = patient.a.disk(instance)
    with disk.open("r+b") as file:
        for offset in (0, 5 * MiB + 77, SIZE - 1):
            file.seek(offset)
            file.write(b"changed"[: SIZE - offset])
    before = digest(disk)
    patient.a.driver.power_on(None, instance)
    ticket = patient.migrate(instance)
    finish(patient, instance, ticket, before)


def test_a_disk_that_is_to_grow_in_the_second_attempt_is_sent_anew(
    patient: World,
) -> None:
    instance, _ = spawn(patient)
    content = patient.a.disk(instance).read_bytes()
    run_killed(patient, instance, 0.6)
    for node in (patient.a, patient.b):
        node.new_driver()
    ticket = patient.migrate(instance, root_gb=1)
    patient.finish(instance, ticket)
    patient.confirm(instance)
    patient.b.driver.power_off(instance)
    with patient.b.disk(instance).open("rb") as file:
        assert file.read(SIZE) == content
        assert not file.read(MiB).strip(b"\0")
    patient.expect_one(instance, patient.b, "shutoff")


def test_what_waits_goes_when_its_time_is_over(patient: World) -> None:
    patient.a.overrides["resume_age"] = 1
    patient.a.new_driver()
    instance, _ = spawn(patient)
    run_killed(patient, instance, 0.5)
    patient.a.new_driver()
    assert list((patient.b.path / "incoming").glob("vda.*"))
    assert [step for *_, step in patient.a.driver.open_operations()] == ["parked"]
    time.sleep(1.1)
    patient.expect_one(instance, patient.a)


def test_what_a_killed_attempt_asked_goes_with_it(patient: World) -> None:
    """It was killed between making a request and taking it away."""
    patient.a.overrides["resume_age"] = 1
    patient.a.new_driver()
    instance, _ = spawn(patient)
    run_killed(patient, instance, 0.5)
    patient.a.new_driver()
    ((operation, *_),) = patient.a.driver.open_operations()
    mailbox = patient.b.driver.node.mailbox.pool
    for name in (
        f"{operation}.0.answer",
        f"{operation}.63.request",
        "b" * 16 + ".0.answer",
    ):
        mailbox.create_raw(name, 4096)
    time.sleep(1.1)
    patient.a.driver.settle()
    letters = [name for name in mailbox.names() if not name.startswith("host.")]
    assert letters == ["b" * 16 + ".0.answer"]
    mailbox.delete(letters[0])
    patient.expect_one(instance, patient.a)


def test_a_second_attempt_that_is_cancelled_at_once_leaves_nothing(
    patient: World,
) -> None:
    instance, _ = spawn(patient)
    run_killed(patient, instance, 0.5)
    patient.a.new_driver()
    trouble = At("preparing", 0, lambda: patient.a.progress.cancel())
    patient.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRefused):
        patient.migrate(instance)
    assert trouble.happened
    patient.expect_one(instance, patient.a)


def test_a_receiver_that_was_silent_is_asked_again(patient: World) -> None:
    patient.a.overrides |= {"receiver_timeout": 0.3, "retry_timeout": 0.5}
    patient.a.new_driver()
    patient.b.overrides["receiver"] = False
    patient.b.new_driver()
    instance, before = spawn(patient)
    trouble = At("copying", 0.6, patient.b.host.kill_libvirtd)
    patient.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRolledBack):
        patient.migrate(instance)
    patient.b.host.start_libvirtd()
    patient.b.overrides["receiver"] = True
    patient.b.new_driver()
    patient.a.progress = Progress()
    helps = patient.a.driver.peer(patient.b.host.name)._help
    ticket = patient.migrate(instance)
    (operation,) = (op for op, *_ in patient.a.driver.open_operations())
    assert helps(operation)._asker._silence is None
    finish(patient, instance, ticket, before)


def test_a_cancelled_move_leaves_nothing(patient: World) -> None:
    instance, _ = spawn(patient)
    trouble = At("copying", 0.5, lambda: patient.a.progress.cancel())
    patient.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRolledBack):
        patient.migrate(instance)
    patient.expect_one(instance, patient.a)


def test_a_disk_that_is_gone_in_the_second_attempt_leaves_nothing(
    patient: World,
) -> None:
    instance = patient.spawn(patient.a, dense(patient), ephemeral_gb=1)
    run_killed(patient, instance, 0.5)
    for node in (patient.a, patient.b):
        node.new_driver()
    here = patient.a.driver.node
    patient.a.driver.power_off(instance)
    record = here.entitled(instance.uuid)
    keep = tuple(ref for ref in record.disks if ref.target != "vdb")
    with patient.a.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        tree = xml.parse(domain.XMLDesc(2))
        for disk in tree.findall("devices/disk"):
            if xml.attribute_at(disk, "target", "dev") == "vdb":
                tree.find("devices").remove(disk)  # type: ignore[union-attr]
        conn.defineXML(xml.write(tree))
    here.publish_instance(msgspec.structs.replace(record, disks=keep))
    for ref in record.disks:
        if ref not in keep:
            here.backend("local").remove(ref.volume)
    assert list((patient.b.path / "incoming").glob("vdb.*"))
    ticket = patient.migrate(instance)
    patient.finish(instance, ticket)
    patient.confirm(instance)
    patient.expect_one(instance, patient.b, "shutoff")


def test_a_move_elsewhere_leaves_what_waits_alone(patient: World) -> None:
    """A peer that does not know the transfer any more gets all of it anew."""
    instance, before = spawn(patient)
    run_killed(patient, instance, 0.5)
    for node in (patient.a, patient.b):
        node.new_driver()
    (operation,) = (op for op, *_ in patient.a.driver.open_operations())
    patient.b.driver.node.mailbox.transfers.remove(operation)
    ticket = patient.migrate(instance)
    assert patient.a.progress.sent >= SIZE
    (path,) = (patient.b.path / "incoming").glob(f"vda.[!{operation[0]}]*")
    assert digest(path) == before
    patient.finish(instance, ticket)
    patient.confirm(instance)


def run_killed(world: World, instance: Any, share: float) -> int:
    """Move it in a process that dies at a share of the copy; return what was sent."""
    world.a.driver.cleanup_host(world.a.host.name)
    program = f"""
import json, os, signal, sys, types
from tests.functional import killed
from virtmigrate.progress import Progress
plan = json.loads(sys.argv[1])
driver = killed.driver(plan["a"])
def listen(report):
    if report.phase.startswith("copying") and report.done >= {share} * report.total:
        # At once: several threads may come by here.
        os.write(1, b"%d\\n" % progress.sent)
        os.kill(os.getpid(), signal.SIGKILL)
progress = Progress(listen, interval=0)
driver._progress = lambda: progress
guest = types.SimpleNamespace(uuid={instance.uuid!r}, name="guest")
driver.migrate_disk_and_power_off(None, guest, {world.b.host.name!r}, None)
"""
    plan = json.dumps({"a": settings(world.a)})
    argv = [sys.executable, "-c", program, plan]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return int(done.stdout.split()[0])
