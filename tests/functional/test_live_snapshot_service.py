# SPDX-License-Identifier: Apache-2.0
"""Instances that become images of an image service, as a compute service asks for it.

The service is a stand-in; guests, their agents and their hosts are real.
"""

import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional import guestdisk, test_agent
from tests.functional.conftest import World
from tests.functional.test_agent import KILL, wait_for
from tests.functional.test_live_snapshot import expect_clean, raw_of, to_file
from tests.functional.test_live_snapshot_kills import service as service
from tests.functional.test_snapshot_quiesce import Guest
from tests.unit.imageservice import Service
from virtmigrate import errors, livesnapshot
from virtmigrate.livesnapshot import Quiesce
from virtmigrate.units import MiB

IMAGE = "2e4b6dca-9700-4715-b81d-4463cd7038de"
DELETED = 64 * MiB


class Asked:
    """What a compute service is told of the instance's state."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str | None]] = []
        self.error: Exception | None = None

    def __call__(self, *, task_state: str, expected_state: str | None = None) -> None:
        self.states.append((task_state, expected_state))
        if self.error is not None:
            raise self.error


@pytest.fixture
def asked(world: World, service: Service) -> Iterator[Asked]:
    world.a.overrides["image_service_cloud"] = "here"
    world.a.new_driver()
    service.queue(IMAGE)
    yield Asked()


@pytest.fixture
def instance(world: World, asked: Asked) -> Any:
    made = world.spawn(world.a)
    guestdisk.write(world.a, made, 7)
    return made


def test_as_a_compute_service_asks(
    world: World, instance: Any, service: Service, asked: Asked, tmp_path: Path
) -> None:
    instance.project_id, instance.os_type = "a-project", None
    expected = world.read(world.a, instance)
    world.a.driver.snapshot(None, instance, IMAGE, asked)
    assert asked.states == [
        ("image_pending_upload", None),
        ("image_uploading", "image_pending_upload"),
    ]
    entry = service.images[IMAGE]
    assert (entry["status"], entry["name"]) == ("active", "wanted")
    assert (entry["disk_format"], entry["container_format"]) == ("qcow2", "bare")
    assert entry["image_state"] == "available" and entry["owner_id"] == "a-project"
    assert "os_type" not in entry
    path = tmp_path / "stored"
    path.write_bytes(service.data[IMAGE])
    assert raw_of(path, "qcow2", tmp_path) == expected
    expect_clean(world.a, instance)


def test_raw_and_what_it_is_made_of(
    world: World, instance: Any, service: Service, asked: Asked
) -> None:
    expected = world.read(world.a, instance)
    (saved,) = world.a.driver.live_snapshot(None, instance, IMAGE, asked, format="raw")
    assert service.data[IMAGE] == expected
    assert saved.digest == "sha512:" + service.images[IMAGE]["os_hash_value"]
    # An instance is made of it again, by its id.
    other = world.instance()
    world.a.driver.spawn(None, other, {"id": IMAGE, "disk_format": "raw"})
    assert guestdisk.byte(world, other) == 7


@pytest.mark.parametrize("what", ["flip", "lost", "broken", "refused"])
def test_no_image_where_the_service_has_another(
    world: World, instance: Any, service: Service, asked: Asked, what: str
) -> None:
    if what == "flip":
        service.faults.flip = True
    elif what == "lost":
        service.faults.lost = 1
    elif what == "broken":
        service.faults.break_after = MiB
    else:
        service.faults.refuse["PUT"] = 413
    with pytest.raises(errors.ImageNotSaved) as caught:
        world.a.driver.snapshot(None, instance, IMAGE, asked)
    assert isinstance(caught.value.__cause__, errors.ImageNotTaken)
    assert service.images == {} and service.data == {}
    guestdisk.write(world.a, instance, 9)
    expect_clean(world.a, instance)


def test_an_image_that_has_bytes_is_not_touched(
    world: World, instance: Any, service: Service, asked: Asked
) -> None:
    service.queue(IMAGE, status="active", size=5)
    with pytest.raises(errors.ImageNotTaken, match="it is active"):
        world.a.driver.snapshot(None, instance, IMAGE, asked)
    assert service.images[IMAGE]["size"] == 5 and asked.states == []
    expect_clean(world.a, instance)


def test_what_the_compute_service_raises_goes_on(
    world: World, instance: Any, service: Service, asked: Asked
) -> None:
    """As when the instance is being deleted."""
    asked.error = RuntimeError("unexpected task state")
    with pytest.raises(RuntimeError, match="unexpected task state"):
        world.a.driver.snapshot(None, instance, IMAGE, asked)
    expect_clean(world.a, instance)


def test_a_service_that_is_away_is_asked_again(
    world: World, instance: Any, service: Service, asked: Asked
) -> None:
    """What is not cleared away is said, and settled when it is back."""
    service.faults.flip = True
    service.faults.refuse["DELETE"] = 503
    with pytest.raises(errors.ImageNotSaved, match="host settle"):
        world.a.driver.snapshot(None, instance, IMAGE, asked)
    assert world.a.driver.snapshots.all(instance.uuid) == ((), None)
    (left,) = world.a.driver.settle()
    assert "may still be there" in left
    service.faults.refuse.clear()
    assert world.a.driver.settle() == []
    assert service.images == {}
    expect_clean(world.a, instance)


def a_guest(world: World, **options: object) -> Guest:
    """An instance with an agent; its driver has these options."""
    found = Guest(world)
    found.node.overrides |= {"image_service_cloud": "here", **options}
    found.node.new_driver()
    return found


def sh(guest: Guest, script: str) -> None:
    """Have the guest run a script."""
    shell = test_agent.Guest.__new__(test_agent.Guest)
    with guest.node.libvirt() as conn:
        shell.domain = conn.lookupByUUIDString(guest.instance.uuid)
        shell.sh(script)


@pytest.mark.timeout(300)
def test_guests_are_quiesced_and_trimmed(
    world: World, service: Service, asked: Asked, tmp_path: Path
) -> None:
    """With an agent, and without."""
    guest = a_guest(world)
    driver, instance = guest.node.driver, guest.instance

    def save(**options: Any) -> livesnapshot.Saved:
        service.queue(IMAGE)
        return driver.live_snapshot(None, instance, IMAGE, asked, **options)[0]

    def with_property(name: str) -> None:
        instance.image_meta = types.SimpleNamespace(properties={name: "yes"})

    with_property("os_require_quiesce")
    assert save(trim=True).consistency == "file system"
    guest.expect_it_goes_on()
    expect_trimmed(guest, tmp_path)
    driver.quiesce(None, instance, None)
    driver.unquiesce(None, instance, None)
    with pytest.raises(errors.QuiesceFailed, match="nobody has it frozen"):
        driver.unquiesce(None, instance, None)
    sh(guest, KILL)
    wait_for(lambda: guest.agent() == "disconnected")
    with pytest.raises(errors.AgentNotThere):
        save()
    assert service.images[IMAGE]["status"] == "queued"
    with pytest.raises(errors.AgentNotThere):
        save(quiesce=Quiesce.NO, trim=True)
    with_property("hw_qemu_guest_agent")
    assert save().consistency == "crash"
    guest.expect_it_goes_on()
    expect_clean(guest.node, instance)


def expect_trimmed(guest: Guest, tmp: Path) -> None:
    """What was deleted in the guest is in an image, until it is discarded."""
    fill = f"dd if=/dev/urandom of=/files/x bs=1M count={DELETED // MiB}; sync"
    sh(guest, f"{fill}; rm /files/x; sync; echo GONE >/dev/ttyS0")
    wait_for(lambda: "GONE" in guest.console.read_text(errors="replace"), 60)
    sizes = []
    for number in range(2):
        wanted = to_file(tmp / f"{number}", all_disks=True, trim=bool(number))
        saved = guest.node.driver.saves.save(guest.instance.uuid, wanted)
        sizes += [each.size for each in saved if each.disk == "vdb"]
    assert sizes[0] > DELETED > sizes[1]


@pytest.mark.timeout(300)
def test_a_guest_stays_frozen_between_two_calls(
    world: World, service: Service, asked: Asked
) -> None:
    """Until it is thawed, or its limit is over."""
    guest = a_guest(world, freeze_limit=4.0)
    driver = guest.node.driver
    driver.quiesce(None, guest.instance, None)
    guest.expect_it_goes_on()
    with pytest.raises(errors.QuiesceFailed, match="It is thawed"):
        driver.unquiesce(None, guest.instance, None)


def test_new_images_of_all_disks(world: World, service: Service, asked: Asked) -> None:
    instance = world.spawn(world.a, ephemeral_gb=1)
    where = str(uuid.uuid4())
    target = livesnapshot.Target(kind=livesnapshot.Kind.SERVICE, where=where, name="n")
    wanted = livesnapshot.Wanted(target=target, format="qcow2", all_disks=True)
    found = world.a.driver.saves.save(instance.uuid, wanted)
    entries = [service.images[each.place.removeprefix("glance:")] for each in found]
    assert [each["name"] for each in entries] == ["n", "n-vdb"]
    assert [each["min_disk"] for each in entries] == [1, 1]
    expect_clean(world.a, instance)
