# SPDX-License-Identifier: Apache-2.0
"""Who may run an instance whose disks several hosts see, and how another gets it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import msgspec
import pytest

import sandbox
from sandbox import guest
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.sides import Kinds, Side, between
from tests.functional.test_kinds import Cancelling
from virtmigrate import errors, model, takeover
from virtmigrate.tenure import Tenures
from virtmigrate.units import GiB, MiB

LONG = 60.0


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("ten-alpha"), box.add_host("ten-beta")
    for name in ("ten-alpha", "ten-beta"):
        box.remove_host(name)


@contextlib.contextmanager
def made(
    kind: str,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp: Path,
    cluster: Callable[[], Ceph],
    **options: Any,
) -> Iterator[Kinds]:
    """Two hosts that have one backend; each calls it by a name of its own."""
    with contextlib.ExitStack() as stack:
        sides, found = [], []
        for side, host in zip("ab", hosts, strict=True):
            place = places.PLACES[kind](host, "tenures", tmp / side, cluster)
            found.append(stack.enter_context(place))
        for side, host, values in zip("ab", hosts, found, strict=True):
            sides.append(Side(host, tmp / side, values, f"the{kind}", **options))
            stack.callback(sides[-1].close)
        yield Kinds(sides[0], sides[1], tmp)


@pytest.fixture(params=["rbd", "shared_dir"])
def kinds(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with made(request.param, hosts, tmp_path, cluster) as found:
        yield found


@pytest.fixture
def rbd(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with made("rbd", hosts, tmp_path, cluster) as found:
        yield found


def tenure(side: Side, instance: Any) -> model.Tenure | None:
    stored = side.driver.node.backends[side.name].tenures.find(instance.uuid)
    return stored.body if stored else None


def holder(side: Side, instance: Any) -> tuple[str, str | None]:
    """Who may run it, and whom it was passed on to."""
    found = tenure(side, instance)
    assert found is not None
    return found.host, found.peer


def writes(side: Side, instance: Any, judge: Side, pattern: int) -> bool:
    """Write to a running guest's disk through QEMU; tell whether the storage took it.

    Arguments:
        judge: a host that sees the disk, and has a record of it.
        pattern: a byte that was not there.
    """
    device = "/machine/peripheral/virtio-disk0/virtio-backend"
    order = f'qemu-io -d {device} "write -f -P {pattern} 0 512"'
    command = {
        "execute": "human-monitor-command",
        "arguments": {"command-line": order},
    }
    before = judge.root(instance)
    with side.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        libvirt_qemu.qemuMonitorCommand(domain, json.dumps(command), 0)
    return judge.root(instance) != before


def pretend(side: Side, other: Side, instance: Any) -> None:
    """Make a host believe that an instance of another is its own."""
    here, there = side.driver.node, other.driver.node
    found = there.instances.read(instance.uuid).body
    record = msgspec.structs.replace(found, host=here.name)
    wanted = takeover._placed(here, record)
    xml = there.domains.xml(instance.uuid)
    here.publish_instance(wanted)
    here.domains.define(xml)


@contextlib.contextmanager
def away(side: Side) -> Iterator[None]:
    """Cut a host off: from its peers, and its guests from their storage in Ceph."""
    assert isinstance(side.host, sandbox.Host)
    side.host.link(up=False)
    try:
        yield
    finally:
        side.host.link(up=True)


def kill_guests(side: Side) -> None:
    assert isinstance(side.host, sandbox.Host)
    for pid in side.host.qemu_pids():
        os.kill(pid, signal.SIGKILL)


def test_started_by_one_it_is_refused_to_another(kinds: Kinds) -> None:
    instance = kinds.spawn()
    assert holder(kinds.b, instance) == ("ten-alpha", None)
    pretend(kinds.b, kinds.a, instance)
    starts: list[Callable[[], None]] = [
        lambda: kinds.b.driver.power_on(None, instance, None),
        lambda: kinds.b.driver.reboot(None, instance, None, "HARD"),
        lambda: kinds.b.driver.node.restore(instance.uuid, "/nowhere"),
    ]
    for start in starts:
        with pytest.raises(errors.HeldElsewhere, match=r"ten-alpha's.*take-over"):
            start()
    assert kinds.b.state_of(instance) == "shutoff"
    with pytest.raises(errors.MigrationRefused, match="ten-alpha's"):
        kinds.b.driver.migrate_disk_and_power_off(
            None, instance, "ten-alpha", kinds.flavor(kinds.a), None
        )
    # What is not its own any more it does not remove.
    kinds.b.driver.destroy(None, instance, None)
    assert kinds.b.state_of(instance) is None
    kinds.a.driver.reboot(None, instance, None, "HARD")
    assert kinds.a.state_of(instance) == "running"
    kinds.a.driver.destroy(None, instance, None)
    assert tenure(kinds.b, instance) is None


def test_off_it_is_still_its_hosts(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.a.driver.power_off(instance)
    pretend(kinds.b, kinds.a, instance)
    with pytest.raises(errors.HeldElsewhere):
        kinds.b.driver.power_on(None, instance, None)
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.power_on(None, instance, None)
    kinds.a.driver.destroy(None, instance, None)


def test_a_move_passes_it_on(kinds: Kinds) -> None:
    instance = kinds.spawn()
    ticket = kinds.a.driver.migrate_disk_and_power_off(
        None, instance, kinds.b.host.name, kinds.flavor(kinds.b), None
    )
    assert holder(kinds.a, instance) == ("ten-alpha", "ten-beta")
    kinds.b.driver.finish_migration(None, None, instance, ticket, None)
    assert holder(kinds.a, instance) == ("ten-beta", None)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    assert holder(kinds.a, instance) == ("ten-beta", None)
    kinds.b.driver.settle()
    kinds.b.driver.reboot(None, instance, None, "HARD")
    kinds.b.driver.destroy(None, instance, None)
    assert tenure(kinds.a, instance) is None


def test_of_one_that_is_off_too(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.a.driver.power_off(instance)
    kinds.move(instance)
    assert holder(kinds.a, instance) == ("ten-beta", None)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


def test_a_peer_by_another_name_is_refused(kinds: Kinds) -> None:
    """It would not be let in, and be told so after the hand-over."""
    instance = kinds.spawn()
    kinds.a.configure(peer_uris=f"friend:{kinds.b.host.uri}")
    with pytest.raises(errors.MigrationRefused, match="calls itself ten-beta"):
        kinds.a.driver.migrate_disk_and_power_off(
            None, instance, "friend", kinds.flavor(kinds.b), None
        )
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.driver.open_operations() == []
    assert holder(kinds.a, instance) == ("ten-alpha", None)
    kinds.a.driver.destroy(None, instance, None)


def test_a_revert_gives_it_back(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.move(instance)
    kinds.b.driver.destroy(None, instance, None)
    assert holder(kinds.a, instance) == ("ten-beta", "ten-alpha")
    kinds.a.driver.finish_revert_migration(None, instance)
    assert holder(kinds.a, instance) == ("ten-alpha", None)
    assert kinds.a.state_of(instance) == "running"
    kinds.a.driver.destroy(None, instance, None)


def test_a_revert_before_the_peer_took_it(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.a.driver.migrate_disk_and_power_off(
        None, instance, kinds.b.host.name, kinds.flavor(kinds.b), None
    )
    kinds.a.driver.finish_revert_migration(None, instance)
    assert holder(kinds.a, instance) == ("ten-alpha", None)
    assert kinds.a.state_of(instance) == "running"
    kinds.a.driver.destroy(None, instance, None)


def test_a_rollback_leaves_what_was_taken_over(rbd: Kinds) -> None:
    """Its disk is not made what it was when the move began: another one has it."""
    instance = rbd.spawn()
    side = rbd.a
    name, volume = side.disk(instance)
    backend = side.driver.node.backend(name)

    class TakenOver(Cancelling):
        def phase(self, phase: str, total: int = 0) -> None:
            if phase == "handing over":
                wanted = side.driver.node.instances.read(instance.uuid).body
                third = Tenures({name: backend}, "third")
                third.seize(wanted, is_down=True)
                target = backend.target(volume.name, volume.size)
                with target.writer(volume.size, lambda: None) as writer:
                    writer.write(0, b"of the third host")
            super().phase(phase, total)

    side.driver._progress = lambda: TakenOver()
    with pytest.raises(errors.NotRevertible, match="third took the instance over"):
        rbd.move(instance)
    (left,) = side.driver.settle()
    end(side, instance, left)
    source = backend.source(volume, volume.size)
    with source:
        assert (source.read(0, MiB) or b"").startswith(b"of the third host")
    assert side.state_of(instance) is None
    backend.tenures.remove(instance.uuid)
    backend.remove(volume.name)


def end(side: Side, instance: Any, said: str) -> None:
    """End a move of what a third host took over, as an error says."""
    (operation,) = [each[0] for each in side.driver.open_operations()]
    assert f"virtmigrate host write-off {operation}" in said
    argv = [sys.executable, "-m", "virtmigrate.cli.main"]
    argv += ["--config-file", str(side.config), "host", "write-off", "-f", "json"]
    done = subprocess.run(
        [*argv, operation], capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["owes"] == "nothing"
    assert side.driver.open_operations() == []
    assert side.driver.settle() == []
    assert side.driver.node.instances.find(instance.uuid) is None
    found = tenure(side, instance)
    assert found is not None
    assert found.host == "third" and side.host.name not in found.lost


def seized(side: Side, instance: Any) -> model.Volume:
    """Have a third host take an instance over; return its disk."""
    name = side.name
    found = tenure(side, instance)
    assert found is not None
    backend = side.driver.node.backend(name)
    (ref,) = found.record.disks
    wanted = msgspec.structs.replace(
        found.record, disks=(msgspec.structs.replace(ref, backend=name),)
    )
    Tenures({name: backend}, "third").seize(wanted, is_down=True)
    return backend.volumes.read(ref.volume).body


def clear(side: Side, instance: Any) -> None:
    """Remove what is the third host's."""
    backend = side.driver.node.backend(side.name)
    backend.tenures.remove(instance.uuid)
    for name in backend.volumes.names():
        if backend.volumes.read(name).body.owner == instance.uuid:
            backend.remove(name)


@pytest.mark.parametrize("is_taken", [False, True], ids=["given", "taken"])
def test_a_third_host_took_it_over_in_a_move(kinds: Kinds, is_taken: bool) -> None:
    """Its source can end the move, and leaves what is the third host's."""
    instance = kinds.spawn()
    ticket = kinds.a.driver.migrate_disk_and_power_off(
        None, instance, kinds.b.host.name, kinds.flavor(kinds.b), None
    )
    if is_taken:
        kinds.b.driver.finish_migration(None, None, instance, ticket, None)
    disk = seized(kinds.a, instance)
    (operation,) = [each[0] for each in kinds.a.driver.open_operations()]
    if is_taken:
        with pytest.raises(errors.NotRevertible, match="destroy it there first"):
            kinds.a.driver.write_off(operation)
        (left,) = kinds.b.driver.settle()
        assert "third's now" in left
        kinds.b.driver.destroy(None, instance, None)
    with pytest.raises(errors.NotRevertible, match="third took") as caught:
        kinds.a.driver.finish_revert_migration(None, instance)
    end(kinds.a, instance, str(caught.value))
    if not is_taken:
        with pytest.raises(errors.NotEntitled, match="is not known"):
            kinds.b.driver.finish_migration(None, None, instance, ticket, None)
    assert kinds.b.driver.settle() == []
    assert kinds.a.state_of(instance) is None and kinds.b.state_of(instance) is None
    backend = kinds.a.driver.node.backend(kinds.a.name)
    assert backend.pool(disk.pool).has(disk.name)
    clear(kinds.a, instance)
    assert not [name for name in kinds.a.volumes() if "vda" in name]


def test_an_end_that_was_killed_is_gone_on_with(
    rbd: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not put the instance back, even if nobody has it any more."""
    instance = rbd.spawn()
    rbd.a.driver.migrate_disk_and_power_off(
        None, instance, rbd.b.host.name, rbd.flavor(rbd.b), None
    )
    disk = seized(rbd.a, instance)
    (operation,) = [each[0] for each in rbd.a.driver.open_operations()]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rbd.a.driver.node.instances, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            rbd.a.driver.write_off(operation)
    rbd.a.driver.node.backend(rbd.a.name).tenures.remove(instance.uuid)
    assert rbd.a.driver.settle() == []
    assert rbd.a.driver.open_operations() == []
    assert rbd.a.state_of(instance) is None
    assert rbd.a.driver.node.instances.find(instance.uuid) is None
    backend = rbd.a.driver.node.backend(rbd.a.name)
    assert backend.pool(disk.pool).has(disk.name)
    clear(rbd.a, instance)


def test_no_third_host_took_it_over(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.move(instance)
    (operation,) = [each[0] for each in kinds.a.driver.open_operations()]
    with pytest.raises(errors.MigrationError, match="confirm or revert it"):
        kinds.a.driver.write_off(operation)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


def test_a_confirm_leaves_what_a_third_host_took_over(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> None:
    with between(("rbd", "dir-ext4"), hosts, tmp_path, cluster) as kinds:
        instance = kinds.spawn()
        kinds.move(instance)
        disk = seized(kinds.a, instance)
        kinds.a.driver.confirm_migration(None, None, instance, None)
        backend = kinds.a.driver.node.backend(kinds.a.name)
        assert backend.pool(disk.pool).has(disk.name)
        clear(kinds.a, instance)
        kinds.b.driver.destroy(None, instance, None)


@pytest.mark.parametrize("is_given", [False, True], ids=["rollback", "revert"])
def test_nobody_takes_it_while_its_disk_is_put_back(
    rbd: Kinds, monkeypatch: pytest.MonkeyPatch, is_given: bool
) -> None:
    """No fence would keep this process from the disk that it rolls back."""
    instance = rbd.spawn()
    backend = rbd.a.driver.node.backend(rbd.a.name)
    restore, said = backend.restore_state, []

    def overtaken(*args: Any) -> None:
        found = tenure(rbd.a, instance)
        assert found is not None
        try:
            Tenures({rbd.a.name: backend}, "third").seize(found.record, is_down=False)
        except errors.TakeOverRefused as e:
            said.append(str(e))
        restore(*args)

    monkeypatch.setattr(backend, "restore_state", overtaken)
    if is_given:
        rbd.a.driver.migrate_disk_and_power_off(
            None, instance, rbd.b.host.name, rbd.flavor(rbd.b), None
        )
        rbd.a.driver.finish_revert_migration(None, instance)
    else:
        rbd.a.driver._progress = lambda: Cancelling()
        with pytest.raises((errors.MigrationError, errors.Cancelled)):
            rbd.move(instance)
    assert len(said) == 1 and "putting its disks back" in said[0]
    assert rbd.a.state_of(instance) == "running"
    assert holder(rbd.a, instance) == ("ten-alpha", None)
    rbd.a.driver.destroy(None, instance, None)


def test_a_copy_that_was_given_back_leaves_none(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> None:
    with between(("dir-ext4", "rbd"), hosts, tmp_path, cluster) as kinds:
        instance = kinds.spawn()
        kinds.move(instance)
        there = kinds.b.driver.node.backend(kinds.b.name)
        assert there.tenures.find(instance.uuid) is not None
        kinds.b.driver.destroy(None, instance, None)
        kinds.a.driver.finish_revert_migration(None, instance)
        assert there.tenures.find(instance.uuid) is None
        kinds.a.driver.destroy(None, instance, None)


def test_a_give_back_that_was_killed_passes_it_on(
    rbd: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it noted that the instance is gone, and before the tenure."""
    instance = rbd.spawn()
    rbd.move(instance)

    def die(*_: object) -> None:
        raise errors.StorageDown(host="b", pool="p", seconds=1, reason="killed")

    with monkeypatch.context() as patch:
        patch.setattr(rbd.b.driver.node.tenures, "pass_on", die)
        with pytest.raises(errors.StorageDown):
            rbd.b.driver.destroy(None, instance, None)
    rbd.b.driver.destroy(None, instance, None)
    rbd.a.driver.finish_revert_migration(None, instance)
    assert rbd.a.state_of(instance) == "running"
    rbd.a.driver.destroy(None, instance, None)


def test_a_failed_move_leaves_it(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.a.driver._progress = lambda: Cancelling()
    with pytest.raises((errors.MigrationError, errors.Cancelled)):
        kinds.move(instance)
    assert holder(kinds.a, instance) == ("ten-alpha", None)
    assert kinds.a.state_of(instance) == "running"
    kinds.a.driver.destroy(None, instance, None)


def test_a_failed_spawn_leaves_none(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise errors.HostError(host="ten-alpha", reason="test")

    monkeypatch.setattr(kinds.a.driver.node.domains, "start", fail)
    with pytest.raises(errors.HostError, match="test"):
        kinds.spawn()
    pool = kinds.a.driver.node.backends[kinds.a.name].volumes.pool
    assert not [name for name in pool.names() if "tenure" in name]


def test_libvirt_does_not_start_it_with_the_host(kinds: Kinds) -> None:
    instance = kinds.spawn()
    with kinds.a.libvirt() as conn:
        conn.lookupByUUIDString(instance.uuid).setAutostart(1)
    kinds.a.driver.reboot(None, instance, None, "HARD")
    assert not kinds.a.driver.node.domains.autostart(instance.uuid)
    kinds.a.driver.destroy(None, instance, None)


def test_local_disks_have_none(kinds: Kinds) -> None:
    instance = kinds.spawn(flavor=kinds.flavor_of("files"))
    for backend in kinds.a.driver.node.backends.values():
        assert backend.tenures.find(instance.uuid) is None
    with pytest.raises(errors.TakeOverRefused, match="no backend of this host"):
        kinds.b.driver.take_over(instance.uuid, host_is_down=True)
    kinds.a.driver.destroy(None, instance, None)


def test_it_is_no_volume(kinds: Kinds) -> None:
    instance = kinds.spawn()
    backend = kinds.a.driver.node.backends[kinds.a.name]
    assert set(backend.volumes.names()) == {kinds.a.disk(instance)[1].name}
    kinds.a.driver.destroy(None, instance, None)


# Taking over


def test_taken_over_from_a_host_that_cannot_be_asked(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.a.driver.power_off(instance)
    before = kinds.a.root(instance)
    kinds.a.driver.power_on(None, instance, None)
    is_fenced = kinds.a.name == "therbd"
    with away(kinds.a):
        if not is_fenced:
            with pytest.raises(errors.TakeOverRefused, match=r"--host-is-down"):
                kinds.b.driver.take_over(instance.uuid)
            assert holder(kinds.b, instance) == ("ten-alpha", None)
            assert kinds.b.state_of(instance) is None
            # QEMU would not start a second one on a file system of one machine.
            kill_guests(kinds.a)
        kinds.b.driver.take_over(instance.uuid, host_is_down=not is_fenced)
        assert holder(kinds.b, instance) == ("ten-beta", None)
        assert kinds.b.state_of(instance) == "running"
        assert kinds.b.root(instance) == before
        assert writes(kinds.b, instance, kinds.b, 1)

    # It comes back, with a guest that nobody stopped.
    if is_fenced:
        assert not writes(kinds.a, instance, kinds.b, 2)
    with pytest.raises(errors.HeldElsewhere):
        kinds.a.driver.power_on(None, instance, None)
    kinds.a.restart()
    (left,) = kinds.a.driver.settle()
    assert "ten-beta's now" in left
    assert kinds.a.state_of(instance) == "shutoff"
    with pytest.raises(errors.HeldElsewhere, match="ten-beta's"):
        kinds.a.driver.resume(None, instance, None)
    kinds.a.driver.destroy(None, instance, None)
    assert kinds.a.driver.settle() == []
    kinds.b.driver.reboot(None, instance, None, "HARD")
    assert kinds.b.state_of(instance) == "running"
    kinds.b.driver.destroy(None, instance, None)
    assert not [name for name in kinds.b.volumes() if "vda" in name]
    assert tenure(kinds.a, instance) is None


def test_one_that_is_gone_since_is_not_started_again(kinds: Kinds) -> None:
    """Its old host has it still, by its own record."""
    instance = kinds.spawn()
    kinds.a.driver.power_off(instance)
    kinds.b.driver.take_over(instance.uuid, host_is_down=True)
    kinds.b.driver.destroy(None, instance, None)
    with pytest.raises(errors.TakenAway, match="ten-beta took it over"):
        kinds.a.driver.power_on(None, instance, None)
    with pytest.raises(errors.TakeOverRefused, match="no backend of this host"):
        kinds.a.driver.take_over(instance.uuid, host_is_down=True)
    assert kinds.a.state_of(instance) == "shutoff"
    assert "ten-beta's now" in kinds.a.driver.settle()[0]
    kinds.a.driver.destroy(None, instance, None)
    assert tenure(kinds.a, instance) is None


def test_a_host_that_shares_its_records_comes_back(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> None:
    """The one record is the other's now: what runs here tells that it was taken."""
    backend = "theshared_dir"
    with made("shared_dir", hosts, tmp_path, cluster, file_backend=backend) as kinds:
        lost, other = kinds.spawn(), kinds.spawn()
        # Its old host is no more sure to be down than its operator.
        kinds.a.driver.pause(lost)
        kinds.b.driver.take_over(lost.uuid, host_is_down=True, power_on=False)
        assert kinds.a.driver.node.own_record(lost.uuid) is None
        assert kinds.a.state_of(lost) == "paused"
        (left,) = kinds.a.driver.settle()
        assert "ten-beta's now" in left
        assert kinds.a.state_of(lost) == "shutoff"
        assert kinds.a.state_of(other) == "running"
        kinds.a.driver.destroy(None, lost, None)
        assert kinds.a.driver.settle() == []
        found = tenure(kinds.b, lost)
        assert found is not None and found.lost == ()
        kinds.b.driver.power_on(None, lost, None)
        assert kinds.b.state_of(lost) == "running"
        kinds.b.driver.destroy(None, lost, None)
        kinds.a.driver.destroy(None, other, None)


def test_by_the_command_and_without_a_start(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.a.driver.power_off(instance)
    argv = [sys.executable, "-m", "virtmigrate.cli.main"]
    argv += ["--config-file", str(kinds.b.config), "instance", "take-over"]
    argv += ["--off", "--host-is-down", "-f", "json", instance.uuid]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["from"], said["host"]) == ("ten-alpha", "ten-beta")
    assert said["state"] == "off"
    assert kinds.b.state_of(instance) == "shutoff"
    assert holder(kinds.a, instance) == ("ten-beta", None)
    kinds.a.driver.destroy(None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


def test_one_that_failed_halfway_is_gone_on_with(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = kinds.spawn()
    kinds.a.driver.power_off(instance)

    def fail(*_: object, **__: object) -> None:
        raise errors.HostError(host="ten-beta", reason="test")

    for owner, name in (
        (kinds.b.driver.node, "publish_instance"),
        (kinds.b.driver.node.domains, "define"),
        (kinds.b.driver.node.domains, "start"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(errors.HostError, match="test"):
                kinds.b.driver.take_over(instance.uuid, host_is_down=True)
    kinds.b.driver.take_over(instance.uuid, host_is_down=True)
    assert kinds.b.state_of(instance) == "running"
    kinds.a.driver.destroy(None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


def test_a_disk_that_is_not_seen(kinds: Kinds) -> None:
    instance = kinds.spawn()
    here = kinds.a.driver.node
    record = here.instances.read(instance.uuid).body
    ref = model.DiskRef("vdb", f"vdb.{record.operation}", "files", model.Role.DATA)
    more = msgspec.structs.replace(record, disks=(*record.disks, ref))
    here.tenures.drop(record.uuid, [kinds.a.name])
    here.tenures.take(more)
    with pytest.raises(errors.TakeOverRefused, match=r"disk vdb .*is not seen"):
        kinds.b.driver.take_over(instance.uuid, host_is_down=True)
    assert holder(kinds.b, instance) == ("ten-alpha", None)
    kinds.a.driver.destroy(None, instance, None)


def test_a_move_that_is_open_is_not_taken_over(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.move(instance)
    for side in (kinds.a, kinds.b):
        with pytest.raises(errors.TakeOverRefused, match=r"move|revert"):
            side.driver.take_over(instance.uuid, host_is_down=True)
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    kinds.a.driver.destroy(None, instance, None)


def test_taken_over_while_it_is_started(
    rbd: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was slower stops what it started."""
    instance = rbd.spawn()
    rbd.a.driver.power_off(instance)
    here = rbd.a.driver.node.domains
    start = here.start

    def overtaken(*args: Any, **kwargs: Any) -> None:
        start(*args, **kwargs)
        rbd.b.driver.take_over(instance.uuid, host_is_down=True)

    with monkeypatch.context() as patch:
        patch.setattr(here, "start", overtaken)
        with pytest.raises(errors.HeldElsewhere):
            rbd.a.driver.power_on(None, instance, None)
    assert rbd.a.state_of(instance) == "shutoff"
    assert rbd.b.state_of(instance) == "running"
    rbd.a.driver.destroy(None, instance, None)
    rbd.b.driver.destroy(None, instance, None)


def killed_at_its_start(side: Side, instance: Any, *, before: bool) -> None:
    """Start it by a process that dies before it notes who has the disks open."""
    domains = side.driver.node.domains
    start = domains.start

    def killed(*args: Any, **kwargs: Any) -> None:
        if not before:
            start(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domains, "start", killed)
        with pytest.raises(KeyboardInterrupt):
            side.driver.power_on(None, instance, None)
    found = tenure(side, instance)
    assert found is not None and found.clients is None


@pytest.mark.parametrize("before", [False, True], ids=["running", "off"])
def test_who_has_it_open_is_not_known(rbd: Kinds, before: bool) -> None:
    """Killed between the start and its note: who watches may be of an earlier one."""
    instance = rbd.spawn()
    rbd.a.driver.power_off(instance)
    killed_at_its_start(rbd.a, instance, before=before)
    found = tenure(rbd.b, instance)
    with pytest.raises(errors.TakeOverRefused, match="was starting it"):
        rbd.b.driver.take_over(instance.uuid)
    assert tenure(rbd.b, instance) == found
    rbd.b.driver.take_over(instance.uuid, host_is_down=True)
    rbd.a.driver.destroy(None, instance, None)
    rbd.b.driver.destroy(None, instance, None)


@pytest.mark.parametrize("before", [False, True], ids=["running", "off"])
def test_settling_notes_who_has_it_open(rbd: Kinds, before: bool) -> None:
    instance = rbd.spawn()
    rbd.a.driver.power_off(instance)
    killed_at_its_start(rbd.a, instance, before=before)
    assert rbd.a.driver.settle() == []
    found = tenure(rbd.a, instance)
    assert found is not None and found.clients is not None
    assert bool(found.clients) is not before
    rbd.b.driver.take_over(instance.uuid)
    if not before:
        assert not writes(rbd.a, instance, rbd.b, 2)
    rbd.a.driver.destroy(None, instance, None)
    rbd.b.driver.destroy(None, instance, None)


def test_a_watch_that_ended_is_fenced_by_the_note(
    rbd: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = rbd.spawn()
    assert writes(rbd.a, instance, rbd.a, 1)
    backend = rbd.b.driver.node.backends[rbd.b.name]
    with monkeypatch.context() as patch:
        patch.setattr(backend, "clients", lambda name: set())
        rbd.b.driver.take_over(instance.uuid)
    assert not writes(rbd.a, instance, rbd.b, 2)
    assert writes(rbd.b, instance, rbd.b, 3)
    rbd.a.driver.destroy(None, instance, None)
    rbd.b.driver.destroy(None, instance, None)


def test_a_cluster_that_does_not_fence(rbd: Kinds, cluster: Callable[[], Ceph]) -> None:
    """No right to blocklist: nothing is taken."""
    instance = rbd.spawn()
    caps = ["mon", "allow r", "osd", "profile rbd pool=tenures"]
    cluster().run(["ceph", "auth", "caps", "client.tenures", *caps])
    try:
        rbd.b.restart()
        with pytest.raises(errors.StorageError, match="blocklisting"):
            rbd.b.driver.take_over(instance.uuid)
        assert holder(rbd.a, instance) == ("ten-alpha", None)
        assert rbd.b.state_of(instance) is None
        assert writes(rbd.a, instance, rbd.a, 1)
    finally:
        caps = ["mon", "profile rbd", "osd", "profile rbd pool=tenures"]
        caps += ["mgr", "profile rbd pool=tenures"]
        cluster().run(["ceph", "auth", "caps", "client.tenures", *caps])
    rbd.b.restart()
    rbd.b.driver.take_over(instance.uuid)
    rbd.a.driver.destroy(None, instance, None)
    rbd.b.driver.destroy(None, instance, None)


@pytest.mark.timeout(240)
def test_a_guest_that_was_cut_off(
    rbd: Kinds, cluster: Callable[[], Ceph], tmp_path: Path
) -> None:
    """It writes nothing when it is back, and what it had written goes on elsewhere."""
    instance = types.SimpleNamespace(
        uuid=str(uuid.uuid4()),
        name="counter",
        flavor=rbd.flavor_of("therbd", memory_mb=128),
    )
    meta = {"path": str(guest.image().path), "disk_format": "raw"}
    rbd.a.driver.spawn(None, instance, meta)
    there, here = console(rbd.a, instance), console(rbd.b, instance)
    wait_for(lambda: len(guest.beats(there)) >= 3)
    with away(rbd.a):
        rbd.b.driver.take_over(instance.uuid)
        last = guest.beats(there)[-1].number
        wait_for(lambda: len(guest.beats(here)) >= 3)
    begun = len(guest.beats(here))
    wait_for(lambda: len(guest.beats(here)) >= begun + 5)
    assert guest.beats(there)[-1].number == last
    # A last record may have been on disk, and not said yet.
    assert guest.beats(here)[0].number in (last + 1, last + 2)
    rbd.b.driver.power_off(instance, 20, 5)
    disk = tmp_path / "disk"
    name = rbd.b.disk(instance)[1].name
    cluster().run(["rbd", "export", "--no-progress", f"tenures/{name}", str(disk)])
    log = guest.verify(disk)
    assert (log.problems, log.first, log.boots) == ([], 1, 2)
    for side in (rbd.a, rbd.b):
        side.driver.destroy(None, instance, None)


# Killed while a layer over a shared disk is merged


MERGE = {
    "at the mark": "node.domains.pause",
    "paused": "node.backend.persist",
    "grown": "node.tenures.amend",
    "passed down": "node.domains.pivot",
    "pivoted": "node.domains.unpause",
    "going on": "node.publish_instance",
    "noted": "node.backend.remove",
}
"""Who is called next where a process is killed."""


@pytest.fixture
def files(
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with made("shared_dir", hosts, tmp_path, cluster) as found:
        yield found


def killed_in_the_merge(kinds: Kinds, instance: Any, step: str) -> bytes:
    """Move it and confirm; kill the peer's process at a step of the merge.

    Returns what the guest's disk holds.
    """
    kinds.a.driver.power_off(instance)
    disk = bytearray(kinds.a.content(instance))
    kinds.a.driver.power_on(None, instance, None)
    if step == "grown":
        kinds.move(instance, root_gb=1)
        disk.extend(bytes(GiB - len(disk)))
    else:
        kinds.move(instance)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    # So that the merge is the next that publishes its record.
    kinds.b.driver.node.note_confirmed(instance.uuid)
    put(kinds.b, 1)
    disk[:512] = bytes([1]) * 512
    _, *path, name = MERGE[step].split(".")
    owner: Any = kinds.b.driver.node
    for each in path:
        is_disk = each == "backend"
        owner = owner.backend(kinds.b.name) if is_disk else getattr(owner, each)

    def killed(*_: object, **__: object) -> None:
        if kinds.b.state_of(instance) == "running":
            put(kinds.b, 2)
            disk[:512] = bytes([2]) * 512
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            kinds.b.driver.settle()
    return bytes(disk)


def put(side: Side, pattern: int) -> None:
    """Write to the disk of the one guest that runs, as it would."""
    device = "/machine/peripheral/virtio-disk0/virtio-backend"
    order = f'qemu-io -d {device} "write -f -P {pattern} 0 512"'
    with side.libvirt() as conn:
        (domain,) = conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_RUNNING)
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        libvirt_qemu.qemuMonitorCommand(domain, order, flags)


@pytest.mark.parametrize("step", MERGE)
def test_taken_over_from_a_host_that_died_in_a_merge(files: Kinds, step: str) -> None:
    instance = files.spawn()
    disk = killed_in_the_merge(files, instance, step)
    kill_guests(files.b)
    files.a.driver.take_over(instance.uuid, host_is_down=True, power_on=False)
    assert files.a.content(instance) == disk
    files.a.driver.power_on(None, instance, None)
    assert files.a.state_of(instance) == "running"
    assert files.a.disk(instance)[1].state is model.VolumeState.USABLE
    files.b.driver.destroy(None, instance, None)
    files.a.driver.destroy(None, instance, None)
    assert not [name for name in files.a.volumes() if "vda" in name]


@pytest.mark.parametrize("step", MERGE)
def test_settling_goes_on_with_a_merge(files: Kinds, step: str) -> None:
    instance = files.spawn()
    _, base = files.a.disk(instance)
    disk = killed_in_the_merge(files, instance, step)
    files.b.restart()
    assert files.b.driver.settle() == []
    assert files.b.state_of(instance) == "running"
    found = files.b.disk(instance)[1]
    assert (found.name, found.state) == (base.name, model.VolumeState.USABLE)
    record = tenure(files.a, instance)
    assert record is not None
    assert [ref.volume for ref in record.record.disks] == [base.name]
    files.b.driver.power_off(instance)
    assert files.b.content(instance) == disk
    files.b.driver.destroy(None, instance, None)
    assert not [name for name in files.a.volumes() if "vda" in name]


def test_a_merge_that_failed_lets_the_guest_go_on(
    files: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = files.spawn()
    files.move(instance)
    files.a.driver.confirm_migration(None, None, instance, None)
    backend = files.b.driver.node.backend(files.b.name)

    def fail(*_: object) -> None:
        raise errors.StorageError(host="ten-beta", pool="p", reason="test")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "persist", fail)
        (left,) = files.b.driver.settle()
        assert "test" in left
    assert files.b.state_of(instance) == "running"
    assert files.b.driver.settle() == []
    assert files.b.state_of(instance) == "running"
    assert files.b.disk(instance)[1].backing is None
    files.b.driver.destroy(None, instance, None)


# Taking back from a peer that is lost


def test_a_lost_peer_is_fenced_first(rbd: Kinds) -> None:
    instance = rbd.spawn()
    before = rbd.a.root(instance)
    rbd.move(instance)
    assert writes(rbd.b, instance, rbd.b, 1)
    with away(rbd.b):
        rbd.a.driver.finish_revert_migration(None, instance, peer_is_lost=True)
    assert rbd.a.state_of(instance) == "running"
    assert holder(rbd.a, instance) == ("ten-alpha", None)
    assert not writes(rbd.b, instance, rbd.a, 2)
    assert rbd.a.root(instance) == before
    rbd.b.restart()
    assert any("ten-alpha's now" in each for each in rbd.b.driver.settle())
    assert rbd.b.state_of(instance) == "shutoff"
    with pytest.raises(errors.HeldElsewhere):
        rbd.b.driver.power_on(None, instance, None)
    rbd.b.driver.destroy(None, instance, None)
    assert rbd.a.driver.settle() == []
    assert rbd.a.root(instance) == before
    rbd.a.driver.destroy(None, instance, None)


def test_a_lost_peer_that_cannot_be_fenced_keeps_it(
    rbd: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = rbd.spawn()
    rbd.move(instance)

    def fail(clients: set[str]) -> None:
        raise errors.StorageDown(host="ten-alpha", pool="p", seconds=1, reason="test")

    with away(rbd.b), monkeypatch.context() as patch:
        patch.setattr(rbd.a.driver.node.backends[rbd.a.name], "fence", fail)
        with pytest.raises(errors.NotRevertible, match="cannot be kept from its disks"):
            rbd.a.driver.finish_revert_migration(None, instance, peer_is_lost=True)
    assert holder(rbd.a, instance) == ("ten-beta", None)
    assert rbd.a.state_of(instance) is None
    assert writes(rbd.b, instance, rbd.b, 1)
    rbd.b.driver.destroy(None, instance, None)
    rbd.a.driver.finish_revert_migration(None, instance)
    rbd.a.driver.destroy(None, instance, None)


def console(side: Side, instance: Any) -> Path:
    assert isinstance(side.host, sandbox.Host)
    return side.host.logs / f"qemu/virtmigrate-{instance.uuid}.log"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
