# SPDX-License-Identifier: Apache-2.0
"""A machine of the sandbox: a libvirt host with real LVM, and leaving nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import Machine, Sandbox, SandboxError, process
from virtmigrate.units import MiB

ROOT = Path(__file__).parent.parent.parent
NAME = "machines"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def own() -> Iterator[Sandbox]:
    """The sandbox of the tests' own; only its client's side reaches its machine."""
    with Sandbox(NAME) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def gamma(own: Sandbox) -> Machine:
    return own.add_machine("gamma")


def virsh(box: Sandbox, uri: str, *argv: str) -> str:
    return box.exec(["virsh", "-q", "-c", uri, *argv]).stdout.strip()


def test_pool_and_volume_over_tls(own: Sandbox, gamma: Machine, tmp_path: Path) -> None:
    assert gamma.group in virsh(own, gamma.uri, "pool-list", "--name").split()
    create = ["vol-create-as", gamma.group, "vda.0123", "8MiB"]
    virsh(own, gamma.uri, *create)
    sent, received = tmp_path / "sent", tmp_path / "received"
    sent.write_bytes(os.urandom(8 * MiB))
    for verb, path in (("vol-upload", sent), ("vol-download", received)):
        virsh(own, gamma.uri, verb, "vda.0123", str(path), "--pool", gamma.group)
    assert received.read_bytes() == sent.read_bytes()
    listed = gamma.run(["lvs", "--noheadings", "-o", "lv_name,lv_size", "--units", "m"])
    assert listed.stdout.split() == ["vda.0123", "8.00m"]


def test_runs_commands(gamma: Machine) -> None:
    assert gamma.run(["cat"], stdin="give\n").stdout == "give\n"
    assert gamma.run(["sh", "-c", "exit 3"], check=False).returncode == 3
    with pytest.raises(SandboxError, match="status 1"):
        gamma.run(["false"])
    with pytest.raises(SandboxError, match="no end after"):
        gamma.run(["sleep", "60"], timeout=0.5)
    gamma.write_file("/etc/new/file", "text", 0o600)
    assert gamma.run(["stat", "-c", "%a %s", "/etc/new/file"]).stdout == "600 4\n"
    pid = gamma.launch(["sleep", "60"])
    gamma.run(["kill", str(pid)])


def test_our_package_runs_inside(gamma: Machine) -> None:
    code = "import virtmigrate.receiver; print(virtmigrate.receiver.__file__)"
    found = gamma.run([gamma.python, "-c", code]).stdout.strip()
    assert Path(found) == ROOT / "virtmigrate/receiver.py"


def test_names_resolve(own: Sandbox, gamma: Machine) -> None:
    beta = own.add_host("beta")
    remote = f"qemu+tls://{beta.name}/system"
    inside = gamma.run(["virsh", "-q", "-c", remote, "hostname"])
    assert inside.stdout.strip() == "beta"
    outside = beta.run(["virsh", "-q", "-c", f"qemu+tls://{gamma.name}/system", "uri"])
    assert outside.stdout.strip()


def test_daemon_is_killed_and_comes_back(own: Sandbox, gamma: Machine) -> None:
    gamma.kill_libvirtd()
    gamma.start_libvirtd()
    assert virsh(own, gamma.uri, "hostname") == "gamma"


def test_disks_stay_over_a_power_cut(own: Sandbox, gamma: Machine) -> None:
    gamma.run(["lvcreate", "--yes", "-L", "4M", "-n", "kept", gamma.group])
    gamma.kill()
    assert not gamma.is_up()
    gamma.start()
    assert "kept" in virsh(own, gamma.uri, "vol-list", gamma.group)


def test_removal_leaves_nothing(own: Sandbox, gamma: Machine) -> None:
    members = [process.Record.of(pid) for pid in gamma.qemu_pids()]
    assert members
    own.remove_machine("gamma")
    assert not any(member.is_alive() for member in members)
    assert not gamma.directory.exists()
    assert "h-gamma" not in own.exec(["ip", "-brief", "link"]).stdout


KILLED = """
import sys
from sandbox import Sandbox
Sandbox(sys.argv[1]).__enter__().add_machine("delta")
"""


def machine_pids(name: str) -> list[int]:
    """Return the processes of the machine of a sandbox that somebody is making."""
    with contextlib.suppress(SandboxError, KeyError, OSError):
        return Sandbox.attach(name).machines["delta"].qemu_pids()
    return []


def test_reclaims_what_a_killed_run_left() -> None:
    name = f"{NAME}-k"
    child = subprocess.Popen([sys.executable, "-c", KILLED, name], cwd=ROOT)
    process.wait_until(lambda: bool(machine_pids(name)), 30, "a machine")
    (record,) = map(process.Record.of, machine_pids(name))
    child.kill()
    child.wait(10)
    assert record.is_alive()
    with Sandbox(name) as box:
        assert not record.is_alive()
        assert not box.machines
    assert not box.directory.exists()
