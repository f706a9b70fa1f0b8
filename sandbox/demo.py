# SPDX-License-Identifier: Apache-2.0
"""The demo: a real guest moves between two libvirt hosts, and goes on where it was.

Two libvirt hosts in namespaces of this machine, TLS between them; the guest counts
once a second, on its console and on its disk. What is said here is looked up
outside of virtmigrate: the guest's own counter, SHA-256 of the files, the
kernel's trace of every program that was started.
"""

import hashlib
import os
import sys
import tempfile
import time
import types
import uuid
from collections.abc import Callable
from pathlib import Path

from oslo_config import cfg

from sandbox import Host, Sandbox, guest, watch
from virtmigrate import conf as options
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.progress import Progress, Report
from virtmigrate.units import MiB, format_bytes

FORBIDDEN = {"ssh", "scp", "rsync", "sshd", "sftp-server"}
WAIT = 60.0
"""Seconds for a guest to boot, under software emulation, on a busy machine."""


def main() -> int:
    """Run the demo; 0 when everything that it claims was seen."""
    box = Sandbox.attach()
    alpha, beta = box.add_hosts(["alpha", "beta"])
    with tempfile.TemporaryDirectory(prefix="virtmigrate-demo-") as state:
        demo = Demo(alpha, beta, Path(state))
        pids = (os.getpid(), alpha.libvirtd_pid, beta.libvirtd_pid)
        with watch.programs(pids) as started:
            demo.run()
    say("programs started", ", ".join(sorted(started.names)) or "none")
    demo.expect("ssh, scp and rsync processes: 0", not started.names & FORBIDDEN)
    print("\nThe guest moved." if not demo.failed else "\nFAILED.")
    return 1 if demo.failed else 0


class Demo:
    """One guest, moved from alpha to beta."""

    def __init__(self, alpha: Host, beta: Host, state: Path) -> None:
        self.failed: list[str] = []
        self._alpha, self._beta = alpha, beta
        self._progress = Progress(self._show)
        self._stopped = 0.0
        self._source = self._driver(alpha, state / "alpha")
        self._peer = self._driver(beta, state / "beta")
        self._instance = types.SimpleNamespace(
            uuid=str(uuid.uuid4()),
            name="counter",
            flavor=types.SimpleNamespace(
                memory_mb=128, vcpus=1, root_gb=1, ephemeral_gb=0
            ),
        )

    def run(self) -> None:
        before = self._boot()
        ticket = self._move()
        after = self._resume(ticket)
        self._check_counter(before, after)
        self._source.confirm_migration(None, None, self._instance, None)
        left = list((self._alpha.storage / "vm/disks").iterdir())
        self.expect("confirmed: the source keeps nothing", not left)
        self._peer.destroy(None, self._instance)

    def expect(self, claim: str, seen: bool) -> None:
        """Print a claim, and whether it was seen to hold."""
        print(f"  {'ok' if seen else 'NO'}  {claim}")
        if not seen:
            self.failed.append(claim)

    # Private

    def _boot(self) -> int:
        image = {"path": str(guest.image().path), "disk_format": "raw"}
        self._source.spawn(None, self._instance, image)
        console = self._console(self._alpha)
        wait_for(lambda: len(guest.beats(console)) >= 4)
        say("running on alpha", f"beat {guest.beats(console)[-1].number}")
        return guest.beats(console)[-1].number

    def _move(self) -> str:
        disk = self._disk(self._alpha, "disks")
        began = time.monotonic()
        ticket = self._source.migrate_disk_and_power_off(
            None, self._instance, "beta", None, timeout=20, retry_interval=5
        )
        seconds = time.monotonic() - began
        print()
        copy = self._disk(self._beta, "incoming")
        self.expect(
            f"verified in full: {format_bytes(disk.stat().st_size)}, digests equal",
            sha256(disk) == sha256(copy),
        )
        sent = self._progress.sent
        say("bytes sent", f"{sent} ({format_bytes(sent)})")
        say("rate", f"{format_bytes(sent / seconds)}/s, verification included")
        return ticket

    def _resume(self, ticket: str) -> int:
        self._peer.finish_migration(None, None, self._instance, ticket, None)
        console = self._console(self._beta)
        wait_for(lambda: bool(guest.beats(console)))
        say("downtime", f"{time.monotonic() - self._stopped:.1f} s, boot included")
        wait_for(lambda: len(guest.beats(console)) >= 3)
        say("running on beta", f"beat {guest.beats(console)[-1].number}")
        return guest.beats(console)[0].number

    def _check_counter(self, before: int, after: int) -> None:
        last = guest.beats(self._console(self._alpha))[-1].number
        self.expect(f"beat {last} on alpha, then {after} on beta", after == last + 1)
        self._peer.power_off(self._instance, 20, 5)
        log = guest.verify(self._disk(self._beta, "disks"))
        self.expect(
            f"on its disk: 1 to {log.last} unbroken over {log.boots} boots",
            not log.problems and log.first == 1 and log.boots == 2,
        )

    def _driver(self, host: Host, state: Path) -> VirtMigrateDriver:
        conf = cfg.ConfigOpts()
        conf(args=[], default_config_files=[])
        options.register(conf)
        for name, value in (
            ("uri", host.local_uri),
            ("address", host.name),
            ("virt_type", "qemu"),
            ("state_path", str(state)),
            ("peer_uri", host.uri.replace(host.name, "{dest}", 1)),
        ):
            conf.set_override(name, value, options.GROUP)
        conf.set_override("path", str(host.storage / "vm"), "local")
        driver = VirtMigrateDriver(conf=conf, progress=lambda: self._progress)
        driver.init_host(host.name)
        return driver

    def _console(self, host: Host) -> Path:
        return host.logs / f"qemu/virtmigrate-{self._instance.uuid}.log"

    def _disk(self, host: Host, area: str) -> Path:
        (found,) = (host.storage / "vm" / area).glob("vda.*")
        return found

    def _show(self, report: Report) -> None:
        if report.phase == "stopping":
            self._stopped = time.monotonic()
        line = f"  {report.phase}"
        if report.total:
            line += f": {report.done / MiB:.0f} of {report.total / MiB:.0f} MiB"
        if report.left:
            line += f", {format_bytes(report.rate)}/s, {report.left:.0f} s left"
        if sys.stdout.isatty():
            print(f"\r{line:<72}", end="", flush=True)
        else:
            print(line, flush=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wait_for(happened: Callable[[], bool]) -> None:
    """Wait until it happened; TimeoutError after WAIT seconds."""
    deadline = time.monotonic() + WAIT
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {WAIT:g} s")
        time.sleep(0.05)


def say(what: str, value: str) -> None:
    print(f"  {what}: {value}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
