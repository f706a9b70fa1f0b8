# SPDX-License-Identifier: Apache-2.0
"""One libvirt host: namespaces, daemons, storage, and ways to hurt it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandbox import config, errors, namespace, pki, process

BRIDGE = "br0"
KVM = Path("/dev/kvm")
LIBVIRTD_TIMEOUT = 30.0
SASL_USER = "mover"
SASL_DATABASE = "/etc/libvirt/passwd.db"
SASL_PASSWORD = "only-for-the-sandbox"
SOCKET_LIMIT = 107  # bytes of a UNIX socket's path


@dataclasses.dataclass(frozen=True)
class Place:
    """What a host gets from its sandbox."""

    sandbox: str  # the sandbox's name
    directory: Path  # all of the host's files
    common: Path  # the sandbox's etc directory (hosts, passwd, group)
    address: str  # IPv4 address on the bridge
    prefix: int  # length of the network's prefix
    client: namespace.Namespace  # where the bridge is
    authority: pki.Authority
    pki: Path  # pkipath of a trusted client


class Host:
    """A libvirt host on the sandbox's bridge.

    Its files stay over stop() and start(), as a machine's do over a reboot.
    Not safe for use by several threads at once; different hosts are.
    """

    def __init__(self, name: str, place: Place, options: config.Options) -> None:
        self.name = name
        self.options = options
        self.address = place.address
        self.directory = place.directory
        self.storage = self.directory / "storage"
        self.logs = self.directory / "log"
        self.socket = self.directory / "run/libvirt/libvirt-sock"
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{place.sandbox}"))
        self._place = place
        kinds = ("mount", "net", "uts", "pid")
        self._namespace = namespace.Namespace(self.directory, kinds)
        if len(str(self.socket)) > SOCKET_LIMIT:
            raise errors.SandboxError(
                f"the path of a socket is too long: {self.socket}"
            )

    # Ways to connect

    @property
    def uri(self) -> str:
        """URI over TLS, with the certificates of a trusted client."""
        return self.uri_with(self._place.pki)

    def uri_with(self, pkipath: Path) -> str:
        """Return the URI over TLS with other certificates."""
        return f"qemu+tls://{self.name}/system?pkipath={pkipath}"

    @property
    def local_uri(self) -> str:
        """URI of the daemon's UNIX socket."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def tcp_uri(self) -> str:
        """URI over plain TCP. Raises SandboxError when the host has none."""
        if not self.options.tcp:
            raise errors.SandboxError(f"{self.name} does not listen on plain TCP")
        return f"qemu+tcp://{self.name}/system"

    @property
    def sasl_uri(self) -> str:
        """URI over TLS with user and password from a file."""
        if not self.options.sasl:
            raise errors.SandboxError(f"{self.name} does not ask for SASL")
        return f"{self.uri}&authfile={self.auth_file}"

    @property
    def auth_file(self) -> Path:
        """The file with user and password, as libvirt's clients read it."""
        return self.directory / "auth.conf"

    # The whole host

    def start(self) -> None:
        """Start the host and wait until its libvirtd answers."""
        self.stop()
        self._write_files()
        client = self._place.client
        self._namespace.start(
            list(self._mounts()),
            hostname=self.name,
            inside=client.enter("net", "mount"),
        )
        self._connect_bridge()
        if self.options.sasl:
            self._add_sasl_user()
        self.start_libvirtd()

    def stop(self) -> None:
        """End the host with all of its processes, as if its power failed."""
        self._namespace.stop()
        process.run(self._client("ip", "link", "del", self._port), check=False)

    def is_up(self) -> bool:
        """Return whether the host is there (its libvirtd may not be)."""
        return self._namespace.is_up()

    @property
    def pid(self) -> int:
        """The pid of the host's first process."""
        return self._namespace.pid

    def link(self, *, up: bool) -> None:
        """Connect the host to the bridge, or cut it off."""
        state = "up" if up else "down"
        process.run(self._client("ip", "link", "set", self._port, state))

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 30.0,
        stdin: str = "",
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host, as root."""
        return process.run(
            [*self._namespace.enter(), *argv],
            timeout=timeout,
            stdin=stdin,
            check=check,
        )

    def mount_storage(self, size: int) -> None:
        """Mount an empty tmpfs of size bytes on the storage root.

        It is seen in the client namespace and on all hosts, and stays until
        unmount_storage() or the end of the sandbox.
        """
        self.unmount_storage()
        options = f"size={size},mode=0755"
        process.run(
            self._client("mount", "-t", "tmpfs", "-o", options, "tmpfs", self.storage)
        )

    def unmount_storage(self) -> None:
        """Take the tmpfs away, if there is one."""
        process.run(self._client("umount", "--lazy", self.storage), check=False)

    # The daemon

    @property
    def libvirtd_pid(self) -> int:
        """Pid of libvirtd, as seen outside. Raises SandboxError without one."""
        record = self._daemon("libvirtd")
        if record is None:
            raise errors.SandboxError(f"libvirtd of {self.name} does not run")
        return record.pid

    def start_libvirtd(self) -> None:
        """Start virtlogd and libvirtd where they don't run, and wait for an answer."""
        if self._daemon("virtlogd") is None:
            (self.directory / "run/virtlogd.pid").unlink(missing_ok=True)
            self.run(["virtlogd", "--daemon"])
        if self._daemon("libvirtd") is None:
            (self.directory / "run/libvirtd.pid").unlink(missing_ok=True)
            self.run(["libvirtd", "--listen", "--daemon"])
        self.wait_libvirtd()

    def wait_libvirtd(self) -> None:
        """Wait until libvirtd answers on its socket."""
        process.run(["virsh", "-c", self.local_uri, "uri"], timeout=LIBVIRTD_TIMEOUT)

    def kill_libvirtd(self) -> None:
        """End libvirtd by SIGKILL; guests go on."""
        process.end([process.Record.of(self.libvirtd_pid)])

    def stop_libvirtd(self) -> None:
        """End libvirtd by SIGTERM; guests go on."""
        record = process.Record.of(self.libvirtd_pid)
        os.kill(record.pid, signal.SIGTERM)
        process.wait_until(
            lambda: not record.is_alive(),
            LIBVIRTD_TIMEOUT,
            f"the end of libvirtd on {self.name}",
        )

    def freeze(self) -> None:
        """Stop libvirtd's execution: it accepts connections and says nothing."""
        os.kill(self.libvirtd_pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen libvirtd go on."""
        os.kill(self.libvirtd_pid, signal.SIGCONT)

    def qemu_pids(self) -> list[int]:
        """Return the pids of the host's QEMU processes, as seen outside."""
        return [
            record.pid
            for record in self._processes()
            if process.name_of(record.pid).startswith("qemu-system-")
        ]

    # Private

    @property
    def _port(self) -> str:
        return f"h-{self.name}"

    @property
    def _mac(self) -> str:
        """The same after a restart, so that the others' ARP entries stay true."""
        return mac(self.address)

    def _client(self, *argv: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
        return [*self._place.client.enter("net", "mount"), *argv]

    def _processes(self) -> list[process.Record]:
        return process.in_namespace("pid", self._namespace.pid)

    def _daemon(self, name: str) -> process.Record | None:
        """Return the daemon whose pid file names it, if it runs."""
        try:
            inner = int((self.directory / f"run/{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        for record in self._processes():
            if process.inner_pid(record.pid) == inner and record.is_alive():
                return record if process.name_of(record.pid) == name else None
        return None

    def _mounts(self) -> Iterator[list[str]]:
        yield ["-t", "proc", "proc", "/proc"]
        yield ["-t", "sysfs", "sysfs", "/sys"]
        if KVM.exists():
            # Read-only, even root has no access: libvirt and QEMU agree that
            # there is no KVM, whoever QEMU runs as.
            yield ["--bind", f"{self.directory}/no-kvm", str(KVM)]
            yield ["-o", "remount,bind,ro", str(KVM)]
        # Read-only, so that /etc itself needs no directory for /etc/pki.
        layers = f"lowerdir={self.directory}/etc:/etc"
        yield ["-t", "overlay", "-o", layers, "overlay", "/etc"]
        for name in ("libvirt", "pki"):
            yield ["--bind", f"{self.directory}/etc/{name}", f"/etc/{name}"]
        for path in sorted(self._place.common.iterdir()):
            yield ["--bind", str(path), f"/etc/{path.name}"]
        for name in ("lib", "cache", "log"):
            yield ["--bind", f"{self.directory}/{name}", f"/var/{name}/libvirt"]
        yield ["--bind", f"{self.directory}/run", "/run"]

    def _write_files(self) -> None:
        shutil.rmtree(self.directory / "run", ignore_errors=True)
        names = ("etc/libvirt", "etc/sasl2", "run/lock", "run/libvirt")
        for name in (*names, "lib", "cache", "log/qemu", "storage"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "no-kvm").touch()
        etc = self.directory / "etc"
        text = config.libvirtd(self.options, self.uuid)
        (etc / "libvirt/libvirtd.conf").write_text(text)
        remember = can_remember_owner(self.storage)
        text = config.qemu(self.options, remember_owner=remember)
        (etc / "libvirt/qemu.conf").write_text(text)
        (etc / "sasl2/libvirt.conf").write_text(config.sasl())
        self._place.authority.server(
            etc / "pki", [self.name, self.address], self.options.server_certificate
        )

    def _connect_bridge(self) -> None:
        """Join the bridge; the address is on a bridge of the host's own, which
        guests' interfaces can join."""
        peer = ["name", "eth0", "netns", str(self._namespace.pid)]
        bridge = ["master", BRIDGE, "up"]
        veth = ["type", "veth", "peer", *peer]
        process.run(self._client("ip", "link", "add", self._port, *veth))
        process.run(self._client("ip", "link", "set", self._port, *bridge))
        self.run(
            ["ip", "-batch", "-"],
            stdin="link set lo up\n"
            f"link add {BRIDGE} address {self._mac} type bridge forward_delay 0\n"
            f"link set eth0 master {BRIDGE} up\n"
            f"link set {BRIDGE} up\n"
            f"address add {self.address}/{self._place.prefix} dev {BRIDGE}\n",
        )

    def _add_sasl_user(self) -> None:
        self.run(
            [
                "saslpasswd2",
                "-p",
                "-c",
                "-f",
                SASL_DATABASE,
                "-a",
                "libvirt",
                SASL_USER,
            ],
            stdin=SASL_PASSWORD,
        )
        self.auth_file.unlink(missing_ok=True)
        self.auth_file.write_text(config.auth(SASL_USER, SASL_PASSWORD))


def mac(address: str) -> str:
    """Return the MAC address that belongs to an IPv4 address."""
    octets = [int(part) for part in address.split(".")]
    return "02:76:" + ":".join(f"{octet:02x}" for octet in octets)


def can_remember_owner(directory: Path) -> bool:
    """Return whether files here carry the attributes that libvirt remembers by."""
    probe = directory / ".attributes"
    probe.touch()
    try:
        os.setxattr(probe, "trusted.sandbox", b"1")
    except OSError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()
    return True
