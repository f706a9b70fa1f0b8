# SPDX-License-Identifier: Apache-2.0
"""Moves that fail before the hand-over: all is as it was."""

import threading
from pathlib import Path

import pytest

from tests.functional.conftest import World, digest
from virtmigrate import errors
from virtmigrate.progress import Progress, Report
from virtmigrate.units import MiB


class At:
    """Does something once, when a phase is at some share."""

    def __init__(self, phase: str, share: float, act: object) -> None:
        self._phase, self._share, self._act = phase, share, act
        self.progress = Progress(self, interval=0)
        self.happened = False

    def __call__(self, report: Report) -> None:
        there = report.phase.startswith(self._phase) and (
            report.total == 0 or report.done >= self._share * report.total
        )
        if there and not self.happened:
            self.happened = True
            self._act()  # type: ignore[operator]


def fail_at(world: World, phase: str, share: float, act: object) -> errors.Error:
    """Move an instance, with something happening; return what was raised."""
    instance = world.spawn(world.a, world.image(16 * MiB))
    before = digest(world.a.disk(instance))
    trouble = At(phase, share, act)
    world.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRolledBack) as raised:
        world.migrate(instance)
    assert trouble.happened
    assert world.a.state_of(instance) == "running"
    assert digest(world.a.disk(instance)) == before
    world.instance_moved = instance  # type: ignore[attr-defined]
    return raised.value


def moved(world: World) -> object:
    return world.instance_moved  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_cancelled(world: World, share: float) -> None:
    error = fail_at(world, "copying", share, lambda: world.a.progress.cancel())
    assert isinstance(error.__cause__, errors.Cancelled)
    world.expect_one(moved(world), world.a)


def flip(world: World) -> None:
    """Flip a bit of what arrived at the peer."""
    (path,) = (world.b.path / "incoming").glob("vda.*")
    with path.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_byte_at_the_peer_is_sent_again(world: World) -> None:
    instance = world.spawn(world.a, world.image(16 * MiB))
    before = digest(world.a.disk(instance))
    trouble = At("verifying", 0, lambda: flip(world))
    world.a.progress = trouble.progress
    ticket = world.migrate(instance)
    assert trouble.happened
    (path,) = (world.b.path / "incoming").glob("vda.*")
    assert digest(path) == before
    world.finish(instance, ticket)
    world.confirm(instance)
    world.expect_one(instance, world.b)


def test_a_byte_that_is_flipped_again_and_again_is_never_accepted(
    world: World,
) -> None:
    def spoil() -> None:
        flip(world)
        trouble.happened = False

    instance = world.spawn(world.a, world.image(16 * MiB))
    trouble = At("verifying", 0, spoil)
    trouble.progress = Progress(trouble, interval=1e9)
    world.a.progress = trouble.progress
    with pytest.raises(errors.MigrationRolledBack) as raised:
        world.migrate(instance)
    assert isinstance(raised.value.__cause__, errors.VerificationFailed)
    world.expect_one(instance, world.a)


def test_the_peer_dies_and_comes_back(world: World) -> None:
    error = fail_at(world, "copying", 0.3, world.b.host.kill_libvirtd)
    try:
        assert isinstance(error.__cause__, errors.HostError)
        assert "owed" in str(error)
        assert len(world.a.driver.open_operations()) == 1
        world.a.driver.settle()
        assert len(world.a.driver.open_operations()) == 1
    finally:
        world.b.host.start_libvirtd()
    world.expect_one(moved(world), world.a)


def test_the_peer_stops_answering(world: World) -> None:
    world.a.overrides["call_timeout"] = 1.5
    world.a.new_driver()
    error = fail_at(world, "copying", 0.3, world.b.host.freeze)
    world.b.host.thaw()
    assert isinstance(error.__cause__, errors.HostTimeout | errors.HostUnreachable)
    world.expect_one(moved(world), world.a)


def test_the_peers_disk_fills_up(world: World) -> None:
    world.b.clear()
    world.b.host.mount_storage(48 * MiB)
    try:
        world.b.new_driver()
        filler = world.b.host.storage / "filler"

        def fill() -> None:
            free = 48 * MiB
            with filler.open("wb") as file:
                while free:
                    try:
                        file.write(bytes(64 * 1024))
                        file.flush()
                    except OSError:
                        return
                    free -= 64 * 1024

        fail_at(world, "copying", 0, fill)
        filler.unlink()
        world.expect_one(moved(world), world.a)
    finally:
        world.b.clear()
        world.b.host.unmount_storage()


def test_no_room_costs_no_downtime(world: World) -> None:
    world.b.clear()
    world.b.host.mount_storage(8 * MiB)
    try:
        world.b.new_driver()
        instance = world.spawn(world.a, world.image(16 * MiB))
        boots = world.a.driver.get_info(instance).id
        with pytest.raises(errors.MigrationRefused, match="room"):
            world.migrate(instance)
        assert world.a.driver.get_info(instance).id == boots
        world.expect_one(instance, world.a)
    finally:
        world.b.clear()
        world.b.host.unmount_storage()


def test_a_peer_without_encryption_is_refused(world: World) -> None:
    refused(world, world.b.host.tcp_uri, errors.InsecureConnection)


def test_a_peer_without_encryption_can_be_allowed(world: World) -> None:
    world.a.overrides["peer_uri"] = world.b.host.tcp_uri
    world.a.overrides["allow_insecure_peers"] = [world.b.host.name]
    world.a.new_driver()
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    assert world.b.state_of(instance) == "running"


def test_an_untrusted_certificate_is_refused(world: World) -> None:
    pki = world.box.make_pki("other-ca")
    refused(world, world.b.host.uri_with(pki), errors.CertificateRefused)


def test_a_peer_that_knows_nothing_of_us_is_refused(world: World) -> None:
    world.b.clear()
    refused(world, world.b.host.uri, errors.PoolNotFound)


def refused(world: World, uri: str, kind: type[errors.Error]) -> None:
    """Expect a move over this URI to be refused, and nothing touched."""
    world.a.overrides["peer_uri"] = uri
    world.a.new_driver()
    instance = world.spawn(world.a)
    boots = world.a.driver.get_info(instance).id
    with pytest.raises(errors.MigrationRefused) as raised:
        world.migrate(instance)
    assert isinstance(raised.value.__cause__, kind)
    assert world.a.driver.get_info(instance).id == boots


def test_two_moves_cannot_overcommit(world: World) -> None:
    """Room for one of two: they never both get it."""
    world.b.clear()
    world.b.host.mount_storage(24 * MiB)
    try:
        world.b.new_driver()
        instances = [world.spawn(world.a, world.image(16 * MiB)) for _ in range(2)]
        results = at_once([lambda i=i: world.migrate(i) for i in instances])
        given = [r for r in results if isinstance(r, str)]
        assert len(given) <= 1
        for result in results:
            assert isinstance(result, str | errors.MigrationRefused), result
    finally:
        world.b.clear()
        world.b.host.unmount_storage()


def at_once(calls: list[object]) -> list[object]:
    """Run calls in threads; return results or what they raised."""
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()  # type: ignore[operator]
        except Exception as e:
            results[index] = e

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


HEADER = b"QFI\xfb\0\0\0\x03"


def hostile(path: Path, kind: str) -> None:
    """Let the beginning of a raw image look like qcow2 that names other files."""
    name = b"/etc/passwd"
    head = bytearray(4096)
    head[:8] = HEADER
    if kind == "backing":
        head[8:16] = (512).to_bytes(8, "big")
        head[16:20] = len(name).to_bytes(4, "big")
        head[512 : 512 + len(name)] = name
    head[20:24] = (16).to_bytes(4, "big")
    size = 1 << 40 if kind == "huge" else 8 * MiB
    head[24:32] = size.to_bytes(8, "big")
    head[36:40] = (1).to_bytes(4, "big")
    if kind == "data-file":
        head[79] = 4
        head[104:108] = (0x44415441).to_bytes(4, "big")
        head[108:112] = len(name).to_bytes(4, "big")
        head[112 : 112 + len(name)] = name
    head[96:100] = (4).to_bytes(4, "big")
    head[100:104] = (104).to_bytes(4, "big")
    with path.open("r+b") as file:
        file.write(head)


@pytest.mark.parametrize("kind", ["backing", "data-file", "huge"])
def test_what_a_guest_wrote_is_never_believed(world: World, kind: str) -> None:
    """A raw disk whose guest wrote a qcow2 header stays raw, byte for byte."""
    instance = world.spawn(world.a)
    world.a.driver.power_off(instance)
    disk = world.a.disk(instance)
    hostile(disk, kind)
    world.a.driver.power_on(None, instance)
    before = disk.read_bytes()

    world.finish(instance, world.migrate(instance, root_gb=1))
    grown = world.b.disk(instance).read_bytes()
    assert grown[: len(before)] == before
    assert len(grown) == 1024 * MiB
    assert not any(grown[len(before) :])
    world.revert(instance)
    assert world.a.disk(instance).read_bytes() == before
    world.expect_one(instance, world.a)
