# SPDX-License-Identifier: Apache-2.0
"""What a live migration asks of a domain, on either host."""

import enum

import libvirt

from virtmigrate import domainstate, errors
from virtmigrate.instance import Power
from virtmigrate.livemigration.terms import Status


class Copy(enum.Enum):
    """What a host has of a guest."""

    NONE = "none"
    """No QEMU runs for it."""
    PARTIAL = "partial"
    """Memory is coming in; libvirt has not said that it is whole."""
    WHOLE = "whole"
    """It can run, and perhaps does."""


_BY_ITSELF = (
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
)


class Domains(domainstate.States):
    """The domains of one host, on their way. Safe to share between threads."""

    def migratable_xml(self, uuid: str) -> str:
        """Return the running configuration as another host can take it, secrets too."""
        flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
        with self._domain(uuid, "reading its live configuration") as domain:
            return str(domain.XMLDesc(flags))

    def copy(self, uuid: str) -> Copy:
        """Return what this host has of a guest.

        libvirt makes the domain of a guest that came persistent in its last step.
        """
        try:
            with self._domain(uuid, "looking what there is of it") as domain:
                if not domain.isActive():
                    return Copy.NONE
                return Copy.WHOLE if domain.isPersistent() else Copy.PARTIAL
        except errors.InstanceNotFound:
            return Copy.NONE

    def ended_by_itself(self, uuid: str) -> bool:
        """Tell whether a guest is off by its own, or a user's, doing."""
        try:
            with self._domain(uuid, "asking why it is off") as domain:
                state, reason = domain.state()
                return state == libvirt.VIR_DOMAIN_SHUTOFF and reason in _BY_ITSELF
        except errors.InstanceNotFound:
            return False

    def status(self, uuid: str) -> tuple[Status, bool]:
        """Return how far its migration is, and whether its guest stands still."""
        with self._domain(uuid, "looking at its migration") as domain:
            found = domain.jobStats(0) if domain.isActive() else {}
            state = domain.state()[0] if found else libvirt.VIR_DOMAIN_SHUTOFF
        page = int(found.get("memory_page_size", 4096))
        disk = int(found.get("disk_bps", 0))
        status = Status(
            total=int(found.get("data_total", 0)),
            remaining=int(found.get("data_remaining", 0)),
            processed=int(found.get("data_processed", 0)),
            rate=float(int(found.get("memory_bps", 0)) + disk),
            dirty_rate=float(int(found.get("memory_dirty_rate", 0)) * page),
            iteration=int(found.get("memory_iteration", 0)),
            allowed=int(found.get("downtime", 0)) / 1000,
        )
        return status, state == libvirt.VIR_DOMAIN_PAUSED

    def measured(self, uuid: str) -> tuple[float, int]:
        """Return the seconds that a guest which came stood still, and the bytes."""
        flag = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED
        with self._domain(uuid, "asking how it came") as domain:
            found = domain.jobStats(flag)
        return int(found.get("downtime", 0)) / 1000, int(found.get("data_processed", 0))

    def allow_downtime(self, uuid: str, seconds: float) -> None:
        """Let a migration stop the guest for so long."""
        with self._domain(uuid, "allowing more downtime") as domain:
            domain.migrateSetMaxDowntime(max(1, int(seconds * 1000)), 0)

    def abort(self, uuid: str) -> None:
        """End its migration; its guest goes on here."""
        self._abort(uuid)

    def go_on(self, uuid: str) -> None:
        """Let its CPUs go on, if they stand still; nothing happens otherwise."""
        if self.power(uuid) is Power.PAUSED:
            self.unpause(uuid)
