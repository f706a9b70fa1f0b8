# SPDX-License-Identifier: Apache-2.0
"""Who may run an instance whose disks several hosts see, by a record beside them.

An instance's own record is its host's word, and other hosts may not see it. This one
lies in each backend with such disks. It is taken before the domain is started, a move
passes it on, and a destroyed instance's goes. It has no end in time: the guest of a
host that nobody reaches still writes. Another host gets it by fencing, or by an
operator's word.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
from oslo_log import log as logging

from virtmigrate import errors, instance, model, rights
from virtmigrate.backends import base

LOG = logging.getLogger(__name__)

_TRIES = 5
"""Times that a record is changed again after somebody else changed it."""

Change = Callable[[model.Tenure | None], model.Tenure | None]
"""Makes the record that is to be of the one that is; None leaves it."""


class Tenures:
    """The tenures of one host. Safe to share between threads.

    Arguments:
        backends: the host's, by name.
        host: its name.
    """

    def __init__(self, backends: Mapping[str, base.Backend], host: str) -> None:
        self._backends = backends
        self._host = host

    def concern(self, found: model.Instance) -> bool:
        """Tell whether several hosts see disks of an instance of ours."""
        return bool(self._shared(found))

    def demand(self, found: model.Instance) -> None:
        """Raise HeldElsewhere if another host may run an instance of ours."""
        for backend in self._shared(found):
            self._demand(backend, found.uuid, self._find(backend, found.uuid))

    def holder(self, backend: base.Backend, uuid: str) -> str | None:
        """Return the other host that may run an instance, None if there is none."""
        found = self._find(backend, uuid)
        return (
            None if found is None or rights.may_take(found, self._host) else found.host
        )

    def take(self, wanted: model.Instance) -> None:
        """Have it, for an instance that does not run; nothing happens twice.

        Raises HeldElsewhere.

        Arguments:
            wanted: its record as it is to be here, with the XML.
        """
        for backend in self._shared(wanted):
            self._change(backend, wanted.uuid, lambda found: self._taken(found, wanted))

    @contextlib.contextmanager
    def starting(
        self, found: model.Instance, domains: instance.Domains
    ) -> Iterator[None]:
        """Have it while an instance is started, then note who has its disks open.

        Raises HeldElsewhere: nothing was started, or somebody took it over meanwhile,
        and what was started is off again.
        """
        if not self.concern(found):
            yield
            return
        # libvirt would start it with the host, and ask nobody.
        domains.forbid_autostart(found.uuid)
        wanted = msgspec.structs.replace(found, domain_xml=domains.xml(found.uuid))
        self._renew(wanted, None)
        yield
        try:
            self._note(wanted)
        except errors.HeldElsewhere:
            domains.kill(found.uuid)
            raise

    @contextlib.contextmanager
    def rewriting(self, found: model.Instance) -> Iterator[None]:
        """Have it while this process puts back disks of an instance that is off.

        No fence keeps this process from them. So nobody takes it over meanwhile, but
        by an operator's word; nor after a failure, until it was done. HeldElsewhere.
        """
        self._renew(found, None)
        yield
        self._renew(found, ())

    def note_late(self, found: model.Instance, *, is_off: bool) -> None:
        """Note who has its disks open where a start that failed, or was killed, did
        not: until then nobody can be fenced. Raises StorageError.

        Arguments:
            found: an instance of ours that nobody is starting now.
        """
        for backend in self._shared(found):
            tenure = self._find(backend, found.uuid)
            if not rights.has(tenure, self._host) or not backend.capabilities.fences:
                continue
            if tenure is not None and tenure.clients is None:
                self._note_clients(backend, found, is_off=is_off)

    def amend(self, found: model.Instance) -> None:
        """Say which disks and snapshots an instance has from now on; it runs on.

        And its configuration, where the record has one. Raises HeldElsewhere.
        """

        def amended(tenure: model.Tenure | None) -> model.Tenure | None:
            if tenure is None or not rights.has(tenure, self._host):
                return None
            record = msgspec.structs.replace(
                tenure.record,
                disks=found.disks,
                snapshots=found.snapshots,
                current=found.current,
                detached=found.detached,
                change=found.change,
                policy=found.policy,
                apart=found.apart,
                domain_xml=found.domain_xml or tenure.record.domain_xml,
            )
            return msgspec.structs.replace(tenure, record=record)

        for backend in self._shared(found):
            self._change(backend, found.uuid, amended)

    def pass_on(self, gone: model.Instance, peer: str) -> None:
        """Let a peer take it; nothing happens if it is not ours. It may not run."""

        def passed(found: model.Tenure | None) -> model.Tenure | None:
            if found is None or not rights.has(found, self._host):
                return None
            return msgspec.structs.replace(found, peer=peer, clients=())

        for backend in self._shared(gone):
            if self.holder(backend, gone.uuid) is None:
                self._change(backend, gone.uuid, passed)

    def announce(self, found: model.Instance, peer: str | None) -> None:
        """Let a peer take it, too, while it runs here; HeldElsewhere. None: nobody."""

        def announced(tenure: model.Tenure | None) -> model.Tenure | None:
            ours = tenure if rights.has(tenure, self._host) else None
            return msgspec.structs.replace(ours, peer=peer) if ours else None

        for backend in self._shared(found):
            self._change(backend, found.uuid, announced)

    def drop(self, uuid: str, backends: Iterable[str]) -> None:
        """Give up what is ours of an instance that is gone; can be called again.

        A host from which it was taken, and that may come back, is kept from it still.

        Arguments:
            backends: names of those that had disks of it.
        """
        for name in self._backends.keys() & set(backends):
            self._clear(self._backends[name], uuid)

    def renounce(self, uuid: str, backends: Iterable[base.Backend]) -> None:
        """Say that nothing of an instance that was taken from this host is left here.

        Can be called again: storage that is down keeps this host off until then.
        """
        for backend in backends:
            try:
                if self.taker(backend, uuid) is not None:
                    self._clear(backend, uuid)
            except errors.StorageError as e:
                LOG.warning("instance=%s not cleared away: %s", uuid, e)

    def taker(self, backend: base.Backend, uuid: str) -> str | None:
        """Return the host that took an instance from this one; None if none did."""
        found = self._find(backend, uuid) if backend.capabilities.shared else None
        return found.host if found and self._host in found.lost else None

    def is_lost(self, found: model.Instance, peer: str) -> bool:
        """Tell whether a host took an instance over that is not of its move.

        Arguments:
            peer: the host that it was on its way to, from here.
        """
        try:
            self.demand(found)
            return False
        except errors.HeldElsewhere as e:
            takers = [self.taker(each, found.uuid) for each in self._shared(found)]
            return e.holder != peer or any(takers)

    def seize(
        self,
        wanted: model.Instance,
        *,
        is_down: bool,
        holders: frozenset[str] = frozenset(),
    ) -> None:
        """Take it from whoever has it, once that host writes no more.

        The storage sees to that where it can. Raises TakeOverRefused where neither it
        nor an operator does, and HeldElsewhere: nothing was changed. Any other error
        leaves some of it taken: it can be called again.

        Arguments:
            wanted: the instance as it is to be here, with the XML.
            is_down: an operator's word that its host has stopped for certain.
            holders: take it from these only; from anybody, if there are none.
        """
        backends = self._shared(wanted)
        for backend in backends:
            found = self._find(backend, wanted.uuid)
            self._clients(backend, wanted, found, is_down)
            if holders and found is not None and found.host not in holders:
                self._demand(backend, wanted.uuid, found)
        for backend in backends:
            self._seize(backend, wanted, is_down)

    # Private

    def _shared(self, found: model.Instance) -> list[base.Backend]:
        """Return the backends with disks of an instance that several hosts have."""
        names = sorted({ref.backend for ref in found.disks})
        backends = [self._backends[name] for name in names if name in self._backends]
        return [each for each in backends if each.capabilities.shared]

    @staticmethod
    def _find(backend: base.Backend, uuid: str) -> model.Tenure | None:
        stored = backend.tenures.find(uuid)
        return stored.body if stored else None

    def _renew(self, wanted: model.Instance, clients: tuple[str, ...] | None) -> None:
        """Have it, by a record that is not the one until now; HeldElsewhere."""
        for backend in self._shared(wanted):
            self._change(
                backend,
                wanted.uuid,
                lambda found: rights.taken(found, self._host, wanted, clients=clients),
            )

    def _clear(self, backend: base.Backend, uuid: str) -> None:
        """Say that this host has nothing of it; remove a record that nobody needs."""
        if backend.capabilities.shared:
            self._change(
                backend,
                uuid,
                lambda found: found and rights.without(found, self._host),
                by_force=True,
            )
            found = self._find(backend, uuid)
            if found is not None and not rights.is_needed(found):
                backend.tenures.remove(uuid)

    def _demand(
        self, backend: base.Backend, uuid: str, found: model.Tenure | None
    ) -> None:
        if found is not None and not rights.may_take(found, self._host):
            raise (errors.TakenAway if found.gone else errors.HeldElsewhere)(
                host=self._host, instance=uuid, backend=backend.name, holder=found.host
            )

    def _taken(
        self, found: model.Tenure | None, wanted: model.Instance
    ) -> model.Tenure | None:
        if rights.has_alone(found, self._host):
            return None
        return rights.taken(found, self._host, wanted)

    def _note(self, wanted: model.Instance) -> None:
        """Note who has the disks open now; HeldElsewhere if it is not ours any more.

        Without this note a fence has less to go by, and the instance runs all the same.
        """
        try:
            for backend in self._shared(wanted):
                if backend.capabilities.fences:
                    self._note_clients(backend, wanted)
            self.demand(wanted)
        except errors.StorageError as e:
            LOG.warning("instance=%s its clients are not noted: %s", wanted.uuid, e)

    def _note_clients(
        self, backend: base.Backend, wanted: model.Instance, *, is_off: bool = False
    ) -> None:
        def noted(found: model.Tenure | None) -> model.Tenure | None:
            if found is None:
                return None
            clients = () if is_off else self._all_clients(backend, wanted)
            return msgspec.structs.replace(found, clients=clients)

        self._change(backend, wanted.uuid, noted)

    @staticmethod
    def _all_clients(
        backend: base.Backend, wanted: model.Instance
    ) -> tuple[str, ...] | None:
        """Return who has the disks of a running instance open; None if the storage
        does not show it of each."""
        disks = [ref for ref in wanted.disks if ref.backend == backend.name]
        clients = [backend.clients(ref.volume) for ref in disks]
        return tuple(sorted(set().union(*clients))) if all(clients) else None

    def _clients(
        self,
        backend: base.Backend,
        wanted: model.Instance,
        found: model.Tenure | None,
        is_down: bool,
    ) -> set[str]:
        """Return whom the storage has to refuse; TakeOverRefused if that is unknown."""
        if rights.has_alone(found, self._host):
            return set()
        if found is not None and found.gone:
            self._demand(backend, wanted.uuid, found)
            found = None
        holder = found.host if found is not None else "another host"
        if found is not None and found.peer and not rights.may_take(found, self._host):
            # Its peer may run a copy, of which nothing here knows.
            if not is_down:
                reason = _MOVING.format(holder, found.peer)
                raise self._refused(wanted, reason)
            holder = f"{holder} or {found.peer}"
        if not backend.capabilities.fences:
            if not is_down:
                raise self._refused(wanted, _NO_FENCE.format(backend.name, holder))
            return set()
        disks = [ref for ref in wanted.disks if ref.backend == backend.name]
        clients = [backend.clients(ref.volume) for ref in disks]
        known = None if found is None else found.clients
        # Who has them open now may be of an earlier start, and not what is to come.
        if known is None and not is_down:
            raise self._refused(wanted, _UNKNOWN.format(holder))
        return set(known or ()).union(*clients)

    def _refused(self, wanted: model.Instance, reason: str) -> errors.TakeOverRefused:
        return errors.TakeOverRefused(
            instance=wanted.uuid, host=self._host, reason=reason
        )

    def _seize(
        self, backend: base.Backend, wanted: model.Instance, is_down: bool
    ) -> None:
        def seized(found: model.Tenure | None) -> model.Tenure | None:
            if rights.has_alone(found, self._host):
                return None
            if backend.capabilities.fences:
                backend.fence(self._clients(backend, wanted, found, is_down))
            LOG.warning(
                "instance=%s backend=%s taken by %s from %s%s",
                wanted.uuid,
                backend.name,
                self._host,
                found.host if found is not None else "nobody",
                ", down by an operator's word" if is_down else "",
            )
            return rights.taken(found, self._host, wanted, by_force=True)

        self._change(backend, wanted.uuid, seized, by_force=True)

    def _change(
        self,
        backend: base.Backend,
        uuid: str,
        change: Change,
        *,
        by_force: bool = False,
    ) -> None:
        """Change the record of an instance in one step; HeldElsewhere.

        Raises RecordConflict when others change it all the time.
        """
        for attempt in range(1, _TRIES + 1):
            stored = backend.tenures.find(uuid)
            if not by_force:
                self._demand(backend, uuid, stored.body if stored else None)
            body = change(stored.body if stored else None)
            if body is None or (stored and stored.body == body):
                return
            after = stored.generation if stored else 0
            try:
                backend.tenures.publish(uuid, body, after=after)
                return
            except errors.RecordConflict:
                if attempt == _TRIES:
                    raise


_MOVING = (
    "{0} was moving it to {1}, which may run it: confirm or revert that move; or see "
    "that both are down, and say so (--host-is-down)"
)
_NO_FENCE = (
    "backend {} cannot keep {} from writing to its disks. See that it is down, and "
    "stays so, then say it (--host-is-down)"
)
_UNKNOWN = (
    "{} was starting it, or putting its disks back, and did not come to note by whom "
    "they are open. If that host lives, settling there does it; else see that it is "
    "down, and stays so, then say it (--host-is-down)"
)
