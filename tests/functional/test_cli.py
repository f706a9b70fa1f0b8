# SPDX-License-Identifier: Apache-2.0
"""The command, as a process of its own, between two real hosts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.functional.conftest import World, digest
from virtmigrate import errors
from virtmigrate.units import GiB, MiB

TIMEOUT = 90.0
DONE, FAILED, USAGE, UNDECIDED, CANCELLED = range(5)


class Command:
    """Runs `virtmigrate` on the first host; the second is its peer."""

    def __init__(self, world: World, directory: Path) -> None:
        self.file = directory / "virtmigrate.conf"
        (directory / "peers").mkdir(parents=True)
        self.file.write_text(configuration(world))
        peer = f"[local]\npath = {world.b.path}\n"
        (directory / f"peers/{world.b.host.name}.conf").write_text(peer)

    def argv(self, *words: str) -> list[str]:
        options = ["--config-file", str(self.file)]
        return [sys.executable, "-m", "virtmigrate.cli.main", *options, *words]

    def run(self, *words: str, code: int = DONE) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.argv(*words), capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def json(self, *words: str, code: int = DONE) -> Any:
        return json.loads(self.run(*words, "-f", "json", code=code).stdout)


def configuration(world: World) -> str:
    """Return the first host's options as a file."""
    conf = world.a.conf()
    names = ["uri", "address", "virt_type", "state_path", "peer_uri"]
    names += ["call_timeout", "connect_timeout", "record_grace"]
    lines = [f"{name} = {conf.virtmigrate[name]}" for name in names]
    lines += ["shutdown_timeout = 2", "shutdown_retry_interval = 1"]
    return "\n".join(["[virtmigrate]", *lines, "[local]", f"path = {world.a.path}"])


@pytest.fixture
def command(world: World, tmp_path: Path) -> Iterator[Command]:
    yield Command(world, tmp_path / "etc")


def test_migrate_list_and_confirm(world: World, command: Command) -> None:
    instance = world.spawn(world.a)
    before = digest(world.a.disk(instance))
    (row,) = command.json("instance", "list")
    assert (row["uuid"], row["state"], row["power"]) == (
        instance.uuid,
        "here",
        "running",
    )

    done = command.run("instance", "migrate", instance.name, "beta", "-f", "json")
    moved = json.loads(done.stdout)
    assert (moved["host"], moved["state"], moved["source"]) == (
        "beta",
        "running",
        "alpha",
    )
    assert moved["sent"] >= MiB
    assert "copying vda" in done.stderr and "starting there" in done.stderr
    assert world.a.state_of(instance) is None
    assert digest(world.b.disk(instance)) == before
    (row,) = command.json("instance", "list")
    assert (row["state"], row["peer"]) == ("away", "beta")

    assert command.json("instance", "confirm", instance.name)["left"] == ""
    assert world.a.files() == []
    assert command.json("instance", "list") == []
    assert (
        "not on host"
        in command.run("instance", "confirm", instance.uuid, code=FAILED).stderr
    )
    assert world.b.state_of(instance) == "running"


def test_resize_and_revert(world: World, command: Command) -> None:
    instance = world.spawn(world.a)
    before = digest(world.a.disk(instance))
    words = ("--root-size", "1G", "--memory", "96M", "--vcpus", "2")
    command.run("instance", "migrate", instance.uuid, "beta", *words)
    assert world.b.disk(instance).stat().st_size == GiB
    info = world.b.driver.get_info(instance)
    assert (info.max_memory, info.vcpus) == (96 * MiB, 2)

    back = command.json("instance", "revert", instance.uuid)
    assert (back["host"], back["state"]) == ("alpha", "running")
    assert digest(world.a.disk(instance)) == before
    assert world.b.state_of(instance) is None
    assert [n for n in world.b.files() if "instances/" not in n] == []
    failed = command.run("instance", "revert", instance.uuid, code=FAILED)
    assert "no move of it waits" in failed.stderr
    assert world.a.state_of(instance) == "running"


def test_revert_after_confirm_removes_nothing(world: World, command: Command) -> None:
    instance = world.spawn(world.a)
    command.run("instance", "migrate", instance.uuid, "beta")
    command.run("instance", "confirm", instance.uuid)
    command.run("instance", "revert", instance.uuid, code=FAILED)
    assert world.b.state_of(instance) == "running"


def test_handed_over_and_killed_goes_on(world: World, command: Command) -> None:
    instance = world.spawn(world.a)
    world.migrate(instance)
    assert world.b.state_of(instance) is None
    moved = command.json("instance", "migrate", instance.uuid, "beta")
    assert (moved["host"], moved["downtime"]) == ("beta", None)
    assert world.b.state_of(instance) == "running"
    # Again: it has arrived, and nothing happens.
    command.run("instance", "migrate", instance.uuid, "beta")
    assert world.b.state_of(instance) == "running"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_cancels_and_puts_back(
    world: World, command: Command, number: signal.Signals
) -> None:
    image = world.tmp / "random.raw"
    image.write_bytes(os.urandom(96 * MiB))
    instance = world.spawn(world.a, image)
    before = digest(image)
    argv = command.argv("instance", "migrate", instance.name, "beta")
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("copying"):
                child.send_signal(number)
                break
        rest = child.stderr.read()
        assert child.wait(TIMEOUT) == CANCELLED, rest
    assert f"cancelled: instance {instance.uuid} is running on alpha again" in rest
    assert world.a.state_of(instance) == "running"
    assert digest(world.a.disk(instance)) == before
    assert world.b.files() == []


def test_killed_while_copying_starts_anew(world: World, command: Command) -> None:
    image = world.tmp / "random.raw"
    image.write_bytes(os.urandom(96 * MiB))
    instance = world.spawn(world.a, image)
    argv = command.argv("instance", "migrate", instance.name, "beta")
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("copying"):
                child.kill()
                break
        child.wait(TIMEOUT)
    assert world.a.state_of(instance) is None
    command.run("instance", "migrate", instance.uuid, "beta")
    assert world.b.state_of(instance) == "running"
    assert digest(world.b.disk(instance)) == digest(image)


def test_owned_by_a_service_is_refused(world: World, command: Command) -> None:
    instance = world.spawn(world.a)
    here = world.a.driver.node
    record = here.instances.read(instance.uuid).body
    here.publish_instance(msgspec.structs.replace(record, owner="nova"))

    refused = command.run("instance", "migrate", instance.uuid, "beta", code=FAILED)
    assert f"openstack server migrate {instance.uuid}" in refused.stderr
    assert "Traceback" not in refused.stderr
    refused = command.run(
        "instance", "migrate", instance.uuid, "beta", "--vcpus", "2", code=FAILED
    )
    assert "openstack server resize" in refused.stderr
    assert world.a.state_of(instance) == "running"

    override = "--unmanaged-override"
    done = command.run("instance", "migrate", instance.uuid, "beta", override)
    assert "belongs to nova" in done.stderr
    for verb in ("confirm", "revert"):
        refused = command.run("instance", verb, instance.uuid, code=FAILED)
        assert f"openstack server resize {verb}" in refused.stderr
    command.run("instance", "confirm", instance.uuid, override)


def test_unreachable_peer_is_one_message(world: World, command: Command) -> None:
    instance = world.spawn(world.a)
    refused = command.run("instance", "migrate", instance.uuid, "nowhere", code=FAILED)
    assert "nowhere cannot be reached" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert world.a.state_of(instance) == "running"
    words = ("--debug", "instance", "migrate", instance.uuid, "nowhere")
    assert "Traceback" in command.run(*words, code=FAILED).stderr


def test_peer_goes_away_after_the_hand_over(world: World, command: Command) -> None:
    """The right was given up, the peer's domain cannot be made: undecided."""
    instance = world.spawn(world.a)
    blocker = world.b.path / "disks"
    argv = command.argv("instance", "migrate", instance.uuid, "beta")
    with (
        world.b.libvirt() as conn,
        subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as child,
    ):
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("handing over"):
                child.send_signal(signal.SIGSTOP)
                break
        pool = conn.storagePoolLookupByName("virtmigrate-local-disks")
        pool.destroy()
        child.send_signal(signal.SIGCONT)
        rest = child.stderr.read()
        code = child.wait(TIMEOUT)
        pool.create(0)
    assert blocker.exists()
    if code == DONE:
        pytest.skip("it was faster")
    assert code == UNDECIDED, rest
    assert "Run the same command again" in rest
    command.run("instance", "migrate", instance.uuid, "beta")
    assert world.b.state_of(instance) == "running"


def test_settle_and_completion(world: World, command: Command) -> None:
    assert command.json("host", "settle") == []
    assert "instance" in command.run("complete").stdout
    assert command.run("nonsense", code=USAGE)
    assert command.run("instance", "migrate", code=USAGE)


def test_list_waits_for_nobody(world: World, command: Command) -> None:
    """Looking takes no locks, and settles nothing that another process works on."""
    instance = world.spawn(world.a)
    with world.a.driver.node.claimed(instance.uuid):
        seconds = time.monotonic()
        assert len(command.json("instance", "list")) == 1
        assert time.monotonic() - seconds < 25


def test_settle_beside_a_move_leaves_it_alone(world: World, command: Command) -> None:
    """What another process is doing is not what a killed one left."""
    image = world.tmp / "random.raw"
    image.write_bytes(os.urandom(128 * MiB))
    instance = world.spawn(world.a, image)
    argv = command.argv("instance", "migrate", instance.name, "beta")
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("copying"):
                break
        command.run("host", "settle")
        rest = child.stderr.read()
        assert child.wait(TIMEOUT) == DONE, rest
    assert world.a.state_of(instance) is None
    assert world.b.state_of(instance) == "running"


def test_new_peer_is_set_up(world: World, command: Command) -> None:
    world.b.clear()
    instance = world.spawn(world.a)
    command.run("instance", "migrate", instance.uuid, "beta")
    assert world.b.state_of(instance) == "running"


def test_peer_with_other_directories_is_refused(world: World, command: Command) -> None:
    """Pools that its own service made lie elsewhere: nothing is guessed."""
    (command.file.parent / "peers/beta.conf").unlink()
    instance = world.spawn(world.a)
    refused = command.run("instance", "migrate", instance.uuid, "beta", code=FAILED)
    assert f"lies at {world.b.path}" in refused.stderr
    assert world.a.state_of(instance) == "running"


def test_insecure_peer_only_by_name(world: World, command: Command) -> None:
    """Over plain TCP, which the laboratory allows for one peer."""
    instance = world.spawn(world.a)
    lines = command.file.read_text().splitlines()
    lines = [line for line in lines if not line.startswith("peer_uri")]
    lines.insert(1, "peer_uri = qemu+tcp://{dest}/system")
    command.file.write_text("\n".join(lines))
    refused = command.run("instance", "migrate", instance.uuid, "beta", code=FAILED)
    assert "Nothing was sent" in refused.stderr
    lines.insert(1, "allow_insecure_peers = beta")
    command.file.write_text("\n".join(lines))
    command.run("instance", "migrate", instance.uuid, "beta")
    assert world.b.state_of(instance) == "running"
    rows = command.json("host", "check", "--peer", "beta")
    (row,) = (row for row in rows if row["check"] == "peer beta: encryption")
    assert row["result"] == "warning"


class TestPeerThatAcceptsMoves:
    """The peer's own driver finishes and gives back; none is made for it here."""

    @pytest.fixture
    def accepting(self, world: World) -> World:
        world.b.overrides["accept_moves"] = True
        world.b.new_driver()
        return world

    def test_migrate_and_confirm(self, accepting: World, command: Command) -> None:
        instance = accepting.spawn(accepting.a)
        before = digest(accepting.a.disk(instance))
        moved = command.json("instance", "migrate", instance.name, "beta")
        assert (moved["host"], moved["state"]) == ("beta", "running")
        command.run("instance", "confirm", instance.name)
        accepting.b.driver.settle()
        assert digest(accepting.b.disk(instance)) == before
        assert accepting.a.files() == []
        assert not (accepting.a.state / "peers").exists()
        accepting.expect_one(instance, accepting.b)

    def test_revert(self, accepting: World, command: Command) -> None:
        instance = accepting.spawn(accepting.a)
        before = digest(accepting.a.disk(instance))
        command.run("instance", "migrate", instance.name, "beta")
        back = command.json("instance", "revert", instance.name)
        assert (back["host"], back["state"]) == ("alpha", "running")
        assert digest(accepting.a.disk(instance)) == before
        assert not (accepting.a.state / "peers").exists()
        accepting.expect_one(instance, accepting.a)

    def test_it_says_when_it_could_not(
        self, accepting: World, command: Command
    ) -> None:
        """What went wrong there is told here, and the same command goes on."""
        instance = accepting.spawn(accepting.a)
        accepting.b.driver.node.domains.start = broken  # type: ignore[method-assign]
        done = command.run("instance", "migrate", instance.name, "beta", code=UNDECIDED)
        assert "it does not start" in done.stderr
        accepting.b.new_driver()
        command.run("instance", "migrate", instance.name, "beta")
        command.run("instance", "confirm", instance.name)
        accepting.expect_one(instance, accepting.b)


def broken(*_: object, **__: object) -> None:
    raise errors.InvalidState(
        instance="x", host="beta", state="off", reason="it does not start"
    )


def test_a_peer_that_does_not_accept_moves_finishes_none(world: World) -> None:
    """Whoever writes to its mailbox brings no instance here."""
    instance = world.spawn(world.a)
    world.migrate(instance)
    ((operation, *_),) = world.a.driver.open_operations()
    peer = world.a.driver.peer(world.b.host.name)
    for ask in (peer.finish, peer.give_back):
        with pytest.raises(errors.RequestRefused, match="accept_moves"):
            ask(operation)
    assert world.b.state_of(instance) is None
    world.revert(instance)
    world.expect_one(instance, world.a)


def test_retired_disks_are_shown_and_removed(world: World, command: Command) -> None:
    world.a.overrides["keep_retired"] = True
    world.a.new_driver()
    instance = world.spawn(world.a)
    world.finish(instance, world.migrate(instance))
    world.confirm(instance)
    other = ("--instance", "00000000-0000-0000-0000-000000000000")
    assert command.json("host", "retired", "--remove", *other) == []
    (row,) = command.json("host", "retired")
    assert row["instance"] == instance.uuid
    command.run("host", "retired", "--remove")
    assert command.json("host", "retired") == []
    assert world.a.files() == []


def test_receiver_runs_on_its_host_only(world: World, command: Command) -> None:
    text = command.file.read_text()
    command.file.write_text(text.replace(world.a.host.local_uri, world.a.host.uri))
    done = command.run("receiver", code=FAILED)
    assert "runs on its host" in done.stderr
