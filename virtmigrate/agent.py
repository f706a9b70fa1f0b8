# SPDX-License-Identifier: Apache-2.0
"""Freezing the file systems of a guest by its agent, and thawing them for certain.

A frozen guest waits with each write. So that none stays so, a thread thaws it: when
the work is done, or when the guest was frozen for too long, whatever the work does
then. It goes on until the agent has acknowledged it. For a process that was killed a
note says which guest may be frozen: it is there before the freeze is asked for, and
goes when a thaw was acknowledged after it. `recover` thaws the guests of notes whose
process is gone.

An agent answers in the order in which it was asked. So a thaw that it acknowledges also
undid a freeze for which nobody waited any more.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
from oslo_log import log as logging

from virtmigrate import domainxml, errors, locks
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How long an agent and a freeze may take."""

    answer: int  # seconds for the agent to do what it is asked
    frozen: float  # seconds that a guest may be frozen


class Agents:
    """The agents of a host's guests. Safe to share between threads.

    Arguments:
        state: the directory of notes and locks, the same for all processes that
            drive this host. It must survive a reboot.
    """

    def __init__(self, host: Host, state: Path, limits: Limits) -> None:
        self._host = host
        self._notes = state / "frozen"
        self._locks = locks.FileLocks(state / "locks")
        self._limits = limits
        self._closed = threading.Event()

    @contextlib.contextmanager
    def frozen(self, uuid: str) -> Iterator[None]:
        """Hold all file systems of a running guest frozen.

        On leaving they are thawed. Whoever leaves without an error had them frozen all
        the time. What the body raises goes on, and a failed thaw is logged.

        Raises AgentNotThere: nothing was frozen. QuiesceFailed, on entering or on
        leaving: it says whether the guest is thawed. InstanceBusy when somebody else
        freezes the guest, or still tries to thaw it. All of it within the limit,
        plus a few times what an agent may take to answer.
        """
        run = self._demand_agent(uuid)
        with self._watched(uuid, run) as watch:
            count = self._freeze(uuid, watch)
            LOG.debug("instance=%s frozen file_systems=%d", uuid, count)
            yield
        watch.demand_held(count)

    def trim(self, uuid: str, seconds: int) -> None:
        """Have the guest discard what its file systems do not use.

        Where the storage cannot discard, nothing happens. Raises AgentNotThere,
        LibvirtFailed; the guest may have discarded a part then, which does no harm.

        Arguments:
            seconds: that its agent may take.
        """
        self._demand_agent(uuid)
        with _asked(self._host, uuid, "discarding", seconds) as domain:
            try:
                domain.fSTrim(None, 0, 0)
            finally:
                with contextlib.suppress(libvirt.libvirtError):
                    domain.agentSetResponseTimeout(_FOR_EVER)

    def recover(self) -> list[str]:
        """Thaw what killed processes left frozen; return what may still be."""
        left = []
        for path in sorted(self._notes.glob("*")):
            grip = self._locks.take(_lock_name(path.name))
            if grip is None:
                # Its process lives, and thaws it.
                continue
            try:
                self._settle(path)
            except errors.Error as e:
                left.append(f"instance {path.name} may be frozen: {e}")
                LOG.warning("instance=%s may be frozen: %s", path.name, e)
            finally:
                grip.release()
        return left

    def close(self) -> None:
        """Leave the guests whose agents do not answer to `recover`."""
        self._closed.set()

    # Private

    def _demand_agent(self, uuid: str) -> int:
        """Return libvirt's number of the guest's run; AgentNotThere."""
        doing = f"instance {uuid}: looking for its agent"
        with self._host.session(doing, instance=uuid) as session:
            domain = session.conn.lookupByUUIDString(uuid)
            run, state = int(domain.ID()), domain.state()[0]
            reason = _obstacle(state, domainxml.agent_state(domain.XMLDesc(0)))
        if reason:
            raise errors.AgentNotThere(
                instance=uuid, host=self._host.name, reason=reason
            )
        return run

    @contextlib.contextmanager
    def _watched(self, uuid: str, run: int) -> Iterator["_Watch"]:
        """Have a thread that thaws the guest, and a note for who comes after us."""
        grip = self._locks.take(_lock_name(uuid))
        if grip is None:
            raise errors.InstanceBusy(
                instance=uuid, host=self._host.name, reason="it is being frozen"
            )
        note = _Note(self._notes / uuid, run)
        watch = _Watch(self._host, note, grip, self._limits, self._closed)
        watch.begin()
        try:
            yield watch
        finally:
            watch.end()

    def _freeze(self, uuid: str, watch: "_Watch") -> int:
        """Freeze, and return how many file systems are."""
        try:
            with _asked(self._host, uuid, "freezing it", self._limits.answer) as domain:
                count = int(domain.fsFreeze())
        except errors.Error as e:
            # libvirt may still ask for it when we have thawed already.
            lost = isinstance(e, errors.HostTimeout | errors.HostUnreachable)
            watch.end(lost=lost)
            raise watch.failed(str(e)) from e
        if not count:
            watch.end()
            raise watch.failed("its agent found no file system that it can freeze")
        watch.arm()
        return count

    def _settle(self, path: Path) -> None:
        if not path.exists():
            # It was thawed until we had the lock.
            return
        note = _Note.found(path)
        thawed = _thaw(self._host, note, self._limits.answer)
        note.remove()
        if thawed is not None:
            LOG.info("instance=%s thawed file_systems=%d", note.uuid, thawed)


# Private

_SLACK = 45.0
"""Seconds more than the agent has: libvirt waits 30 s for one that others ask
something, and then sees twice for 5 s whether it is there. A session that were cut
before could leave a freeze behind that is asked for later."""
_FOR_EVER = libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK
_PAUSE = 1.0
"""Seconds between two attempts to thaw."""


class _Note:
    """A file that says that a run of a guest may be frozen.

    It belongs to who has the lock of its name.
    """

    def __init__(self, path: Path, run: int) -> None:
        self.uuid = path.name
        self.run = run
        self._path = path

    @classmethod
    def found(cls, path: Path) -> "_Note":
        """Read a note; one that is torn is of any run."""
        text = path.read_text()
        is_whole = text.endswith("\n") and text.strip().isdigit()
        return cls(path, int(text) if is_whole else _ANY)

    def write(self) -> None:
        """Have it on disk."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("w") as file:
            file.write(f"{self.run}\n")
            file.flush()
            os.fsync(file.fileno())
        fd = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


_ANY = -1


class _Watch(threading.Thread):
    """Thaws one guest: when it is told to, or when the limit is over.

    begin(), end() and what follows belong to the thread that made it.
    """

    def __init__(
        self,
        host: Host,
        note: _Note,
        grip: locks.Grip,
        limits: Limits,
        closed: threading.Event,
    ) -> None:
        super().__init__(name="virtmigrate-thaw", daemon=True)
        self._host = host
        self._note = note
        self._grip = grip
        self._limits = limits
        self._closed = closed
        self._began = time.monotonic()
        self._ready = threading.Event()
        self._armed = threading.Event()
        self._told = threading.Event()
        self._answered = threading.Event()
        self._lost = False
        self._expired = False
        self._is_thawed = False
        self._thawed: int | None = None  # file systems; None: its run was over
        self._problem: Exception | None = None

    def begin(self) -> None:
        """Start it; when this returns it has all that it needs to thaw.

        On an error there is no lock, and a note may be left: it does no harm.
        """
        self.start()
        self._ready.wait()
        if self._problem is not None:
            raise self._problem

    def arm(self) -> None:
        """Let the limit count, from begin() on: the freeze was answered.

        Before that a thaw could overtake it.
        """
        self._armed.set()

    def end(self, *, lost: bool = False) -> None:
        """Have the guest thawed, and wait for that as long as an agent may take.

        Arguments:
            lost: the freeze was not answered by libvirt: the note stays, so that the
                guest is thawed once more.
        """
        self._lost = self._lost or lost
        self._told.set()
        self._armed.set()
        self._answered.wait()
        if not self._is_thawed:
            LOG.error("instance=%s %s", self._note.uuid, self._state())

    def demand_held(self, count: int) -> None:
        """Raise QuiesceFailed unless `count` file systems were frozen until end()."""
        thawed = self._thawed
        if self._expired:
            raise self.failed(f"it was frozen for more than {self._limits.frozen:g} s")
        if not self._is_thawed:
            raise self.failed("its agent froze it, and did not thaw it")
        if thawed is None:
            raise self.failed("it stopped, or started anew, while it was frozen")
        if thawed < count:
            raise self.failed(
                f"{count} file systems were frozen, and {thawed} were so at the end"
            )

    def failed(self, reason: str) -> errors.QuiesceFailed:
        """Return the error that says why, and how the guest is now."""
        return errors.QuiesceFailed(
            instance=self._note.uuid,
            host=self._host.name,
            reason=reason,
            state=self._state(),
        )

    # The thread

    def run(self) -> None:
        try:
            self._prepare()
            if self._problem is None:
                self._await_end()
                self._thaw_at_last()
        except Exception as e:
            LOG.exception("instance=%s not thawed", self._note.uuid)
            self._problem = e
        finally:
            self._grip.release()
            self._ready.set()
            self._answered.set()

    def _prepare(self) -> None:
        """Open this thread's connection, while there is nothing to lose."""
        try:
            with self._host.session("getting ready to thaw"):
                self._note.write()
        except (errors.Error, OSError) as e:
            self._problem = e
        self._ready.set()

    def _await_end(self) -> None:
        self._armed.wait()
        left = self._began + self._limits.frozen - time.monotonic()
        self._expired = not self._told.wait(max(0.0, left))

    def _thaw_at_last(self) -> None:
        """Thaw it, and go on trying when nobody waits for it any more."""
        until = time.monotonic() + self._limits.answer
        while not self._thaw():
            if time.monotonic() >= until:
                self._answered.set()
            if self._closed.wait(_PAUSE):
                return
        if not self._lost:
            self._note.remove()
        if self._expired:
            LOG.warning("instance=%s thawed: it was frozen too long", self._note.uuid)

    def _thaw(self) -> bool:
        try:
            self._thawed = _thaw(self._host, self._note, self._limits.answer)
        except errors.Error as e:
            LOG.warning("instance=%s not thawed, tried again: %s", self._note.uuid, e)
            self._problem = e
            return False
        self._is_thawed = True
        return True

    def _state(self) -> str:
        if self._is_thawed:
            return "It is thawed"
        return (
            "It may be frozen: thawing it goes on until its agent answers, or it is "
            f"turned off ({self._problem})"
        )


def _obstacle(state: int, agent: str | None) -> str | None:
    """Return why an agent cannot be asked."""
    if state not in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
        return "the guest does not run"
    if agent is None:
        return f"it has no channel {domainxml.AGENT_CHANNEL}"
    if agent != "connected":
        return "no agent runs in the guest"
    return None


def _thaw(host: Host, note: _Note, seconds: int) -> int | None:
    """Thaw; return how many file systems, None when that run of the guest is over."""
    try:
        with _asked(host, note.uuid, "thawing it", seconds) as domain:
            if not domain.isActive() or note.run not in (_ANY, domain.ID()):
                return None
            thawed = int(domain.fsThaw())
            # libvirt's default: what others ask may take its time.
            with contextlib.suppress(libvirt.libvirtError):
                domain.agentSetResponseTimeout(_FOR_EVER)
            return thawed
    except errors.InstanceNotFound:
        return None


@contextlib.contextmanager
def _asked(
    host: Host, uuid: str, doing: str, seconds: int
) -> Iterator["libvirt.virDomain"]:
    """Yield a domain whose agent has to answer within `seconds`.

    Without that libvirt would wait for ever, and ask nothing else meanwhile.
    """
    doing = f"instance {uuid}: {doing}"
    with host.session(doing, timeout=seconds + _SLACK, instance=uuid) as session:
        domain = session.conn.lookupByUUIDString(uuid)
        if domain.isActive():
            domain.agentSetResponseTimeout(seconds)
        yield domain


def _lock_name(uuid: str) -> str:
    return f"frozen-{uuid}"
