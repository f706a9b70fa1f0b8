# SPDX-License-Identifier: Apache-2.0
"""Live moves of one host: begun, watched, aborted, and finished after a crash."""

import contextlib
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping

from oslo_log import log as logging

from virtmigrate import conf, errors, model, node
from virtmigrate.host import Host
from virtmigrate.journal import Journal
from virtmigrate.livemigration import notes, outlook
from virtmigrate.livemigration.arrival import Arrivals
from virtmigrate.livemigration.departure import Departure
from virtmigrate.livemigration.domains import Domains
from virtmigrate.livemigration.pace import Pace, Schedule
from virtmigrate.livemigration.planning import Plan, Planner
from virtmigrate.livemigration.steering import Journey, Steering
from virtmigrate.livemigration.terms import Forecast, Options, Outcome, Status
from virtmigrate.livemigration.undoing import Undoing
from virtmigrate.migration import facts
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress
from virtmigrate.request import Verb
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

_DEFAULT = Options()

_UNKNOWN = (
    "{}; and it cannot be put back yet: {}. It runs nowhere else; the next settle on "
    "this host that can ends the move"
)
_LOST = "{}; another host took it over meanwhile: it is off on {}"


class LiveMigrations:
    """Running instances that leave this host, and that come. Safe to share.

    Arguments:
        connect: makes the Peer of a `dest`.
        demand_no_move: raises InvalidState while a cold move of an instance is open.
    """

    def __init__(
        self,
        here: node.Node,
        connect: Callable[[str], Peer],
        demand_no_move: Callable[[str], None],
    ) -> None:
        self._here = here
        self._connect = connect
        self._demand_no_move = demand_no_move
        self._domains = Domains(here.host)
        self._hosts: dict[str, Host] = {}
        self._lock = threading.Lock()
        self._going: dict[str, tuple[Progress, Status]] = {}
        self.arrivals = Arrivals(here)

    def close(self) -> None:
        """Close all connections to peers."""
        with self._lock:
            hosts, self._hosts = self._hosts, {}
        for host in hosts.values():
            host.close()

    def migrate(
        self,
        uuid: str,
        dest: str,
        options: Options = _DEFAULT,
        progress: Progress | None = None,
    ) -> Outcome:
        """Move a running instance to dest; return what it took.

        Can be called again: one that was cut short is ended first. Raises
        MigrationRefused (nothing was touched), MigrationRolledBack (it runs here as
        before), MigrationUndecided (it stands paused at the peer, until it can be
        asked), Cancelled (it runs here as before).
        """
        progress, began = progress or Progress(), time.monotonic()
        with self._here.claimed(uuid):
            if ended := self._end_old(uuid, dest, began):
                return ended
            self._demand_at_rest(uuid)
            progress.phase("waiting for other moves")
            try:
                with self._here.sending(progress), self._noted(uuid, progress):
                    return self._migrate(uuid, dest, options, progress, began)
            except errors.HostBusy as e:
                raise errors.MigrationRefused(instance=uuid, reason=str(e)) from e

    def forecast(self, uuid: str, dest: str) -> Forecast:
        """Say what a live move would be, without preparing anything at the peer.

        The guest is watched for a second.
        """
        obstacles: tuple[str, ...] = ()
        try:
            self._plan(uuid, dest, Options())
        except errors.MigrationRefused as e:
            obstacles = (str(e.details["reason"]),)
        return outlook.forecast(self._here, uuid, self._bandwidth(Options()), obstacles)

    def rehearse(
        self, uuid: str, dest: str, progress: Progress | None = None
    ) -> Forecast:
        """Do all but the migration itself, undo it, and say what it would be.

        The peer reserves, waits, and makes the volumes. Raises MigrationRefused.
        """
        progress = progress or Progress()
        with self._here.claimed(uuid):
            self._end_old(uuid, dest, time.monotonic())
            self._demand_at_rest(uuid)
            planned = self._plan(uuid, dest, Options())
            departure = self._begin(planned, progress)
            try:
                departure.prepare()
                return outlook.forecast(
                    self._here, uuid, self._bandwidth(Options()), ()
                )
            except errors.Error as e:
                raise errors.MigrationRefused(instance=uuid, reason=str(e)) from e
            finally:
                self._undo(departure.journal)

    def status(self, uuid: str) -> Status | None:
        """Return how far a live move of this process is; None without one."""
        found = self._going.get(uuid)
        return found[1] if found else None

    def abort(self, uuid: str) -> None:
        """End a live move of this process; its guest goes on here.

        Raises InvalidState without one. One that is past its switch is not ended.
        """
        self._progress_of(uuid).cancel()

    def force(self, uuid: str) -> None:
        """Pause the guest, so that what is left ends; it goes on at the peer."""
        self._progress_of(uuid)
        self._domains.pause(uuid)

    def demand_none(self, uuid: str) -> None:
        """Raise InvalidState while a live move of the instance is open on this host.

        Also one that came, and is not settled: that would be gone on with.
        """
        journal = self._find(uuid) or self.arrivals.unsettled(uuid)
        if journal is not None:
            raise errors.InvalidState(
                instance=uuid,
                host=self._here.name,
                state=journal.steps()[-1],
                reason=f"live move {journal.operation} is open: `virtmigrate host "
                "settle` ends it",
            )

    def actions(self) -> Mapping[Verb, Callable[[model.Transfer], object]]:
        """Return what sources may ask this host for."""
        return {
            Verb.EXPECT: self.arrivals.expect,
            Verb.ARRIVE: self.arrivals.arrive,
            Verb.CALL_OFF: self.arrivals.call_off,
        }

    def recover(self) -> list[str]:
        """Finish what killed processes left; return what could not be finished."""
        left = []
        for journal in list(notes.journals(self._here.journals, notes.DEPARTURE)):
            uuid = facts.original(journal).uuid
            try:
                with self._here.claimed(uuid):
                    owed = self._recover(journal.operation)
                if owed:
                    left.append(f"{journal.operation}: {owed}")
            except Exception as e:
                # One that cannot be finished must not keep the host from the others.
                LOG.warning("operation=%s instance=%s: %s", journal.operation, uuid, e)
                left.append(f"{journal.operation}: {e}")
        return left + self.arrivals.recover()

    # Private

    def _reach(self, dest: str) -> Host:
        """Return the libvirtd of a peer that runs guests."""
        with self._lock:
            if dest not in self._hosts:
                allowed = dest in self._here.options.allow_insecure_peers
                self._hosts[dest] = Host(
                    conf.peer_uri(self._here.conf, dest),
                    name=dest,
                    timeouts=node.timeouts(self._here.conf),
                    allow_insecure=allowed,
                )
            return self._hosts[dest]

    @contextlib.contextmanager
    def _noted(self, uuid: str, progress: Progress) -> Iterator[None]:
        self._going[uuid] = progress, Status()
        try:
            yield
        finally:
            self._going.pop(uuid, None)

    def _progress_of(self, uuid: str) -> Progress:
        found = self._going.get(uuid)
        if found is None:
            raise errors.InvalidState(
                instance=uuid,
                host=self._here.name,
                state="at rest",
                reason="no live move of it goes on in this process",
            )
        return found[0]

    def _demand_at_rest(self, uuid: str) -> None:
        """Refuse what a cold move may bring back, or has not finished bringing."""
        try:
            self._demand_no_move(uuid)
        except errors.InvalidState as e:
            raise errors.MigrationRefused(instance=uuid, reason=str(e)) from e

    def _find(self, uuid: str) -> Journal | None:
        for journal in notes.journals(self._here.journals, notes.DEPARTURE):
            is_open = not journal.has("restored")
            if is_open and facts.original(journal).uuid == uuid:
                return journal
        return None

    def _undo(self, journal: Journal) -> tuple[bool, str]:
        """End a move; return whether the peer has it, and what is owed."""
        undoing = Undoing(self._here, journal, self._connect, self._reach)
        owed = undoing.run()
        return undoing.has_gone, owed

    def _recover(self, operation: str) -> str:
        for journal in notes.journals(self._here.journals, notes.DEPARTURE):
            if journal.operation == operation:
                return self._undo(journal)[1]
        return ""

    def _end_old(self, uuid: str, dest: str, began: float) -> Outcome | None:
        """End a move that was cut short; its outcome if it got to dest."""
        journal = self._find(uuid)
        if journal is None:
            return None
        to = facts.transfer(journal).peer
        has_gone, _ = self._undo(journal)
        own = self._here.own_record(uuid)
        is_back = own is not None and own.operation != journal.operation
        if has_gone and to == dest and not is_back:
            seconds = time.monotonic() - began
            return Outcome(journal.operation, seconds, seconds, 0)
        return None

    def _plan(self, uuid: str, dest: str, options: Options) -> Plan:
        planner = Planner(
            self._here, self._connect(dest), self._reach(dest), uuid, dest
        )
        return planner.plan(options.request)

    def _begin(self, planned: Plan, progress: Progress) -> Departure:
        journal = notes.begin(
            self._here.journals,
            notes.DEPARTURE,
            planned.transfer,
            planned.original,
            planned.cards,
        )
        dest = planned.transfer.peer
        return Departure(
            self._here, journal, self._connect(dest), self._reach(dest), progress
        )

    def _migrate(
        self,
        uuid: str,
        dest: str,
        options: Options,
        progress: Progress,
        began: float,
    ) -> Outcome:
        progress.phase("checking")
        planned = self._plan(uuid, dest, options)
        departure = self._begin(planned, progress)
        journal = departure.journal
        LOG.info(
            "operation=%s request=%s instance=%s moves live from %s to %s",
            journal.operation,
            options.request,
            uuid,
            self._here.name,
            dest,
        )
        switching = 0.0
        try:
            transfer = departure.prepare()
            departure.leave()
            departure.send(self._steering(uuid, dest, transfer, options, progress))
            switching = departure.switch()
        except BaseException as e:
            self._roll_back(journal, e)
        seconds = time.monotonic() - began
        outcome = departure.outcome(seconds, switching)
        if journal.path.exists() and (owed := departure.finish()):
            LOG.warning("operation=%s %s", journal.operation, owed)
        return outcome

    def _roll_back(self, journal: Journal, error: BaseException) -> None:
        """Undo, and raise what it was; return where it got through all the same."""
        LOG.warning("operation=%s ends: %r", journal.operation, error)
        if not isinstance(error, (Exception, KeyboardInterrupt)):
            raise error
        uuid = facts.original(journal).uuid
        try:
            has_gone, owed = self._undo(journal)
        except (errors.HostError, errors.InvalidState, errors.StorageError) as e:
            # libvirt waits for disks that it sends until their connections end.
            reason = _UNKNOWN.format(error, e)
            raise errors.MigrationError(
                instance=uuid, operation=journal.operation, reason=reason
            ) from error
        if has_gone:
            return
        if journal.has("lost"):
            reason = _LOST.format(error, self._here.name)
            raise errors.MigrationError(
                instance=uuid, operation=journal.operation, reason=reason
            ) from error
        if not isinstance(error, errors.Error):
            raise error
        if not journal.has("leaving"):
            raise errors.MigrationRefused(instance=uuid, reason=str(error)) from error
        raise errors.MigrationRolledBack(
            instance=uuid,
            operation=journal.operation,
            reason=str(error),
            state=facts.original(journal).power,
            host=self._here.name,
            debts=f"; still owed at the peer: {owed}" if owed else "",
        ) from error

    def _steering(
        self,
        uuid: str,
        dest: str,
        transfer: model.Transfer,
        options: Options,
        progress: Progress,
    ) -> Steering:
        def watch(status: Status) -> None:
            self._going[uuid] = progress, status

        return Steering(
            self._here.host,
            self._reach(dest),
            self._journey(uuid, dest, transfer, options),
            Pace(self._schedule(options), time.monotonic()),
            progress,
            watch,
        )

    def _journey(
        self, uuid: str, dest: str, transfer: model.Transfer, options: Options
    ) -> Journey:
        ours = self._here.options
        uri = conf.live_uri(self._here.conf, dest)
        assert transfer.live is not None and transfer.record is not None
        sent = tuple(each.target for each in transfer.volumes if not each.shared)
        return Journey(
            uuid=uuid,
            uri=uri,
            xml=transfer.live.xml,
            persistent_xml=str(transfer.record.domain_xml),
            disks=sent,
            tls_name=urllib.parse.urlsplit(uri).hostname if ours.live_tls else None,
            bandwidth=self._bandwidth(options),
            parallel=int(ours.live_parallel),
            auto_converge=bool(ours.live_auto_converge),
        )

    def _bandwidth(self, options: Options) -> int:
        if options.bandwidth is not None:
            return options.bandwidth
        return int(self._here.options.live_bandwidth_mib) * MiB

    def _schedule(self, options: Options) -> Schedule:
        ours = self._here.options
        downtime = options.downtime or float(ours.live_downtime)
        return Schedule(
            downtime=downtime,
            downtime_limit=max(downtime, float(ours.live_downtime_limit)),
            stall=float(ours.live_stall),
            timeout=options.timeout or float(ours.live_timeout),
            pauses=ours.live_stalled == "pause",
        )
