# SPDX-License-Identifier: Apache-2.0
"""`host check`: what works, what does not, and what to do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import Host, Sandbox
from tests.functional.conftest import World
from tests.functional.test_cli import FAILED, Command


@pytest.fixture
def command(world: World, tmp_path: Path) -> Iterator[Command]:
    yield Command(world, tmp_path / "etc")


@pytest.fixture
def untrusted(box: Sandbox) -> Iterator[Host]:
    try:
        yield box.add_host("ck-other", server_certificate="other-ca")
    finally:
        box.remove_host("ck-other")


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["check"]: row for row in rows}


def test_all_works(command: Command) -> None:
    rows = by_name(command.json("host", "check", "--peer", "beta"))
    assert {row["result"] for row in rows.values()} == {"works"}, rows
    assert "QEMU" in rows["libvirt"]["detail"]
    assert rows["backend local: reading disks"]["detail"] == "directly"
    assert "days left" in rows["certificate clientcert.pem"]["detail"]
    assert rows["peer beta: encryption"]["detail"] == "yes"
    assert "release" in rows["peer beta: card"]["detail"]
    assert "free" in rows["peer beta: room"]["detail"]


def test_untrusted_peer(command: Command, untrusted: Host) -> None:
    words = ("host", "check", "--peer", untrusted.name, "--peer", "nowhere")
    rows = by_name(command.json(*words, code=FAILED))
    peer = rows[f"peer {untrusted.name}"]
    assert peer["result"] == "failed"
    assert "certificate refused (untrusted)" in peer["detail"]
    assert "authority" in peer["remedy"]
    assert "16514" in rows["peer nowhere"]["remedy"]
    assert rows["libvirt"]["result"] == "works"


def test_open_move_and_debt_are_shown(world: World, command: Command) -> None:
    instance = world.spawn(world.a)
    world.migrate(instance)
    rows = by_name(command.json("host", "check"))
    assert rows["open move"]["result"] == "warning"
    assert instance.uuid in rows["open move"]["detail"]
    assert "confirm" in rows["open move"]["remedy"]


def test_no_libvirt_and_no_certificates(
    world: World, command: Command, tmp_path: Path
) -> None:
    text = command.file.read_text().replace("libvirt-sock", "no-sock")
    text = text.replace("pkipath=", f"pkipath={tmp_path}/none")
    command.file.write_text(text)
    rows = by_name(command.json("host", "check", code=FAILED))
    assert rows["libvirt"]["result"] == "failed"
    assert "usermod" in rows["libvirt"]["remedy"]
    assert rows["certificate clientcert.pem"]["result"] == "failed"
    assert rows["state_path"]["result"] == "works"


def test_as_an_unprivileged_user(world: World, command: Command) -> None:
    """The socket is closed to it, and that is said; no traceback."""
    reachable(command.file)
    done = world.box.exec(
        command.argv("host", "check", "-f", "json"), user=True, check=False
    )
    assert done.returncode == FAILED
    assert "Traceback" not in done.stderr
    rows = by_name(json.loads(done.stdout))
    assert "usermod -aG libvirt mover" in rows["libvirt"]["remedy"]
    assert rows["state_path"]["result"] == "failed"


@pytest.fixture
def service(box: Sandbox) -> Iterator[Host]:
    try:
        yield box.add_host("ck-service", service_user=True)
    finally:
        box.remove_host("ck-service")


def test_as_a_service_user(command: Command, service: Host, box: Sandbox) -> None:
    """Everything works for a user in group libvirt; files are not its own."""
    command.file.write_text(
        f"[virtmigrate]\nuri = {service.local_uri}\naddress = {service.name}\n"
        f"virt_type = qemu\nstate_path = {box.home}/state\n"
        f"peer_uri = {service.uri.replace(service.name, '{dest}', 1)}\n"
        f"[local]\npath = {service.storage}/vm\n"
    )
    reachable(command.file)
    argv = command.argv("host", "check", "-f", "json")
    done = box.exec(argv, user=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = by_name(json.loads(done.stdout))
    assert "as mover" in rows["libvirt"]["detail"]
    assert rows["state_path"]["result"] == "works"
    assert rows["backend local: rights"]["result"] == "warning"
    assert rows["certificate clientcert.pem"]["result"] == "works"


def reachable(file: Path) -> None:
    """Let everybody read a file of a test's own directory."""
    for directory in file.parents[:5]:
        directory.chmod(directory.stat().st_mode | 0o055)
    file.chmod(0o644)


def test_only_old_nonces_are_reclaimed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`host check` beside a service's proof must not make that fail."""
    pool = world.a.driver.node.files.disks
    others = ["1234.raw", "nonce.other.1234.0", f"nonce.{world.a.host.name}.x"]
    for name in others:
        pool.create_raw(name, 0)
    monkeypatch.setattr("virtmigrate.storagepool._NONCE_AGE", 60.0)
    with pool.nonce() as name:
        world.a.driver.settle()
        assert pool.has(name)
        monkeypatch.setattr("virtmigrate.storagepool._NONCE_AGE", -1.0)
        world.a.driver.settle()
        assert not pool.has(name)
    assert set(others) <= set(pool.names())
