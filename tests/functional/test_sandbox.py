# SPDX-License-Identifier: Apache-2.0
"""The sandbox itself: hosts, ways to connect, ways to hurt, and leaving nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import Host, Sandbox, SandboxError, guest, namespace, process, reach

MiB = 1024 * 1024
ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox("selftest") as sandbox:
        sandbox.add_hosts(["alpha", "beta"])
        yield sandbox


@pytest.fixture
def alpha(box: Sandbox) -> Host:
    return box.hosts["alpha"]


@pytest.fixture
def beta(box: Sandbox) -> Host:
    return box.hosts["beta"]


def virsh(box: Sandbox, uri: str, *argv: str, user: bool = False) -> str:
    """Return what virsh says on the client's side. Raises SandboxError."""
    return box.exec(["virsh", "-q", "-c", uri, *argv], user=user).stdout.strip()


def domain(host: Host, name: str, machine: str = "q35") -> str:
    """Return the XML of a guest whose disk and console lie in the storage root."""
    return f"""<domain type='qemu'>
      <name>{name}</name>
      <memory unit='MiB'>128</memory>
      <os><type arch='x86_64' machine='{machine}'>hvm</type></os>
      <features><acpi/></features>
      <devices>
        <disk type='file' device='disk'>
          <driver name='qemu' type='raw'/>
          <source file='{host.storage}/{name}.raw'/>
          <target dev='vda' bus='virtio'/>
        </disk>
        <interface type='bridge'>
          <source bridge='br0'/>
          <model type='virtio'/>
        </interface>
        <serial type='file'><source path='{host.storage}/{name}.log'/></serial>
        <channel type='unix'>
          <target type='virtio' name='org.qemu.guest_agent.0'/>
        </channel>
        <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
      </devices>
    </domain>"""


def paused_guest(box: Sandbox, host: Host, name: str) -> None:
    """Create a guest that holds a QEMU process, and no processor time."""
    image = guest.image().path
    box.exec(["cp", "--sparse=always", str(image), f"{host.storage}/{name}.raw"])
    path = box.directory / f"{name}.xml"
    path.write_text(domain(host, name))
    virsh(box, host.local_uri, "create", "--paused", str(path))


# Starting and reaching hosts


def test_two_hosts_start_within_four_seconds() -> None:
    begin = time.monotonic()
    with Sandbox("selfstart") as sandbox:
        sandbox.add_hosts(["alpha", "beta"])
        assert time.monotonic() - begin < 4


def test_hosts_differ(box: Sandbox, alpha: Host, beta: Host) -> None:
    assert virsh(box, alpha.uri, "hostname") == "alpha"
    assert virsh(box, beta.local_uri, "hostname") == "beta"
    assert alpha.uuid in virsh(box, alpha.uri, "capabilities")
    assert beta.uuid in virsh(box, beta.uri, "capabilities")
    assert alpha.uuid != beta.uuid


def test_hosts_reach_each_other_by_name(alpha: Host) -> None:
    uri = "qemu+tls://beta/system"
    assert alpha.run(["virsh", "-q", "-c", uri, "hostname"]).stdout.strip() == "beta"


def test_other_network_namespace_only(box: Sandbox, alpha: Host) -> None:
    mine = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True)
    assert alpha.address not in mine.stdout
    assert alpha.address in alpha.run(["ip", "-o", "addr"]).stdout


def test_plain_tcp(box: Sandbox, alpha: Host) -> None:
    host = box.add_host("tcphost", tcp=True)
    assert virsh(box, host.tcp_uri, "hostname") == "tcphost"
    with pytest.raises(SandboxError, match="does not listen"):
        _ = alpha.tcp_uri
    with pytest.raises(SandboxError, match="refused"):
        virsh(box, "qemu+tcp://alpha/system", "hostname")
    host.stop()


def test_sasl(box: Sandbox) -> None:
    host = box.add_host("saslhost", sasl=True)
    assert virsh(box, host.sasl_uri, "hostname") == "saslhost"
    with pytest.raises(SandboxError, match="authentication"):
        virsh(box, host.uri, "hostname")
    host.stop()


def test_allowed_names(box: Sandbox) -> None:
    host = box.add_host("dnhost", dn_list=["CN=nobody-of-ours"])
    with pytest.raises(SandboxError):
        virsh(box, host.uri, "hostname")
    host.stop()


# Certificates


@pytest.mark.parametrize("kind", ["expired", "other-ca"])
def test_bad_client_certificate(box: Sandbox, alpha: Host, kind: str) -> None:
    with pytest.raises(SandboxError, match="certificate"):
        virsh(box, alpha.uri_with(box.make_pki(kind)), "hostname")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("expired", "expired"),
        ("other-ca", "known issuer"),
        ("wrong-name", "name"),
    ],
)
def test_bad_server_certificate(box: Sandbox, kind: str, message: str) -> None:
    host = box.add_host(f"s-{kind}", server_certificate=kind)
    with pytest.raises(SandboxError, match=message):
        virsh(box, host.uri, "hostname")
    assert virsh(box, host.local_uri, "hostname") == host.name
    host.stop()


# The service user


def test_service_user(box: Sandbox) -> None:
    host = box.add_host("service", service_user=True)
    assert virsh(box, host.local_uri, "hostname", user=True) == "service"
    paused_guest(box, host, "owned")
    (pid,) = host.qemu_pids()
    status = Path(f"/proc/{pid}/status").read_text()
    uid = host.run(["id", "-u", "libvirt-qemu"]).stdout.strip()
    assert f"Uid:\t{uid}" in status
    host.stop()


def test_service_user_has_no_rights_elsewhere(box: Sandbox, alpha: Host) -> None:
    with pytest.raises(SandboxError, match="Permission denied"):
        virsh(box, alpha.local_uri, "hostname", user=True)


# Ways to hurt


def test_libvirtd_killed_and_back(box: Sandbox, alpha: Host) -> None:
    paused_guest(box, alpha, "survivor")
    pids = alpha.qemu_pids()
    first = alpha.libvirtd_pid
    alpha.kill_libvirtd()
    assert alpha.qemu_pids() == pids
    with pytest.raises(SandboxError):
        _ = alpha.libvirtd_pid
    alpha.start_libvirtd()
    assert alpha.libvirtd_pid != first
    # Stopped while it finds its guests again, libvirtd gives them up.
    asked = ["qemu-monitor-command", "survivor", '{"execute": "query-status"}']
    assert "return" in virsh(box, alpha.uri, *asked)
    alpha.stop_libvirtd()
    alpha.start_libvirtd()
    assert virsh(box, alpha.uri, "domstate", "survivor") == "paused"
    virsh(box, alpha.uri, "destroy", "survivor")
    assert alpha.qemu_pids() == []


def test_frozen_libvirtd(box: Sandbox, alpha: Host) -> None:
    alpha.freeze()
    argv = ["virsh", "-c", alpha.uri, "hostname"]
    with pytest.raises(SandboxError, match="no end after"):
        box.exec(argv, timeout=1.0)
    alpha.thaw()
    assert box.exec(argv).returncode == 0


def test_link_cut(box: Sandbox, beta: Host) -> None:
    beta.link(up=False)
    argv = ["virsh", "-c", beta.uri, "hostname"]
    with pytest.raises(SandboxError):
        box.exec(argv, timeout=1.0)
    beta.link(up=True)
    assert box.exec(argv).returncode == 0


def test_host_stopped_and_back(box: Sandbox, beta: Host) -> None:
    paused_guest(box, beta, "doomed")
    pids = [process.Record.of(pid) for pid in beta.qemu_pids()]
    assert pids
    beta.stop()
    assert not beta.is_up()
    assert not any(record.is_alive() for record in pids)
    beta.start()
    assert virsh(box, beta.uri, "list", "--all", "--name") == ""


def test_full_disk(box: Sandbox, beta: Host) -> None:
    beta.mount_storage(2 * MiB)
    fill = ["dd", "if=/dev/zero", f"of={beta.storage}/file", "bs=1M", "count=3"]
    assert "No space left" in beta.run(fill, check=False).stderr
    assert box.exec(["stat", "-c", "%s", f"{beta.storage}/file"]).stdout != ""
    beta.unmount_storage()
    assert beta.run(["ls", f"{beta.storage}/file"], check=False).returncode != 0


# The guest


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_guest_beats_and_goes_on(box: Sandbox, alpha: Host, machine: str) -> None:
    name = f"guest-{machine}"
    disk = alpha.storage / f"{name}.raw"
    console = alpha.storage / f"{name}.log"
    guest.image().copy(disk)
    path = alpha.storage / f"{name}.xml"
    path.write_text(domain(alpha, name, machine))
    virsh(box, alpha.uri, "define", str(path))
    virsh(box, alpha.uri, "start", name)
    wait_for_beats(console, 3)
    ping = '{"execute": "guest-ping"}'
    answer = virsh(box, alpha.uri, "qemu-agent-command", name, ping)
    assert answer == '{"return":{}}'
    shut_down(box, alpha, name)
    before = guest.verify(disk)
    assert (before.first, before.boots, before.problems) == (1, 1, [])
    assert before.last >= guest.beats(console)[-1].number >= 3

    with disk.open("r+b") as file:
        file.truncate(disk.stat().st_size + 16 * MiB)
    console.unlink()
    virsh(box, alpha.uri, "start", name)
    wait_for_beats(console, 2)
    assert guest.boots(console) == [before.last + 1]
    assert guest.disks(console) == {"vda": disk.stat().st_size}
    shut_down(box, alpha, name)
    after = guest.verify(disk)
    assert (after.first, after.boots, after.problems) == (1, 2, [])
    assert after.last > before.last
    virsh(box, alpha.uri, "undefine", name)


def wait_for_beats(console: Path, count: int) -> None:
    process.wait_until(
        lambda: console.exists() and len(guest.beats(console)) >= count,
        20.0,
        f"{count} beats of the guest",
    )


def shut_down(box: Sandbox, host: Host, name: str) -> None:
    """Press the power button and wait for the end."""
    virsh(box, host.uri, "shutdown", name, "--mode", "acpi")
    process.wait_until(
        lambda: virsh(box, host.uri, "domstate", name) == "shut off",
        10.0,
        f"the end of {name}",
    )


# Commands beside the hosts


def sandbox_command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "sandbox", *argv]


def test_exec_passes_exit_code_and_environment() -> None:
    script = 'test "$MARK" = kept && test "$PWD" = "$0" && exit 7'
    argv = sandbox_command("exec", "selfexec", "--", "sh", "-c", script, str(ROOT))
    done = subprocess.run(
        argv, cwd=ROOT, env={**os.environ, "MARK": "kept"}, timeout=30
    )
    assert done.returncode == 7
    assert not Sandbox("selfexec").directory.exists()


def test_exec_passes_signals() -> None:
    script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    argv = sandbox_command("exec", "selfexec", "--", "sh", "-c", script)
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.terminate()
        assert child.wait(20) == 9


def test_exec_as_user(box: Sandbox) -> None:
    done = box.exec(["sh", "-c", "id -un; id -Gn; touch $HOME/file"], user=True)
    assert done.stdout.split() == ["mover", "mover", "libvirt"]


def test_user_reaches_a_checkout_in_a_closed_directory(box: Sandbox) -> None:
    closed = box.directory / "closed"
    checkout = closed / "checkout"
    checkout.mkdir(parents=True)
    closed.chmod(0o700)
    (checkout / "file").write_text("content")
    inside = namespace.Namespace(box.directory / "inside", ["mount"])
    inside.start(reach.mounts(checkout, box.directory / "aside"))
    try:
        as_user = [*inside.enter(), "setpriv", "--reuid=64901", "--clear-groups", "--"]
        done = process.run([*as_user, "cat", checkout / "file"])
        assert done.stdout == "content"
        assert process.run([*as_user, "ls", closed], check=False).returncode != 0
        process.run([*inside.enter(), "touch", checkout / "new"])
    finally:
        inside.stop()
    assert (checkout / "new").exists()
    assert closed.stat().st_mode & 0o777 == 0o700


def test_own_sandbox_in_use_is_refused(box: Sandbox) -> None:
    argv = sandbox_command("exec", "--own", box.name, "--", "true")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert f"in use by process {os.getpid()}" in done.stderr


def test_without_root(box: Sandbox) -> None:
    argv = [sys.executable, "-m", "sandbox", "up", "selfnone"]
    done = box.exec(argv, user=True, check=False)
    assert done.returncode == 1
    assert "needs root" in done.stderr
    assert "Traceback" not in done.stderr


def test_attach_from_another_process(box: Sandbox, alpha: Host) -> None:
    script = (
        "from sandbox import Sandbox; box = Sandbox.attach();"
        "host = box.hosts['alpha']; print(host.uuid, host.libvirtd_pid);"
        "host.stop(); host.start()"
    )
    done = box.exec([sys.executable, "-c", script])
    assert done.stdout.split()[0] == alpha.uuid
    assert virsh(box, alpha.uri, "hostname") == "alpha"


# Leaving nothing


def surroundings() -> tuple[str, str]:
    """Return interfaces and mounts of the namespaces this process is in."""
    links = process.run(["ip", "-o", "link"]).stdout
    return links, Path("/proc/self/mounts").read_text()


def everything_of(box: Sandbox) -> list[process.Record]:
    """Return all processes in the namespaces of a sandbox."""
    found = process.in_namespace("net", box._client.pid)
    for host in box.hosts.values():
        found += process.in_namespace("net", host.pid)
    return found


def test_down_leaves_nothing() -> None:
    before = surroundings()
    with Sandbox("selfdown") as sandbox:
        host = sandbox.add_host("alpha")
        host.mount_storage(80 * MiB)
        paused_guest(sandbox, host, "left")
        everything = everything_of(sandbox)
        assert len(everything) >= 5
        assert surroundings() == before
    assert not any(record.is_alive() for record in everything)
    assert surroundings() == before
    assert not sandbox.directory.exists()


KILLED_RUN = """
import subprocess, sys, time
from sandbox import Sandbox
box = Sandbox.attach()
box.add_hosts(["alpha", "beta"])
subprocess.Popen(["sleep", "600"])
print("ready", flush=True)
time.sleep(600)
"""


def test_killed_run_is_reclaimed() -> None:
    before = surroundings()
    argv = sandbox_command("exec", "--own", "selfkill", "--")
    argv += [sys.executable, "-c", KILLED_RUN]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        assert runner.stdout.readline() == "ready\n"
        left = everything_of(Sandbox.attach("selfkill"))
        runner.send_signal(signal.SIGKILL)
        runner.wait(10)
        assert sum(record.is_alive() for record in left) >= 5
        with Sandbox("selfkill") as sandbox:
            assert not any(record.is_alive() for record in left)
            assert virsh(sandbox, sandbox.add_host("alpha").uri, "hostname") == "alpha"
    assert not sandbox.directory.exists()
    assert surroundings() == before
