# SPDX-License-Identifier: Apache-2.0
"""What libvirt freezes, saves and restores of a domain.

libvirt's own snapshots are used without their metadata: that would forbid migration,
and libvirt 9.0 can go back to few of them. Where it needs them to go back to a state
inside of a volume, they are made for the time of that call.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import libvirt
from oslo_log import log as logging

from virtmigrate import domainxml, errors, merging, xml
from virtmigrate.instance import Power
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

_LOOK = 0.2
"""Seconds between two looks at a job."""
_CALL = 24 * 3600.0
"""Seconds that a call may take whose progress is watched beside it."""
_END = 60.0
"""Seconds that a job may take to end after it was told to."""


@dataclass(frozen=True)
class Freeze:
    """What a running domain is asked for."""

    name: str
    layers: Mapping[str, str]
    """By target: paths of the qcow2 files that the guest writes to from then on."""
    held: tuple[str, ...] = ()
    """Targets whose states the caller keeps while the guest is paused afterwards."""
    memory: str | None = None
    """Path of the file that its memory comes to."""


class States(merging.Merges):
    """The states of one host's domains. Safe to share between threads."""

    # From outside of the volumes

    def freeze(
        self, uuid: str, wanted: Freeze, progress: Progress, timeout: float
    ) -> None:
        """Freeze the disks below new layers, all at once, and write the memory.

        The guest runs while its memory is written. With `held` disks it is paused in
        the end, and its disks are flushed. On failure it goes on as before; a file of
        memory may be left.

        Arguments:
            timeout: seconds until the writing of memory is given up.
        """
        flags = (
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        )
        if wanted.memory is None:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        elif self.power(uuid) is Power.RUNNING:
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
        targets = [disk.target for disk in domainxml.disks(self.live_xml(uuid))]
        text = _freeze_xml(wanted, targets)

        def run() -> None:
            with (
                self._once_paused(uuid),
                self._domain(uuid, "freezing it", timeout=_CALL) as domain,
            ):
                domain.snapshotCreateXML(text, flags)

        self._watched(uuid, run, progress, timeout)

    def tops(self, uuid: str) -> dict[str, str]:
        """Return by target what the domain's XML names as the top of each disk.

        Of a running domain what it runs with, else what it would be started with.
        """
        text = self.xml(uuid) if self.is_off(uuid) else self.live_xml(uuid)
        found = domainxml.disks(text)
        return {disk.target: disk.chain[0].source for disk in found if disk.chain}

    def is_off(self, uuid: str) -> bool:
        """Tell whether no QEMU runs for it."""
        return self.power(uuid) in (Power.OFF, Power.SAVED)

    def secure_xml(self, uuid: str) -> str:
        """Return the configuration that it runs with, secrets included."""
        with self._domain(uuid, "reading its live configuration") as domain:
            return str(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))

    def busy(self, uuid: str) -> list[str]:
        """Return the targets of a running domain's disks that a block job works on."""
        found = [disk.target for disk in domainxml.disks(self.live_xml(uuid))]
        with self._domain(uuid, "looking for block jobs") as domain:
            return [each for each in found if domain.blockJobInfo(each, 0)]

    def end_job(self, uuid: str) -> None:
        """Abort what a killed process left running, and wait until it is over.

        Raises InvalidState when it does not end.
        """
        deadline = time.monotonic() + _END
        while self._job(uuid) is not None:
            with contextlib.suppress(errors.LibvirtFailed):
                self._abort(uuid)
            if time.monotonic() > deadline:
                raise errors.InvalidState(
                    instance=uuid,
                    host=self.host.name,
                    state="in a job of libvirt",
                    reason="it does not end: see `virsh domjobinfo`",
                )
            time.sleep(_LOOK)

    def memory_xml(self, path: str) -> str:
        """Return the configuration that a file of memory was written with."""
        flags = libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE
        with self.host.session(f"reading the head of {path}") as session:
            return str(session.conn.saveImageGetXMLDesc(path, flags))

    def has_memory(self, path: str) -> bool:
        """Tell whether a file of memory is there, and was written to its end."""
        try:
            self.memory_xml(path)
        except errors.LibvirtFailed as e:
            missing = (libvirt.VIR_ERR_SYSTEM_ERROR, errno.ENOENT)
            # libvirt writes last into the head that the file is whole.
            partial = e.code == libvirt.VIR_ERR_OPERATION_FAILED
            if not partial and (e.code, e.errno) != missing:
                raise
            return False
        return True

    def restore_with(self, path: str, text: str) -> None:
        """Start a domain from a file of its memory, paused, with another XML."""
        flags = libvirt.VIR_DOMAIN_SAVE_PAUSED
        with self.host.session(f"restoring {path}", timeout=3600) as session:
            session.conn.restoreFlags(path, text, flags)

    # Inside of the volumes

    def keep_inside(
        self, uuid: str, name: str, progress: Progress, timeout: float
    ) -> None:
        """Keep disks, and the memory if it runs, inside of its qcow2 volumes.

        The guest is paused meanwhile. On failure it goes on as before.
        """
        flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        text = xml.write(_named(name))

        def run() -> None:
            with self._domain(uuid, "keeping its state", timeout=_CALL) as domain:
                domain.snapshotCreateXML(text, flags)

        self._watched(uuid, run, progress, timeout)

    def revert_inside(self, uuid: str, described: str, *, paused: bool) -> None:
        """Go back to a state inside of its volumes; the domain need not run.

        Arguments:
            described: see inside_xml().
            paused: how it is to be afterwards, if the state has memory.
        """
        flags = 0
        if "<state>shutoff</state>" not in described:
            running = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING
            flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED if paused else running
            flags |= libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE
        with self._described(uuid, described) as (domain, snapshot):
            domain.revertToSnapshot(snapshot, flags)

    def drop_inside(self, uuid: str, described: str) -> None:
        """Remove a state from inside of its volumes; can be called again."""
        with self._described(uuid, described, "dropping a state") as (_, snapshot):
            snapshot.delete(0)

    def save_to(self, uuid: str, path: str) -> None:
        with self._once_paused(uuid):
            super().save_to(uuid, path)

    # Private

    @contextlib.contextmanager
    def _once_paused(self, uuid: str) -> Iterator[None]:
        """Say plainly what QEMU 7.2 refuses: it keeps its state `postmigrate`."""
        try:
            yield
        except errors.LibvirtFailed as e:
            if "paused due to previous migration" not in str(e):
                raise
            raise self._failed(
                uuid,
                "QEMU writes the memory of a guest once while it is paused: let it "
                "run, or keep the memory inside",
            ) from e

    def _failed(self, uuid: str, reason: str) -> errors.SnapshotFailed:
        return errors.SnapshotFailed(
            doing="snapshot", instance=uuid, host=self.host.name, reason=reason
        )

    def _watched(
        self,
        uuid: str,
        run: Callable[[], None],
        progress: Progress,
        timeout: float,
    ) -> None:
        """Run a job of libvirt in a thread of its own, say how far it is, and end it.

        Raises what run() raises; Cancelled or SnapshotFailed when it was ended for
        that.
        """
        failed: list[BaseException] = []

        def work() -> None:
            try:
                run()
            except BaseException as e:
                failed.append(e)

        thread = threading.Thread(target=work, name=f"job-{uuid}", daemon=True)
        thread.start()
        ended = self._follow(uuid, thread, progress, timeout)
        if ended is not None and failed:
            raise ended from failed[0]
        if failed:
            raise failed[0]

    def _follow(
        self,
        uuid: str,
        thread: threading.Thread,
        progress: Progress,
        timeout: float,
    ) -> Exception | None:
        """Wait for a job; return why it was ended, None if it was not."""
        deadline, done = time.monotonic() + timeout, 0
        ended: Exception | None = None
        while thread.is_alive():
            thread.join(_LOOK)
            try:
                found, total = self._job(uuid) or (0, 0)
                if total and not done:
                    progress.phase("writing memory", total)
                progress.advance(max(0, found - done))
                done = max(done, found)
            except errors.Cancelled as e:
                ended = ended or e
            except errors.Error as e:
                # libvirt keeps a look waiting for 30 s while it begins or ends a job.
                LOG.debug("instance=%s its job cannot be looked at: %s", uuid, e)
            if time.monotonic() > deadline and ended is None:
                ended = self._failed(uuid, f"it took longer than {timeout:g} s")
            if ended is not None:
                with contextlib.suppress(errors.LibvirtFailed):
                    self._abort(uuid)
        return ended

    def _job(self, uuid: str) -> tuple[int, int] | None:
        """Return the bytes that a job has through, and all; None when there is none.

        What the guest writes to meanwhile is not through any more.
        """
        with self._domain(uuid, "looking at its job") as domain:
            if not domain.isActive():
                return None
            found = domain.jobStats(0)
        if found.get("type", 0) == libvirt.VIR_DOMAIN_JOB_NONE:
            return None
        total = int(found.get("data_total", 0))
        return max(0, total - int(found.get("data_remaining", 0))), total

    def _abort(self, uuid: str) -> None:
        with self._domain(uuid, "ending its job") as domain:
            domain.abortJob()

    @contextlib.contextmanager
    def _described(
        self, uuid: str, described: str, doing: str = "going back"
    ) -> Iterator[tuple["libvirt.virDomain", "libvirt.virDomainSnapshot"]]:
        """Have libvirt know a state for the time of a call."""
        redefine = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE
        only = libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY
        with self._domain(uuid, doing, timeout=3600) as domain:
            snapshot = domain.snapshotCreateXML(described, redefine)
            try:
                yield domain, snapshot
            finally:
                # What a killed process left goes in the same way: it is redefined.
                with contextlib.suppress(libvirt.libvirtError):
                    snapshot.delete(only)


def inside_xml(name: str, created: float, taken: str, domain: str, memory: bool) -> str:
    """Return libvirt's description of a state inside of a domain's volumes.

    Arguments:
        taken: running, paused or off.
        domain: its whole XML at the time, with the chains that it has now.
    """
    root = _named(name)
    state = "shutoff" if taken == "off" else taken
    xml.add(root, "state", state)
    xml.add(root, "creationTime", str(int(created)))
    xml.add(root, "memory", snapshot="internal" if memory else "no")
    disks = xml.add(root, "disks")
    for disk in domainxml.disks(domain):
        inside = disk.chain and not disk.readonly and disk.device == "disk"
        kept = "internal" if inside else "no"
        xml.add(disks, "disk", name=disk.target, snapshot=kept)
    xml.append(root, xml.parse(domain))
    return xml.write(root)


# Private


def _named(name: str) -> xml.Element:
    root = xml.element("domainsnapshot")
    xml.add(root, "name", name)
    return root


def _freeze_xml(wanted: Freeze, targets: Sequence[str]) -> str:
    root = _named(wanted.name)
    if wanted.memory is None:
        xml.add(root, "memory", snapshot="no")
    else:
        xml.add(root, "memory", snapshot="external", file=wanted.memory)
    disks = xml.add(root, "disks")
    for target in targets:
        disk = xml.add(disks, "disk", name=target)
        if target in wanted.layers:
            disk.set("snapshot", "external")
            disk.set("type", "file")
            xml.add(disk, "driver", type="qcow2")
            xml.add(disk, "source", file=wanted.layers[target])
        else:
            disk.set("snapshot", "manual" if target in wanted.held else "no")
    return xml.write(root)
