# SPDX-License-Identifier: Apache-2.0
"""libvirt's migration, run in a thread of its own and steered from beside.

A call of libvirt's that waits for a host that went away never returns by itself. So
its connections are cut from outside when an abort is not answered, or when the guest
stands still for longer than a host may take to answer. What came of it is looked at
afterwards by whoever called.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import libvirt
from oslo_log import log as logging

from virtmigrate import connection, errors
from virtmigrate.host import Host
from virtmigrate.livemigration.domains import Domains
from virtmigrate.livemigration.pace import Pace, Step
from virtmigrate.livemigration.terms import Status
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

_LOOK = 0.25
"""Seconds between two looks."""
_CALL = 8 * 86400.0
"""Seconds that libvirt's call may take; steering ends it long before."""
_ABORT = 15.0
"""Seconds that libvirt may take to end a migration that was aborted."""

_FLAGS = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PAUSED
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
)


@dataclass(frozen=True)
class Journey:
    """What libvirt is asked for."""

    uuid: str
    uri: str
    """Where the peer's QEMU listens: tcp://NAME."""
    xml: str
    """As it runs at the peer."""
    persistent_xml: str
    """As it is started there the next time."""
    disks: tuple[str, ...] = ()
    """Targets of the disks that are sent; the others are seen by both hosts."""
    tls_name: str | None = None
    """Name that the peer's certificate has to have; None: no TLS."""
    bandwidth: int = 0
    """Bytes per second; 0: no limit."""
    parallel: int = 0
    auto_converge: bool = False


class Steering:
    """One migration. run() belongs to one thread.

    Arguments:
        watch: called with each look at it.
    """

    def __init__(
        self,
        here: Host,
        there: Host,
        journey: Journey,
        pace: Pace,
        progress: Progress,
        watch: Callable[[Status], object] = lambda _: None,
    ) -> None:
        self._domains = Domains(here)
        self._here = here
        self._there = there
        self._journey = journey
        self._pace = pace
        self._progress = progress
        self._watch = watch
        self._opened: list[connection.Connection] = []
        self._failed: list[BaseException] = []
        self._ended: Exception | None = None
        self._ended_at = 0.0
        self._still_since: float | None = None
        self._done = 0

    def run(self) -> None:
        """Migrate it: whole and paused at the peer, gone and undefined here.

        Raises what ended it (Cancelled, MigrationError), or what libvirt said; what
        either host has of the guest is for the caller to look at. It may have come
        through in spite of a wish to cancel: then nothing is raised.
        """
        thread = threading.Thread(
            target=self._migrate, name=f"live-{self._journey.uuid}", daemon=True
        )
        thread.start()
        thread.join(_LOOK)
        while thread.is_alive():
            self._steer()
            thread.join(_LOOK)
        if self._failed:
            raise self._ended or self._failed[0]

    # Private: libvirt's call

    def _migrate(self) -> None:
        try:
            with (
                self._there.session("taking a guest", timeout=_CALL) as theirs,
                self._here.session(
                    "migrating it", timeout=_CALL, instance=self._journey.uuid
                ) as ours,
            ):
                # In the order in which they are cut.
                self._opened = [theirs.opened, ours.opened]
                domain = ours.conn.lookupByUUIDString(self._journey.uuid)
                domain.migrate3(theirs.conn, self._parameters(), self._flags())
        except BaseException as e:
            self._failed.append(e)

    def _flags(self) -> int:
        journey, flags = self._journey, _FLAGS
        # libvirt cannot tell that two directories are one; we have proven it, and
        # planning demands cache modes by which that is safe.
        flags |= libvirt.VIR_MIGRATE_UNSAFE
        if journey.disks:
            flags |= libvirt.VIR_MIGRATE_NON_SHARED_DISK
        if journey.tls_name:
            flags |= libvirt.VIR_MIGRATE_TLS
        if journey.parallel:
            flags |= libvirt.VIR_MIGRATE_PARALLEL
        if journey.auto_converge:
            flags |= libvirt.VIR_MIGRATE_AUTO_CONVERGE
        return int(flags)

    def _parameters(self) -> dict[str, object]:
        journey = self._journey
        found: dict[str, object] = {
            libvirt.VIR_MIGRATE_PARAM_URI: journey.uri,
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: journey.xml,
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: journey.persistent_xml,
        }
        if journey.disks:
            found[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = list(journey.disks)
        if journey.tls_name:
            found[libvirt.VIR_MIGRATE_PARAM_TLS_DESTINATION] = journey.tls_name
        if journey.bandwidth:
            mib = max(1, journey.bandwidth // 2**20)
            found[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = mib
        if journey.parallel:
            found[libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS] = journey.parallel
        return found

    # Private: beside it

    def _steer(self) -> None:
        now = time.monotonic()
        try:
            status, stands_still = self._domains.status(self._journey.uuid)
        except errors.Error as e:
            # libvirt keeps a look waiting while it begins or ends a job.
            LOG.debug("instance=%s cannot be looked at: %s", self._journey.uuid, e)
            status, stands_still = Status(), False
        self._tell(status)
        if self._ended is None:
            self._decide(status, now)
        if self._ended is not None:
            self._end(now)
        self._watch_the_switch(status, stands_still, now)

    def _tell(self, status: Status) -> None:
        self._watch(status)
        with contextlib.suppress(errors.Cancelled):
            if status.total and not self._done:
                self._progress.phase("migrating", status.total)
                self._domains_allow(self._pace.allowed)
            through = max(0, status.total - status.remaining)
            if status.total and through > self._done:
                self._progress.advance(through - self._done)
                self._done = through

    def _decide(self, status: Status, now: float) -> None:
        try:
            self._progress.check()
        except errors.Cancelled as e:
            self._ended = e
        step = self._pace.look(status.remaining, now)
        if step is Step.ALLOW:
            self._domains_allow(self._pace.allowed)
        elif step is Step.PAUSE:
            LOG.warning("instance=%s paused, to end its way", self._journey.uuid)
            with contextlib.suppress(errors.Error):
                self._domains.pause(self._journey.uuid)
        elif step is Step.GIVE_UP and self._ended is None:
            self._ended = errors.MigrationError(
                instance=self._journey.uuid, operation="-", reason=self._pace.reason
            )
        self._ended_at = now

    def _domains_allow(self, seconds: float) -> None:
        LOG.info("instance=%s downtime=%gs allowed", self._journey.uuid, seconds)
        with contextlib.suppress(errors.Error):
            self._domains.allow_downtime(self._journey.uuid, seconds)

    def _end(self, now: float) -> None:
        """Abort it; cut what does not answer, the peer first."""
        with contextlib.suppress(errors.Error):
            self._domains.abort(self._journey.uuid)
        waited = now - self._ended_at
        for number, opened in enumerate(self._opened, start=1):
            if waited > number * _ABORT:
                opened.cut()

    def _watch_the_switch(self, status: Status, stands_still: bool, now: float) -> None:
        """Cut the peer off when the guest waits too long for its last word."""
        if not (stands_still and status.total and not status.remaining):
            self._still_since = None
            return
        if self._still_since is None:
            self._still_since = now
        if now - self._still_since > self._there.timeouts.call and self._opened:
            self._opened[0].cut()
