# SPDX-License-Identifier: Apache-2.0
"""A whole libvirt host in a virtual machine, for what needs a kernel of its own: LVM.

It runs under emulation, in a PID namespace, on the sandbox's bridge by a tap. Its
root file system is a layer over a cached one (rootbuild.py), a second disk is the
volume group. Configuration, certificates, logs and the checkout are shared with
it over virtiofs; commands are run by the guest agent.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandbox import agent, config, errors, host, namespace, process, rootbuild

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = CHECKOUT / ".cache"
GROUP = "vg"
DISK = 4 * 1024**3  # sparse
MEMORY = "1G"
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
START_TIMEOUT = 90.0
STARTED_TIMEOUT = 10.0
COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=3 no_timer_check random.trust_cpu=on panic=-1 "
    "mitigations=off cryptomgr.notests tsc=reliable raid=noautodetect "
    "net.ifnames=0 selinux=0 apparmor=0"
)
POOL = """<pool type='logical'>
  <name>{group}</name>
  <uuid>{uuid}</uuid>
  <source><name>{group}</name><format type='lvm2'/></source>
  <target><path>/dev/{group}</path></target>
</pool>
"""


class Machine:
    """A libvirt host with a volume group, in a virtual machine.

    Its disks stay over stop() and start(). Not safe for use by several threads
    at once; different machines are.
    """

    group = GROUP
    """The volume group, and the libvirt pool of it, which is up."""

    python = str(CHECKOUT / ".venv/bin/python")
    """Runs our package, inside as outside."""

    def __init__(self, name: str, place: host.Place) -> None:
        self.name = name
        self.address = place.address
        self.directory = place.directory
        self.logs = self.directory / "share/log"  # its /var/log/libvirt
        self.console = self.directory / "console.log"
        self.disk = self.directory / "group.raw"
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{place.sandbox}"))
        self._place = place
        self._share = self.directory / "share"
        self._namespace = namespace.Namespace(self.directory, ("mount", "pid"))
        self._agent = agent.Agent(self.directory / "agent.sock")
        if len(str(self.directory / "agent.sock")) > host.SOCKET_LIMIT:
            raise errors.SandboxError(f"the path is too long: {self.directory}")

    @property
    def uri(self) -> str:
        """URI over TLS, with the certificates of a trusted client."""
        return self.uri_with(self._place.pki)

    def uri_with(self, pkipath: Path) -> str:
        """Return the URI over TLS with other certificates."""
        return f"qemu+tls://{self.name}/system?pkipath={pkipath}"

    local_uri = "qemu:///system"
    """URI for what runs inside."""

    # The whole machine

    def start(self) -> None:
        """Start the machine and wait until its libvirtd answers."""
        self.kill()
        booted = root()
        self._write_files(booted)
        inside = self._place.client.enter("net", "mount")
        self._namespace.start(list(self._mounts()), inside=inside)
        self._add_tap()
        self._start_virtiofsd()
        self._start_qemu(booted)
        self._wait()
        self._keep_capabilities(booted)

    def stop(self) -> None:
        """End the machine after it has written out what it has in memory."""
        if self.is_up():
            self.run(["sync"])
        self.kill()

    def kill(self) -> None:
        """End the machine at once, as if its power failed."""
        self._namespace.stop()
        process.run(self._client("ip", "link", "del", self._port), check=False)

    def is_up(self) -> bool:
        """Return whether the virtual machine runs."""
        return self._namespace.is_up() and bool(self.qemu_pids())

    def qemu_pids(self) -> list[int]:
        """Return the pid of the virtual machine, as seen outside."""
        return [
            record.pid
            for record in process.in_namespace("pid", self._namespace.pid)
            if process.name_of(record.pid).startswith("qemu-system-")
        ]

    def link(self, *, up: bool) -> None:
        """Connect the machine to the bridge, or cut it off; run() works on."""
        state = "up" if up else "down"
        process.run(self._client("ip", "link", "set", self._port, state))

    # Commands inside

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 30.0,
        stdin: str = "",
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root; one after the other.

        Our package is on its PYTHONPATH. What it leaves in the background must
        not keep its output open: see launch().
        """
        done = self._agent.run(argv, timeout=timeout, stdin=stdin)
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise errors.SandboxError(
                f"{self.name}: {' '.join(argv)}: status {done.returncode}: {said}"
            )
        return done

    def launch(self, argv: Sequence[str], log: str = "/dev/null") -> int:
        """Start a command inside that goes on; return its pid there.

        Arguments:
          log: a file inside that its output is added to.
        """
        command = f"setsid {shlex.join(argv)} </dev/null >>{shlex.quote(log)} 2>&1 &"
        return int(self.run(["bash", "-c", f"{command} echo $!"]).stdout)

    def write_file(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside, with its directory."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.run(["sh", "-c", script, "sh", path, f"{mode:o}"], stdin=text)

    def kill_libvirtd(self) -> None:
        """End libvirtd by SIGKILL; guests go on."""
        wait = "while kill -0 $pid 2>/dev/null; do sleep 0.05; done"
        script = f"pid=$(cat /run/libvirtd.pid) && kill -KILL $pid && {wait}"
        self.run(["bash", "-c", script])

    def start_libvirtd(self) -> None:
        """Start libvirtd, and wait for an answer."""
        self.run(["libvirtd", "--listen", "--daemon"])
        self.run(["virsh", "-q", "-c", self.local_uri, "uri"])

    # Private

    @property
    def _port(self) -> str:
        return f"h-{self.name}"

    @property
    def _mac(self) -> str:
        return host.mac(self.address)

    def _client(self, *argv: str) -> list[str]:
        return [*self._place.client.enter("net", "mount"), *argv]

    def _inside(self, *argv: str) -> list[str]:
        """Also in the client's network, wherever this process runs."""
        return [*self._namespace.enter("mount", "pid", "net"), *argv]

    def _trees(self) -> list[Path]:
        """Trees that are seen inside, read-only, at the same path."""
        return [CHECKOUT, *sorted({Path(sys.prefix).resolve()} - {CHECKOUT / ".venv"})]

    def _mounts(self) -> Iterator[list[str]]:
        yield ["-t", "proc", "proc", "/proc"]
        yield ["--bind", str(self._place.common), f"{self._share}/common"]
        for path in self._trees():
            target = f"{self._share}/tree{path}"
            yield ["--bind", str(path), target]
            yield ["-o", "remount,bind,ro", target]

    def _keep_capabilities(self, root: rootbuild.Root) -> None:
        """Keep what libvirt finds out about QEMU: under emulation it takes 10 s.

        libvirt itself sees whether that is still true of the next machine.
        """
        kept, found = capabilities(root), self._share / "cache/qemu/capabilities"
        if kept.is_dir():
            return
        self.run(["virsh", "-q", "-c", self.local_uri, "capabilities"], timeout=90)
        with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
            copy = Path(directory) / "capabilities"
            shutil.copytree(found, copy)
            with contextlib.suppress(OSError):
                # Another machine was first.
                copy.rename(kept)

    def _write_files(self, root: rootbuild.Root) -> None:
        cache = self._share / "cache/qemu/capabilities"
        if capabilities(root).is_dir() and not cache.exists():
            shutil.copytree(capabilities(root), cache)
        for name in ("cache", "etc/libvirt/storage/autostart", "log/qemu", "common"):
            (self._share / name).mkdir(parents=True, exist_ok=True)
        for path in self._trees():
            Path(f"{self._share}/tree{path}").mkdir(parents=True, exist_ok=True)
        paths = "".join(f"{path}\n" for path in self._trees())
        (self._share / "paths").write_text(paths)
        self._write_configuration(self._share / "etc")
        if not self.disk.exists():
            with self.disk.open("wb") as output:
                output.truncate(DISK)
            base = ["-b", str(root.disk), "-F", "raw"]
            layer = str(self.directory / "root.qcow2")
            process.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, layer])

    def _write_configuration(self, etc: Path) -> None:
        options = config.Options()
        text = config.libvirtd(options, self.uuid)
        (etc / "libvirt/libvirtd.conf").write_text(text)
        text = config.qemu(options, remember_owner=False)
        (etc / "libvirt/qemu.conf").write_text(text)
        text = POOL.format(
            group=self.group, uuid=uuid.uuid5(uuid.UUID(self.uuid), "pool")
        )
        pool = etc / f"libvirt/storage/{self.group}.xml"
        pool.write_text(text)
        start = etc / "libvirt/storage/autostart" / pool.name
        start.unlink(missing_ok=True)
        start.symlink_to(f"/etc/libvirt/storage/{pool.name}")
        self._place.authority.server(
            etc / "pki", [self.name, self.address], options.server_certificate
        )

    def _add_tap(self) -> None:
        tap = ["tuntap", "add", "dev", self._port, "mode", "tap"]
        process.run(self._client("ip", *tap))
        bridge = ["master", host.BRIDGE, "up"]
        process.run(self._client("ip", "link", "set", self._port, *bridge))

    def _start_virtiofsd(self) -> None:
        socket = self.directory / "virtiofs.sock"
        socket.unlink(missing_ok=True)
        options = [f"--socket-path={socket}", "-o", f"source={self._share}"]
        options += ["-o", "sandbox=chroot,cache=auto,announce_submounts"]
        start = 'exec "$@" </dev/null >"$0" 2>&1 &'
        log = str(self.directory / "virtiofsd.log")
        process.run(self._inside("sh", "-c", start, log, VIRTIOFSD, *options))
        process.wait_until(socket.exists, STARTED_TIMEOUT, f"virtiofsd of {self.name}")

    def _start_qemu(self, root: rootbuild.Root) -> None:
        (self.directory / "agent.sock").unlink(missing_ok=True)
        process.run(self._inside("qemu-system-x86_64", *self._qemu_options(root)))

    def _qemu_options(self, root: rootbuild.Root) -> Iterator[str]:
        directory = self.directory
        words = {"box.name": self.name, "box.group": self.group}
        words |= {"box.address": self.address, "box.prefix": str(self._place.prefix)}
        words["box.checkout"] = str(CHECKOUT)
        parameters = " ".join(f"{key}={value}" for key, value in words.items())
        drive = "if=none,cache=unsafe,discard=unmap"
        yield from ("-nodefaults", "-no-user-config", "-display", "none", "-daemonize")
        yield from ("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2")
        yield from ("-machine", "q35,memory-backend=ram,usb=off", "-m", MEMORY)
        yield from ("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on")
        yield from ("-kernel", str(root.kernel), "-initrd", str(root.initrd))
        yield from ("-append", f"{COMMAND_LINE} {parameters}", "-no-reboot")
        yield from ("-serial", f"file:{self.console}")
        yield from (
            "-drive",
            f"{drive},id=root,format=qcow2,file={directory}/root.qcow2",
        )
        yield from ("-device", "virtio-blk-pci,drive=root")
        yield from ("-drive", f"{drive},id=group,format=raw,file={self.disk}")
        yield from ("-device", "virtio-blk-pci,drive=group")
        tap = f"tap,id=net,ifname={self._port},script=no,downscript=no"
        yield from ("-netdev", tap)
        yield from ("-device", f"virtio-net-pci,netdev=net,mac={self._mac},romfile=")
        yield from ("-chardev", f"socket,id=fs,path={directory}/virtiofs.sock")
        yield from ("-device", "vhost-user-fs-pci,chardev=fs,tag=outside")
        agent = f"socket,id=agent,path={directory}/agent.sock,server=on,wait=off"
        yield from ("-chardev", agent, "-device", "virtio-serial-pci")
        port = "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"
        yield from ("-device", port, "-device", "virtio-rng-pci")

    def _wait(self) -> None:
        try:
            self._agent.wait(START_TIMEOUT)
        except errors.SandboxError as error:
            said = self.console.read_text(errors="replace")[-2000:]
            raise errors.SandboxError(f"{self.name} did not start: {said}") from error


def root() -> rootbuild.Root:
    """Return what machines boot from, built when its inputs changed."""
    return rootbuild.build(CACHE / "machine", CACHE / "guest")


def capabilities(root: rootbuild.Root) -> Path:
    """Return where machines keep what libvirt found out about QEMU."""
    return root.disk.with_suffix(".capabilities")
