# SPDX-License-Identifier: Apache-2.0
"""Domains of a host: define, start, stop, look. What libvirt sees of an instance."""

import contextlib
import enum
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import libvirt
from oslo_log import log as logging

from virtmigrate import domainxml, errors, translation
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)


class Power(enum.Enum):
    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"
    SAVED = "saved"
    """Off, with its memory in libvirt's managed save."""
    CRASHED = "crashed"


STAND_IN = "virtmigrate-merge-"
"""How the names begin of domains without a guest, which work on a guest's layers."""

_POWER = {
    libvirt.VIR_DOMAIN_RUNNING: Power.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: Power.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: Power.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: Power.RUNNING,
    libvirt.VIR_DOMAIN_PMSUSPENDED: Power.RUNNING,
    libvirt.VIR_DOMAIN_CRASHED: Power.CRASHED,
}


@dataclass(frozen=True)
class Info:
    """What libvirt says of a domain now."""

    power: Power
    id: int
    """libvirt's number of the running domain, -1 when it is off."""
    max_memory: int
    """Bytes."""
    memory: int
    vcpus: int
    cpu_time: float
    """Seconds."""


class Domains:
    """The domains of one host, by UUID. Safe to share between threads."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def all(self) -> list[tuple[str, str]]:
        """Return (uuid, name) of every domain; those that only stand in are none."""
        with self.host.session("listing domains") as session:
            domains = session.conn.listAllDomains(0)
            found = [(domain.UUIDString(), domain.name()) for domain in domains]
        return [each for each in found if not each[1].startswith(STAND_IN)]

    def exists(self, uuid: str) -> bool:
        """Tell whether a domain of this UUID is defined or running."""
        try:
            with self._domain(uuid, "looking for it"):
                return True
        except errors.InstanceNotFound:
            return False

    def is_defined(self, uuid: str) -> bool:
        """Tell whether it has a configuration that outlives its running."""
        try:
            with self._domain(uuid, "looking for it") as domain:
                return bool(domain.isPersistent())
        except errors.InstanceNotFound:
            return False

    def info(self, uuid: str) -> Info:
        """Return power, memory, CPUs; InstanceNotFound."""
        with self._domain(uuid, "asking for its state") as domain:
            state, max_memory, memory, vcpus, cpu_time = domain.info()
            return Info(
                power=_power(domain, state),
                id=domain.ID(),
                max_memory=max_memory * 1024,
                memory=memory * 1024,
                vcpus=vcpus,
                cpu_time=cpu_time / 1e9,
            )

    def power(self, uuid: str) -> Power:
        """Return what it is doing; InstanceNotFound."""
        with self._domain(uuid, "asking for its state") as domain:
            return _power(domain, domain.state()[0])

    def xml(self, uuid: str) -> str:
        """Return the configuration that the next start uses, secrets included."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        with self._domain(uuid, "reading its configuration") as domain:
            return domainxml.unguarded(str(domain.XMLDesc(flags)))

    def live_xml(self, uuid: str) -> str:
        """Return the configuration that it runs with, secrets left out."""
        with self._domain(uuid, "reading its live configuration") as domain:
            return str(domain.XMLDesc(0))

    def burdens(self, uuid: str) -> list[str]:
        """Return what hangs on the domain outside its XML and keeps it here."""
        with self._domain(uuid, "looking for snapshots") as domain:
            counts = {
                "snapshots known to libvirt": domain.snapshotNum(0),
                "checkpoints": len(domain.listAllCheckpoints(0)),
                "a managed save image": domain.hasManagedSaveImage(0),
            }
            found = [what for what, count in counts.items() if count]
            if not domain.isPersistent():
                found.append("no persistent configuration")
            return found

    def autostart(self, uuid: str) -> bool:
        """Tell whether libvirt starts it with the host."""
        with self._domain(uuid, "asking for autostart") as domain:
            return bool(domain.autostart())

    def forbid_autostart(self, uuid: str) -> None:
        """Have libvirt not start it with the host."""
        with self._domain(uuid, "switching autostart off") as domain:
            if domain.autostart():
                domain.setAutostart(0)
                LOG.info("instance=%s libvirt does not start it any more", uuid)

    def allow_autostart(self, uuid: str) -> None:
        """Have libvirt start it with the host."""
        with self._domain(uuid, "switching autostart on") as domain:
            if not domain.autostart():
                domain.setAutostart(1)

    def define(self, xml: str, *, autostart: bool = False) -> None:
        """Define the domain, or replace its configuration."""
        with self.host.session("defining a domain") as session:
            domain = session.conn.defineXML(domainxml.guarded(xml))
            if autostart:
                domain.setAutostart(1)

    def undefine(self, uuid: str, *, saved: bool = False) -> None:
        """Remove the configuration, keep NVRAM; nothing happens when it is gone.

        Arguments:
            saved: and the memory of a suspended guest. Without it libvirt refuses that.
        """
        flags = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
        if saved:
            flags |= libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        with (
            contextlib.suppress(errors.InstanceNotFound),
            self._domain(uuid, "undefining it") as domain,
        ):
            domain.undefineFlags(flags)

    def start(self, uuid: str, *, paused: bool = False) -> None:
        """Start it; nothing happens when it runs."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        with self._domain(uuid, "starting it") as domain:
            if not domain.isActive():
                domain.createWithFlags(flags)

    def start_with(self, xml: str, *, paused: bool = False) -> None:
        """Start it by another configuration, this once; nothing happens when it runs.

        The next start is by its own one, whatever ended it.
        """
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        with self._domain(domainxml.uuid(xml), "starting it") as domain:
            if not domain.isActive():
                domain.connect().createXML(xml, flags)

    def disk_errors(self, uuid: str) -> dict[str, str]:
        """Return by target which disks of a started domain had an error, and what."""
        with self._domain(uuid, "looking for errors of its disks") as domain:
            found = domain.diskErrors(0) if domain.isActive() else {}
            return {disk: _DISK_ERRORS.get(e, "?") for disk, e in found.items()}

    def kill(self, uuid: str) -> None:
        """Turn it off at once; nothing happens when it is off or gone."""
        with (
            contextlib.suppress(errors.InstanceNotFound),
            self._domain(uuid, "turning it off") as domain,
        ):
            try:
                domain.destroy()
            except libvirt.libvirtError as e:
                if translation.code(e) != libvirt.VIR_ERR_OPERATION_INVALID:
                    raise

    def stop(self, uuid: str, timeout: float, retry_interval: float) -> bool:
        """Ask the guest to shut down, repeatedly, then turn it off.

        Returns True when it went by itself. A paused guest cannot hear: it is
        turned off.
        """
        deadline = time.monotonic() + timeout
        asked = float("-inf")
        while self.power(uuid) is Power.RUNNING and time.monotonic() < deadline:
            if time.monotonic() - asked >= retry_interval:
                asked = time.monotonic()
                self._ask_to_shut_down(uuid)
            time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
        clean = self.power(uuid) in (Power.OFF, Power.SAVED)
        if not clean:
            LOG.info("instance=%s turned off: no clean shutdown", uuid)
            self.kill(uuid)
        return clean

    def pause(self, uuid: str) -> None:
        """Stop its CPUs; nothing happens when it is paused."""
        with self._domain(uuid, "pausing it") as domain:
            if domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                domain.suspend()

    def unpause(self, uuid: str) -> None:
        """Let its CPUs go on."""
        with self._domain(uuid, "resuming it") as domain:
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()

    def save(self, uuid: str) -> None:
        """Write its memory to libvirt's managed save and turn it off."""
        with self._domain(uuid, "saving it", timeout=3600) as domain:
            if domain.isActive():
                domain.managedSave(0)

    def reset(self, uuid: str) -> None:
        """Press the reset button."""
        with self._domain(uuid, "resetting it") as domain:
            domain.reset(0)

    def resize_disk(self, uuid: str, target: str, size: int) -> None:
        """Tell a started domain's disk its new size, by the format its XML names."""
        with self._domain(uuid, f"growing {target}") as domain:
            domain.blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

    def save_to(self, uuid: str, path: str) -> None:
        """Write its memory to a file of the host and turn it off, to resume paused."""
        flags = libvirt.VIR_DOMAIN_SAVE_PAUSED
        with self._domain(uuid, f"saving it to {path}", timeout=3600) as domain:
            domain.saveFlags(path, None, flags)

    def restore_from(self, path: str) -> None:
        """Start a domain from a file of its memory, paused."""
        flags = libvirt.VIR_DOMAIN_SAVE_PAUSED
        with self.host.session(f"restoring {path}", timeout=3600) as session:
            session.conn.restoreFlags(path, None, flags)

    def has_top(self, uuid: str, target: str, source: str) -> bool:
        """Tell whether a disk's top layer is this one, for the guest that runs or the
        next start."""
        with self._domain(uuid, f"looking at {target}") as domain:
            return _top(domain, target) == source

    def commit_layer(self, uuid: str, target: str) -> bool:
        """Copy the top layer of a started guest's disk into the one below it.

        What the guest writes follows, until pivot(). Returns whether both hold the
        same now. False: QEMU is still at it; call again.
        """
        with self._domain(uuid, f"merging the layer of {target}") as domain:
            if not domain.blockJobInfo(target, 0):
                flags = (
                    libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
                    | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
                )
                domain.blockCommit(target, None, None, 0, flags)
        return _awaited(lambda: self._is_copied(uuid, target))

    def pivot(self, uuid: str, target: str, below: str) -> bool:
        """End a copy of commit_layer() that is complete.

        Returns whether the lower layer is the top now. False: call again.
        """
        return _awaited(lambda: self._pivoted(uuid, target, below))

    # Private

    def _is_copied(self, uuid: str, target: str) -> bool:
        with self._domain(uuid, f"merging the layer of {target}") as domain:
            return _is_ready(domain, target)

    def _pivoted(self, uuid: str, target: str, below: str) -> bool:
        with self._domain(uuid, f"merging the layer of {target}") as domain:
            if _is_ready(domain, target):
                with contextlib.suppress(libvirt.libvirtError):
                    domain.blockJobAbort(target, _PIVOT)
            job = domain.blockJobInfo(target, 0)
            return not job and _top(domain, target) == below

    @contextlib.contextmanager
    def _domain(
        self, uuid: str, doing: str, timeout: float | None = None
    ) -> Iterator["libvirt.virDomain"]:
        doing = f"instance {uuid}: {doing}"
        with self.host.session(doing, timeout=timeout, instance=uuid) as session:
            yield session.conn.lookupByUUIDString(uuid)

    def _ask_to_shut_down(self, uuid: str) -> None:
        with self._domain(uuid, "shutting it down") as domain:
            try:
                domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            except libvirt.libvirtError as e:
                # It went down between our look and our wish.
                if translation.code(e) != libvirt.VIR_ERR_OPERATION_INVALID:
                    raise


_DISK_ERRORS = {
    libvirt.VIR_DOMAIN_DISK_ERROR_UNSPEC: "I/O error",
    libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE: "no space",
}
_COMMIT_TIMEOUT = 20.0
"""Seconds to wait for a merge, holding the instance, before looking again later."""
_PIVOT = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT


def _awaited(is_done: Callable[[], bool]) -> bool:
    """Wait for what a merge does; False when it takes too long."""
    deadline = time.monotonic() + _COMMIT_TIMEOUT
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_ready(domain: "libvirt.virDomain", target: str) -> bool:
    job = domain.blockJobInfo(target, 0)
    return bool(job) and job["cur"] == job["end"] and job["end"] > 0


def _top(domain: "libvirt.virDomain", target: str) -> str | None:
    """Return what a running domain's XML names as the top layer of a disk."""
    for disk in domainxml.disks(domain.XMLDesc(0)):
        if disk.target == target and disk.chain:
            return disk.chain[0].source
    return None


def _power(domain: "libvirt.virDomain", state: int) -> Power:
    if state == libvirt.VIR_DOMAIN_SHUTOFF:
        return Power.SAVED if domain.hasManagedSaveImage(0) else Power.OFF
    return _POWER.get(state, Power.OFF)
