# SPDX-License-Identifier: Apache-2.0
"""Real guests that are one and the same: restored several times from one memory image.

As the API alone lets one: the guest is saved, the XML in the head of the file is
rewritten, and each rewriting is restored. Nothing of the package that is tested makes
them.
"""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt

from sandbox import Host as SandboxHost
from sandbox import guest
from virtmigrate import domainxml, identity
from virtmigrate.host import Host

HEADER = struct.Struct("<16s5I14I")
PATIENCE = 90.0  # seconds that a guest may take under emulation, beside others


@contextlib.contextmanager
def dhcp(host: SandboxHost, directory: Path) -> Iterator[None]:
    """Have a DHCP server on a host's bridge.

    Arguments:
        directory: an empty one, for its program.
    """
    (package,) = (guest.CACHE / "packages").glob("busybox-static_*")
    subprocess.run(["dpkg-deb", "-x", package, directory], check=True, timeout=60)
    network = host.address.rpartition(".")[0]
    conf, pid = host.storage / "udhcpd.conf", host.storage / "udhcpd.pid"
    conf.write_text(
        f"start {network}.200\nend {network}.230\ninterface br0\n"
        f"pidfile {pid}\nlease_file {host.storage}/udhcpd.leases\n"
        "option subnet 255.255.255.0\noption lease 600\n"
    )
    host.run([str(directory / "bin/busybox"), "udhcpd", "-S", str(conf)])
    wait_for(pid.exists)
    try:
        yield
    finally:
        host.run(["kill", pid.read_text().strip()])
        for path in host.storage.glob("udhcpd.*"):
            path.unlink(missing_ok=True)


def expect_served(
    host: SandboxHost, address: str, report: identity.Report, kind: str
) -> None:
    """Who answers there shows the host key that a report tells of."""
    scan = ["ssh-keyscan", "-T", "30", "-t", kind, address]
    known = host.run(scan, timeout=60).stdout
    shown = host.run(["ssh-keygen", "-l", "-f", "-"], stdin=known).stdout
    (mine,) = (
        value.split()[1]
        for name, value in identity.identities(report).values.items()
        if f"_{kind}_" in name
    )
    assert mine in shown


def expect_no_value_twice(all_of: list[identity.Identities]) -> None:
    for number, one in enumerate(all_of):
        for other in all_of[number + 1 :]:
            same = set(one.values.items()) & set(other.values.items())
            assert {name for name, _ in same} <= {"clock"}


def wait_for(call: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not call():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


class Twin:
    """A running guest, or a restored copy of one."""

    def __init__(self, host: SandboxHost, ours: Host, name: str, mac: str) -> None:
        self.name = name
        self.mac = mac
        self.host = ours
        self.uuid = str(uuid.uuid4())
        self.console = host.storage / f"{name}.log"
        self.disk = host.storage / f"{name}.raw"

    def agent(self) -> identity.AgentGuest:
        return identity.AgentGuest(self.host, self.uuid)

    def sh(self, script: str, timeout: float = 60.0) -> str:
        argv = ["/bin/sh", "-c", f"PATH=/usr/sbin:/usr/bin:/sbin:/bin; {script}"]
        result = self.agent().run(argv, timeout=timeout)
        assert result.code == 0, (script, result)
        return result.out.decode().strip()

    def said(self, word: str) -> list[str]:
        """What the console says after a word at the start of a line."""
        if not self.console.exists():
            return []
        text = self.console.read_text(errors="replace").replace("\r", "")
        return re.findall(rf"^{word} (.*)$", text, re.MULTILINE)


class Twins:
    """A guest, and what is restored of its memory."""

    def __init__(
        self,
        host: SandboxHost,
        image: guest.GuestImage,
        *,
        network: bool = True,
        boot: str = "",
    ) -> None:
        self.place = host
        self.boot = boot  # what QEMU loads instead of the disk's boot record
        self.network = network
        self.host = Host(host.local_uri, name=host.name)
        self.conn = libvirt.open(host.local_uri)
        self.made: list[Twin] = []
        self.memory = host.storage / f"twins-{uuid.uuid4().hex[:6]}.mem"
        self.source = self._new()
        image.copy(self.source.disk)

    def close(self) -> None:
        for each in self.made:
            with contextlib.suppress(libvirt.libvirtError):
                self.domain(each).destroy()
            each.disk.unlink(missing_ok=True)
            each.console.unlink(missing_ok=True)
        self.memory.unlink(missing_ok=True)
        self.conn.close()
        self.host.close()

    def domain(self, twin: Twin) -> libvirt.virDomain:
        return self.conn.lookupByUUIDString(twin.uuid)

    def start(self, memory: int = 128, seconds: float = PATIENCE) -> Twin:
        """Start the source, and wait for its agent."""
        self.conn.createXML(self._xml(self.source, memory))
        self.wait_for_agent(self.source, seconds)
        return self.source

    def wait_for_agent(self, twin: Twin, seconds: float = PATIENCE) -> None:
        domain = self.domain(twin)
        wait_for(
            lambda: domainxml.agent_state(domain.XMLDesc(0)) == "connected", seconds
        )

    def save(self) -> None:
        """Save the source; it ends."""
        self.domain(self.source).save(str(self.memory))

    def restore(self) -> Twin:
        """Restore the memory as another guest, off the network, and let it run."""
        twin = self._new()
        guest.GuestImage(self.source.disk).copy(twin.disk)
        self._rewrite(twin)
        self.conn.restoreFlags(str(self.memory), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
        self.link(twin, up=False)
        self.domain(twin).resume()
        self.wait_for_agent(twin)
        return twin

    def link(self, twin: Twin, *, up: bool) -> None:
        """Connect a guest to the network, or not."""
        if self.network:
            xml = self._interface(twin, up=up)
            self.domain(twin).updateDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    # Private

    def _new(self) -> Twin:
        unique = uuid.uuid4().hex
        mac = "52:54:00:" + ":".join(unique[i : i + 2] for i in (0, 2, 4))
        twin = Twin(self.place, self.host, f"twin-{unique[:6]}", mac)
        self.made.append(twin)
        return twin

    def _rewrite(self, twin: Twin) -> None:
        """Let the head of the memory file say who is restored."""
        with self.memory.open("r+b") as file:
            magic, *numbers = HEADER.unpack(file.read(HEADER.size))
            data = file.read(numbers[1])
            xml = data[: data.index(b"\0")].decode()
            last = self.made[-2] if len(self.made) > 2 else self.source
            for old, new in (
                (last.uuid, twin.uuid),
                (last.name, twin.name),
                (last.mac, twin.mac),
            ):
                xml = xml.replace(old, new)
            assert len(xml) <= data.index(b"\0")
            file.seek(HEADER.size)
            file.write(xml.encode().ljust(data.index(b"\0")))
        assert magic.startswith(b"LibvirtQemudSa")

    def _interface(self, twin: Twin, *, up: bool) -> str:
        return (
            f"<interface type='bridge'><mac address='{twin.mac}'/>"
            "<source bridge='br0'/><model type='virtio'/>"
            f"<link state='{'up' if up else 'down'}'/>"
            "<address type='pci' domain='0x0000' bus='0x00' slot='0x05' "
            "function='0x0'/></interface>"
        )

    def _xml(self, twin: Twin, memory: int) -> str:
        interface = self._interface(twin, up=True) if self.network else ""
        return f"""<domain type='qemu'>
          <name>{twin.name}</name><uuid>{twin.uuid}</uuid>
          <memory unit='MiB'>{memory}</memory>
          <os><type arch='x86_64' machine='q35'>hvm</type>{self.boot}</os>
          <features><acpi/></features>
          <devices>
            <disk type='file' device='disk'>
              <driver name='qemu' type='raw'/><source file='{twin.disk}'/>
              <target dev='vda' bus='virtio'/>
            </disk>
            {interface}
            <serial type='file'><source path='{twin.console}'/></serial>
            <channel type='unix'>
              <target type='virtio' name='org.qemu.guest_agent.0'/>
            </channel>
          </devices>
        </domain>"""
