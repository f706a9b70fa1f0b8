# SPDX-License-Identifier: Apache-2.0
"""Where it is measured: two hosts on tmpfs, and the daemons of the other tools.

The source's side of each tool runs in the sandbox's client namespace, which sees
alpha's storage; the peer's side runs on beta. So all bytes cross beta's eth0.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import errors
from sandbox import Host, Sandbox, process
from virtmigrate.units import GiB, MiB

TMPFS = 16 * GiB
"""Bytes that each host's storage may take; it takes what is written."""
NBD_PORT = 10809
START_TIMEOUT = 15.0
SLOW_SIZE = 640 * MiB


@dataclass(frozen=True)
class Pool:
    """A directory of one host, which its libvirtd serves as a pool."""

    host: Host
    name: str
    path: Path

    def file(self, name: str) -> Path:
        return self.path / name

    def serve(self) -> None:
        """Make it a pool, unless it is one, and let libvirtd see its files."""
        self.path.mkdir(exist_ok=True)
        make = ["pool-create-as", self.name, "dir", "--target", str(self.path)]
        process.run(self.virsh(*make), check=False)
        process.run(self.virsh("pool-refresh", self.name))

    def virsh(self, *argv: str, local: bool = True) -> list[str]:
        """Return a command of virsh for this host, by socket or over TLS."""
        return [
            "virsh",
            "-q",
            "-c",
            self.host.local_uri if local else self.host.uri,
            *argv,
        ]


@dataclass(frozen=True)
class Place:
    """Two hosts, with a pool each, and what the tools need to reach the peer."""

    alpha: Host
    beta: Host
    directory: Path
    """For keys and pid files; gone with the place."""
    source: Pool
    target: Pool
    slow: Pool
    """At the peer as well; there only inside slow_disk()."""
    pki: Path
    """The client's certificates, as libvirt names them."""
    tls: Path
    """The same ones, as libnbd and QEMU name them."""
    ssh: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ssh", self.directory / "ssh_config")

    # Services of the peer

    def fresh_libvirtd(self) -> None:
        """Restart the peer's libvirtd: memory that a run left it hides a growth."""
        self.beta.stop_libvirtd()
        self.beta.start_libvirtd()

    @contextlib.contextmanager
    def sshd(self) -> Iterator[None]:
        """An sshd of the peer that lets this run's key in, and nobody else."""
        self.beta.run(["mkdir", "-p", "/run/sshd"])
        config = self._file("sshd_config")
        argv = ["/usr/sbin/sshd", "-D", "-f", str(config), "-E", f"{config}.log"]
        with self._daemon(argv, self._file("sshd.pid")):
            yield

    @contextlib.contextmanager
    def qemu_nbd(self, path: Path, number: int) -> Iterator[str]:
        """Export a file of the peer over TLS, and yield the URI."""
        port, pid_file = NBD_PORT + number, self._file(f"nbd-{number}.pid")
        creds = "tls-creds-x509,id=tls0,endpoint=server,dir=/etc/pki/qemu"
        argv = ["qemu-nbd", "--object", f"{creds},verify-peer=yes", "--tls-creds"]
        argv += ["tls0", "--export-name", "disk", "--format", "raw", "--persistent"]
        argv += ["--shared", "4", "--bind", self.beta.address, "--port", str(port)]
        argv += ["--pid-file", str(pid_file), str(path)]
        with self._daemon(argv, pid_file):
            yield f"nbds://{self.beta.name}:{port}/disk?tls-certificates={self.tls}"

    @contextlib.contextmanager
    def slow_disk(self) -> Iterator[None]:
        """Mount a disk at the peer where each write waits: ext4, synchronous.

        Its image is a file on this machine's own disk: a quarter of the wire's speed
        where that was measured (120 MB/s).
        """
        image = self.beta.directory / "slow.img"
        with image.open("wb") as file:
            file.truncate(SLOW_SIZE)
        process.run(["mkfs.ext4", "-q", "-F", image])
        self.slow.path.mkdir(exist_ok=True)
        options = "loop,sync,data=journal"
        process.run(["mount", "-o", options, image, self.slow.path])
        try:
            yield
        finally:
            process.run(self.slow.virsh("pool-destroy", self.slow.name), check=False)
            process.run(["umount", self.slow.path])
            image.unlink()

    # Private

    @contextlib.contextmanager
    def _daemon(self, argv: Sequence[str], pid_file: Path) -> Iterator[None]:
        """Run a daemon that writes its pid file when it listens."""
        pid_file.unlink(missing_ok=True)

        def listens() -> bool:
            return pid_file.exists() and bool(pid_file.read_text().strip())

        with service(self.beta, argv, pid_file.with_suffix(".log"), listens):
            yield

    def _file(self, name: str) -> Path:
        return self.directory / name


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """Two hosts of the sandbox that this process runs in, on tmpfs."""
    box = Sandbox.attach()
    alpha, beta = box.add_hosts(["alpha", "beta"])
    with contextlib.ExitStack() as stack:
        for host in (alpha, beta):
            stack.callback(box.remove_host, host.name)
            host.mount_storage(TMPFS)
        directory = beta.storage / "benchmark"
        directory.mkdir(mode=0o700)
        made = Place(
            alpha,
            beta,
            directory,
            source=Pool(alpha, "bench", alpha.storage / "bench"),
            target=Pool(beta, "bench", beta.storage / "bench"),
            slow=Pool(beta, "bench-slow", beta.storage / "bench-slow"),
            pki=box.pki,
            tls=directory / "tls",
        )
        _write_tls(made)
        _write_ssh(made)
        made.source.serve()
        made.target.serve()
        yield made


@contextlib.contextmanager
def service(
    host: Host, argv: Sequence[str], log: Path, listens: Callable[[], bool]
) -> Iterator[None]:
    """Run a daemon on a host, from when it listens."""
    enter = ["nsenter", "--target", str(host.pid), "--mount", "--net", "--uts", "--pid"]
    # If this process is killed, nsenter ends, and with it the daemon.
    dying = ["setpriv", "--pdeathsig", "KILL"]
    with log.open("w") as output:
        child = subprocess.Popen(
            [*dying, *enter, *dying, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": process.search_path()},
        )
    try:
        _wait_listening(child, log, listens)
        yield
    finally:
        # The daemon first: it keeps its port until its last thread has ended.
        process.end(process.Record.of(pid) for pid in _children(child.pid))
        child.kill()
        child.wait()


def _children(parent: int) -> list[int]:
    return [pid for pid in process.all_pids() if process.parent_of(pid) == parent]


def _wait_listening(
    child: subprocess.Popen[bytes], log: Path, listens: Callable[[], bool]
) -> None:
    def settled() -> bool:
        return child.poll() is not None or listens()

    process.wait_until(settled, START_TIMEOUT, f"the daemon of {log.name}")
    if child.poll() is not None:
        raise errors.BenchmarkError(
            f"{log.stem} ended with status {child.returncode}: {log.read_text()}"
        )


def _write_tls(place: Place) -> None:
    """Give the client's certificates the names that libnbd looks for."""
    place.tls.mkdir()
    for theirs, ours in (
        ("ca-cert.pem", "cacert.pem"),
        ("client-cert.pem", "clientcert.pem"),
        ("client-key.pem", "clientkey.pem"),
    ):
        shutil.copy(place.pki / ours, place.tls / theirs)


def _write_ssh(place: Place) -> None:
    """Make keys, and configurations that read nothing of this machine's users."""
    directory = place.directory
    for name in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
        process.run([*keygen, directory / name])
    host_key = (directory / "host_key.pub").read_text()
    known = directory / "known_hosts"
    known.write_text(f"{place.beta.name} {host_key}")
    (directory / "sshd_config").write_text(
        f"ListenAddress {place.beta.address}\n"
        f"HostKey {directory}/host_key\n"
        f"AuthorizedKeysFile {directory}/user_key.pub\n"
        f"PidFile {directory}/sshd.pid\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
        "PasswordAuthentication no\nLogLevel ERROR\n"
        "Subsystem sftp /usr/lib/openssh/sftp-server\n"
    )
    place.ssh.write_text(
        f"IdentityFile {directory}/user_key\nIdentitiesOnly yes\nUser root\n"
        f"UserKnownHostsFile {known}\nGlobalKnownHostsFile none\n"
        "StrictHostKeyChecking yes\nBatchMode yes\nLogLevel ERROR\n"
    )
