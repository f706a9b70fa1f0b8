# SPDX-License-Identifier: Apache-2.0
"""Serves the requests that sources write into this host's mailbox.

A look lists the mailbox once, takes in what is new, and says "working" at once. The
work is done by a few threads, at most two of one operation at a time; who waits for
a thread is told so by a head that changes. The final head is the last write. A
receiver that was killed leaves heads that are not final, and the next one begins
those requests anew.
"""

import collections
import contextlib
import random
import re
import threading
import time
import types
from collections.abc import Iterator, Mapping

from oslo_log import log as logging

from virtmigrate import address, desk, errand, errors, node, request, storagepool, wire
from virtmigrate.backends import base
from virtmigrate.model import TransferState
from virtmigrate.notice import Notice
from virtmigrate.request import Answer, State

LOG = logging.getLogger(__name__)

_TAKEN_EACH = 8
"""New requests of one operation that one look takes in."""

_TAKEN = 64
"""Requests that are taken in and not answered yet."""

_PULSE = 1.0
"""Seconds between two signs of life."""

_ORPHAN_AGE = 3600.0
"""Seconds after which what lies there without a transfer is removed."""

_AWAY = (errors.HostUnreachable, errors.HostTimeout, errors.PoolBusy)
"""Not of one volume alone: all wait until the host is back."""

_RECORD = re.compile(r"([0-9a-f]{16})\.rec\.([1-9][0-9]{0,17})")


class Receiver:
    """Answers requests on one host, while no other process of the host does.

    look(), serve() and start() are for one thread; stop() is for any.

    Arguments:
        here: this host, with its pools made.
        workers: threads that read one volume.
        actions: see errand.Errands.
    """

    def __init__(
        self,
        here: node.Node,
        *,
        workers: int = 2,
        actions: Mapping[request.Verb, errand.Action] = types.MappingProxyType({}),
    ) -> None:
        self._here = here
        self._pool = here.mailbox.pool
        self._errands = errand.Errands(here, workers, actions)
        self._desk = desk.Desk(self._errands, self._write)
        self._states: dict[str, tuple[int, bool]] = {}
        self._answered: dict[str, str] = {}
        self._orphans: dict[str, float] = {}
        self._told: set[str] = set()
        self._has_rest = False
        self._looked = 0.0
        self._swept = -float("inf")
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.looks = 0
        """How often the mailbox was listed."""

    def look(self) -> int:
        """Answer all requests that are there now; return how many.

        0 where another receiver serves this host.
        """
        count = 0
        with self._here.locks.only("receiver") as is_ours:
            if not is_ours:
                return 0
            with self._desk.opened(lambda: None):
                self._has_rest = True
                while self._has_rest:
                    count += self._take_in()
                    while self._desk.is_busy():
                        self._desk.rest(_PULSE)
                        self._desk.pulse()
        return count

    def start(self) -> None:
        """Serve in a thread of its own, until stop()."""
        self.stop()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self.serve, args=(self._stop,), name="receiver", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it works on is left for the next one."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def serve(self, stop: threading.Event) -> None:
        """Serve until `stop` is set; stand by while another receiver serves.

        Returns at once where this process is not on the host that it drives: from
        afar nothing can be proven better than its source does.
        """
        if not address.parse(self._here.options.uri).is_local:
            LOG.info("host=%s is served by a receiver of its own", self._here.name)
            return
        while not stop.is_set():
            pause = _PULSE
            try:
                with self._here.locks.only("receiver") as is_ours:
                    if is_ours:
                        LOG.info("host=%s receiver serves", self._here.name)
                        self._serve(stop)
                    else:
                        pause = self._here.options.receiver_interval
            except (errors.Error, OSError) as e:
                LOG.warning("receiver: %r", str(e))
            except Exception:
                LOG.exception("receiver")
            stop.wait(pause)

    # Private: turns

    def _serve(self, stop: threading.Event) -> None:
        interval = self._here.options.receiver_interval
        with (
            Notice(self._pool, ".request", interval) as notice,
            _waking(notice, stop),
            self._desk.opened(notice.wake),
        ):
            self._remove_nonces()
            self._has_rest = True
            while not stop.is_set():
                try:
                    self._serve_once(notice)
                except errors.Error as e:
                    # What is worked on goes on: libvirt may be back in a moment.
                    LOG.warning("host=%s receiver: %r", self._here.name, str(e))
                    self._has_rest = True
                    stop.wait(_PULSE)

    def _serve_once(self, notice: Notice) -> None:
        """Wait until there is something to do, and do it."""
        is_busy = self._has_rest or self._desk.is_busy() or self._desk.is_owing
        is_open = any(state for _, state in self._states.values())
        is_time = notice.wait(is_open=is_open, limit=_PULSE if is_busy else 3600.0)
        owes = self._desk.is_owing and time.monotonic() - self._looked > _PULSE
        try:
            if is_time or self._has_rest or owes:
                names = self._list()
                if not notice.is_watching:
                    self._note_transfers(names)
                self._take_in(names)
        finally:
            # Those who wait have nothing to do with what lies beside them.
            self._desk.pulse()

    # Private: what is there

    def _list(self) -> list[str]:
        self.looks += 1
        self._looked = time.monotonic()
        self._desk.is_owing = False
        return self._pool.names()

    def _take_in(self, names: list[str] | None = None) -> int:
        """Take in what is new, fairly; return how many requests that were."""
        names = self._list() if names is None else names
        present = set(names)
        self._answered = {n: d for n, d in self._answered.items() if n in present}
        known = {found[1] for n in names if (found := _RECORD.fullmatch(n))}
        self._sweep(names, known)
        groups = _groups(names, known)
        self._has_rest = False
        return sum(self._take_from(group, present) for group in groups)

    def _take_from(self, group: list[str], present: set[str]) -> int:
        taken = 0
        for name in group:
            if taken == _TAKEN_EACH or self._desk.is_full(_TAKEN):
                self._has_rest = True
                break
            try:
                taken += self._take(name, present)
            except errors.VolumeNotFound:
                LOG.debug("volume=%s is gone", name)
            except _AWAY:
                raise
            except errors.Error as e:
                self._pass_over(name, str(e))
        return taken

    def _take(self, name: str, present: set[str]) -> bool:
        """Take one request in; False when there is nothing to do for it, yet."""
        answer = request.answer_name(name)
        try:
            data = self._pool.read(name, limit=request.HEAD)
        except (ValueError, errors.ShortTransfer) as e:
            return self._pass_over(name, str(e))
        digest = request.digest(data)
        if digest == self._answered.get(name) or self._desk.has(name, digest):
            return False
        if not any(data):
            return False
        try:
            wanted = request.decode(data, name)
        except request.TooNew as e:
            return self._refuse(name, digest, f"{e}; this receiver is older")
        except ValueError as e:
            return self._pass_over(name, str(e))
        size = request.answer_size(wanted)
        if answer not in present or self._pool.physical(answer) != size:
            return self._pass_over(name, f"its answer has no volume of {size} bytes")
        if self._is_answered(answer, digest):
            self._answered[name] = digest
            return False
        return self._desk.take(desk.Job(name, wanted, digest))

    def _is_answered(self, name: str, digest: str) -> bool:
        data = self._read_head(name)
        with contextlib.suppress(ValueError):
            answer = request.decode_answer(data, name)
            return answer.request == digest and answer.state is not State.WORKING
        return False

    def _read_head(self, name: str) -> bytes:
        with self._pool.opened(name, f"reading {name}") as (session, vol):
            return wire.download(session, vol, request.HEAD)

    def _refuse(self, name: str, digest: str, reason: str) -> bool:
        self._write(name, Answer(request=digest, state=State.FAILED, reason=reason))
        self._answered[name] = digest
        return True

    def _pass_over(self, name: str, reason: str) -> bool:
        """Say once why a request is not looked at."""
        if len(self._told) > 1000:
            self._told.clear()
        if name not in self._told:
            self._told.add(name)
            LOG.warning("volume=%s is passed over: %r", name, reason)
        return False

    def _write(self, name: str, answer: Answer, payload: bytes = b"") -> None:
        """Write the answer of a request, its head last."""
        volume = request.answer_name(name)
        if payload:
            self._pool.write(volume, payload, offset=request.HEAD)
        self._pool.write(volume, request.encode_answer(answer, volume))

    def _sweep(self, names: list[str], known: set[str]) -> None:
        """Remove what lies there for long without a transfer that it is of."""
        now = time.monotonic()
        of = {name: request.operation_of(name) for name in names}
        ours = [name for name, each in of.items() if each and each not in known]
        self._orphans = {name: self._orphans.get(name, now) for name in ours}
        for name, since in self._orphans.items():
            if now - since > _ORPHAN_AGE:
                self._delete(self._pool, name)
        if now - self._swept > _ORPHAN_AGE:
            self._swept = now
            self._sweep_incoming(known)

    def _sweep_incoming(self, known: set[str]) -> None:
        """Remove what a killed receiver set aside for transfers that are over."""
        for backend in self._here.backends.values():
            try:
                self._sweep_backend(backend, known)
            except errors.Error as e:
                self._pass_over(backend.incoming.name, str(e))

    def _sweep_backend(self, backend: base.Backend, known: set[str]) -> None:
        if backend.capabilities.shared:
            # Another host's transfers are in its own mailbox: `storage check` has it.
            return
        for name in backend.incoming.names():
            operation = errand.aside_operation(name)
            is_over = operation is not None and operation not in known
            # What has a record is somebody's.
            if is_over and backend.volumes.find(name) is None:
                self._delete(backend.incoming, name)

    def _delete(self, pool: storagepool.Pool, name: str) -> None:
        try:
            pool.delete(name)
        except _AWAY:
            raise
        except errors.Error as e:
            self._pass_over(name, str(e))

    def _remove_nonces(self) -> None:
        try:
            self._pool.remove_nonces()
        except _AWAY:
            raise
        except errors.Error as e:
            LOG.warning("host=%s old nonces stay: %r", self._here.name, str(e))

    def _note_transfers(self, names: list[str]) -> None:
        """Note which transfers are open: where nothing is watched, that says how
        often to look."""
        newest: dict[str, int] = {}
        for name in names:
            if found := _RECORD.fullmatch(name):
                newest[found[1]] = max(newest.get(found[1], 0), int(found[2]))
        states = {n: s for n, s in self._states.items() if newest.get(n) == s[0]}
        for name in newest.keys() - states.keys():
            states[name] = newest[name], self._is_open(name)
        self._states = states

    def _is_open(self, operation: str) -> bool:
        try:
            stored = self._here.mailbox.transfers.find(operation)
        except _AWAY:
            raise
        except errors.Error as e:
            LOG.debug("operation=%s: %r", operation, str(e))
            return False
        return stored is not None and stored.body.state is TransferState.RESERVED


# Private


@contextlib.contextmanager
def _waking(notice: Notice, stop: threading.Event) -> Iterator[None]:
    """End the notice's waits as soon as `stop` is set."""

    def wait() -> None:
        stop.wait()
        notice.wake()

    threading.Thread(target=wait, name="receiver-stop", daemon=True).start()
    yield


def _groups(names: list[str], known: set[str]) -> list[list[str]]:
    """Return the requests by operation, those without a transfer last, as one.

    Those without are refused a few at a time, drawn at random: they must not keep
    the others waiting.
    """
    groups: dict[str, list[str]] = collections.defaultdict(list)
    strangers: list[str] = []
    for name in names:
        found = request.parse_name(name)
        if found is not None and found[0] in known:
            groups[found[0]].append(name)
        elif found is not None:
            strangers.append(name)
    few = random.sample(strangers, min(len(strangers), _TAKEN_EACH))
    return [*groups.values(), few]
