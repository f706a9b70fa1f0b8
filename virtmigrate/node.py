# SPDX-License-Identifier: Apache-2.0
"""All that belongs to one host, put together from its configuration."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
from oslo_config import cfg
from oslo_log import log as logging

from virtmigrate import (
    __version__,
    account,
    agent,
    backends,
    card,
    errors,
    instance,
    limit,
    locks,
    mailbox,
    manifest,
    model,
    nbdserver,
    record,
    scratch,
    snapshottree,
    storagepool,
    stream,
    tenure,
)
from virtmigrate import conf as options
from virtmigrate.backends import base
from virtmigrate.host import Host, Timeouts
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

TICKETS = (1,)
"""Versions of the migration string that this release reads."""

_RUNNABLE = (model.InstanceState.HERE, model.InstanceState.ARRIVED)
_OPEN = (
    model.InstanceState.ARRIVED,
    model.InstanceState.LEAVING,
    model.InstanceState.AWAY,
)

_WHOLE = (
    model.Changing.RESUMING,
    model.Changing.DELETING,
    model.Changing.TIDYING,
)
"""Changes that leave the disks what the domain's XML says all the time."""


class Node:
    """This host: its libvirt, backends, records, locks and journals.

    Safe to share between threads. Closing it closes the connections.
    """

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self.conf = conf
        self.options = conf[options.GROUP]
        self.name: str = self.options.address or socket.gethostname()
        self.host = Host(
            self.options.uri,
            name=self.name,
            timeouts=timeouts(conf),
            # The command binds a node to a peer's URI.
            allow_insecure=self.name in self.options.allow_insecure_peers,
        )
        self.backends = backends.load(conf, self.host)
        self.down: dict[str, str] = {}
        """Backends whose storage did not answer, and what was said."""
        self.files = self._file_backend()
        self.domains = instance.Domains(self.host)
        self.tenures = tenure.Tenures(self.backends, self.name)
        self.scratch = scratch.Scratch(
            self.domains,
            self.backends,
            self.files,
            self.options.transient_limit_mib * MiB,
        )
        self.mailbox = mailbox.of(
            self.host,
            self.options.record_grace,
            ownership=self.files.settings.ownership,
            busy_timeout=self.options.busy_timeout,
        )
        self._instances_pool = self.files.pool("virtmigrate-instances")
        self.instances = record.Store(
            self._instances_pool, model.Instance, grace=self.options.record_grace
        )
        self.bandwidth = limit.Limiter(self.options.host_bandwidth_mib * MiB)
        state = Path(self.options.state_path)
        self.journals = state / "journal"
        quiescing = agent.Limits(self.options.freeze_timeout, self.options.freeze_limit)
        self.agents = agent.Agents(self.host, state, quiescing)
        self.locks = locks.HostLocks(
            state / "locks", self.name, self.options.lock_timeout
        )

    def close(self) -> None:
        self.agents.close()
        for backend in self.backends.values():
            backend.close()
        self.host.close()

    def ensure(self) -> None:
        """Make pools and publish this host's card; nothing happens the second time.

        A backend whose storage is down keeps only itself from being used, until the
        next call finds it up: it is left out of the card. The one for files has to be
        there.
        """
        for backend in self.backends.values():
            self._ensure(backend)
        path = self.files.settings.path
        self._instances_pool.ensure_directory(f"{path}/instances")
        self.mailbox.pool.ensure_directory(f"{path}/mailbox/{self.name}")
        self._publish_card()

    def up(self) -> list[base.Backend]:
        """Return the backends that were there when they were looked for last."""
        return [each for name, each in self.backends.items() if name not in self.down]

    def note_down(self, backend: base.Backend, error: errors.Error) -> None:
        """Leave a backend out until its storage is there again."""
        self.down[backend.name] = str(error)
        LOG.error("host=%s backend=%s is down: %s", self.name, backend.name, error)

    def room(self, backend: base.Backend) -> storagepool.Room | None:
        """Return what a backend's storage holds and has free; None when it is down."""
        try:
            return backend.disks.room()
        except errors.StorageDown as e:
            self.note_down(backend, e)
            return None

    def sweep(self) -> list[str]:
        """Remove what killed processes left on this machine and in the backends, and
        look again for those that were down; return what remains."""
        nbdserver.sweep()
        was_down = set(self.down)
        for backend in self.backends.values():
            if backend.name not in self.down or self._ensure(backend):
                try:
                    backend.sweep()
                except errors.StorageDown as e:
                    self.note_down(backend, e)
        if set(self.down) != was_down:
            self._publish_card()
        return [f"backend {name}: {reason}" for name, reason in self.down.items()]

    def mover(
        self, progress: Progress | None = None, counted: account.Account | None = None
    ) -> stream.Mover:
        """Return what copies volumes from this host, within its limits."""
        tuning = stream.Tuning(
            workers=self.options.transfer_workers,
            stretch=self.options.stream_length * MiB,
            retry=self.options.retry_timeout,
        )
        own = limit.Limiter(self.options.bandwidth_mib * MiB)
        return stream.Mover(
            tuning,
            progress=progress,
            counted=counted,
            limits=limit.Limits(own, self.bandwidth),
        )

    @contextlib.contextmanager
    def sending(self, progress: Progress) -> Iterator[None]:
        """Hold one of the host's `max_transfers` slots.

        Raises Cancelled while waiting, HostBusy after `queue_timeout`.
        """
        options = self.options
        with self.locks.slot(
            "transfer", options.max_transfers, options.queue_timeout, progress.check
        ):
            yield

    @contextlib.contextmanager
    def claimed(self, uuid: str) -> Iterator[None]:
        """Hold an instance against other operations of this host."""
        with self.locks.instance(uuid):
            yield

    def publish_instance(self, body: model.Instance) -> int:
        """Publish the next generation of an instance's record and return it."""
        found = self.instances.find(body.uuid)
        after = found.generation if found else 0
        stored = self.instances.publish(body.uuid, body, after=after)
        self.instances.prune(body.uuid)
        return stored.generation

    def forget_unborn(self, uuid: str) -> None:
        """Remove what a killed process left of a record that it never wrote."""
        if self.instances.find(uuid) is None:
            self.instances.remove(uuid)

    def own_record(self, uuid: str) -> model.Instance | None:
        """Return an instance's record if it is this host's: hosts may share them."""
        stored = self.instances.find(uuid)
        return stored.body if stored and stored.body.host == self.name else None

    def entitled(self, uuid: str) -> model.Instance:
        """Return the record of an instance that this host may run.

        Raises NotEntitled, RecordMissing.
        """
        found = self.instances.read(uuid).body
        if found.host != self.name or found.state not in _RUNNABLE:
            raise errors.NotEntitled(
                host=self.name,
                instance=uuid,
                reason=f"its record says {found.state.value} on {found.host}, "
                f"peer {found.peer}, operation {found.operation}",
            )
        self.tenures.demand(found)
        return found

    def start(self, uuid: str, *, paused: bool = False, keep: bool = False) -> None:
        """Start an instance; nothing happens when it runs.

        Raises NotEntitled, RecordMissing: it was not started. Nothing else starts one.

        Arguments:
            keep: with what its guest wrote to transient disks, if that is still there.
        """
        self.demand_whole(uuid)
        self.begin(uuid, paused=paused, keep=keep)

    def begin(self, uuid: str, *, paused: bool = False, keep: bool = False) -> None:
        """As start(), for who has just made its disks whole."""
        with self.starting(uuid) as found:
            self.scratch.start(found, paused=paused, keep=keep)

    def restore(self, uuid: str, path: str) -> None:
        """Start an instance from a file of its memory, paused; raises as start()."""
        with self.starting(uuid):
            self.domains.restore_from(path)

    def demand_whole(self, uuid: str) -> None:
        """Raise InvalidState while its disks are not what a change makes of them.

        Raises NotEntitled, RecordMissing, too.
        """
        found = self.entitled(uuid)
        what = found.change.what if found.change else None
        if what is not None and what not in _WHOLE:
            raise errors.InvalidState(
                instance=uuid,
                host=self.name,
                state=what.value,
                reason="its snapshots are being changed, and that was cut short: "
                "`virtmigrate host settle` goes on with it",
            )

    def note_confirmed(self, uuid: str) -> None:
        """Note that an instance stays here, if the source of its move confirmed."""
        stored = self.instances.find(uuid)
        if stored is None or stored.body.state is not model.InstanceState.ARRIVED:
            return
        if stored.body.host == self.name:
            transfer = self.mailbox.transfers.find(stored.body.operation)
            state = transfer.body.state if transfer else None
            if state is model.TransferState.CONFIRMED:
                here = model.InstanceState.HERE
                self.publish_instance(msgspec.structs.replace(stored.body, state=here))

    def demand_settled(self, uuid: str) -> None:
        """Raise InvalidState while a move of the instance is open on this host.

        What is here may be the only copy, or what a revert needs.
        """
        self.note_confirmed(uuid)
        stored = self.instances.find(uuid)
        if stored is None or stored.body.host != self.name:
            return
        if stored.body.state in _OPEN:
            raise errors.InvalidState(
                instance=uuid,
                host=self.name,
                state=stored.body.state.value,
                reason=f"operation {stored.body.operation} is open; confirm or "
                "revert it first",
            )

    def remove_instance(self, uuid: str) -> None:
        """Remove an instance's volumes and its record; can be called again.

        Only with a record that it is here, and only volumes whose records name it
        as their owner; none that another host has taken over. Without a record, what it
        retired here when it moved away.
        """
        stored = self.instances.find(uuid)
        here = model.InstanceState.HERE
        if stored is None:
            self.forget_unborn(uuid)
            self._remove_retired(uuid)
        if stored is None or stored.body.host != self.name:
            # What was taken from this host has nothing here any more.
            self.tenures.renounce(uuid, self.up())
            return
        if stored.body.state is not here:
            return
        used = {ref.backend for ref in stored.body.disks}
        for backend in self.backends.values():
            # One that is down keeps what it may have only of those that name it.
            if backend.name not in self.down or backend.name in used or not used:
                self._drop_states(backend, stored.body)
                self._remove_volumes(backend, uuid)
        self.tenures.drop(uuid, used)
        self.instances.remove(uuid)

    def backend(self, name: str) -> base.Backend:
        """Return a backend by the name that a record gives it."""
        if name not in self.backends:
            raise errors.ConfigurationError(
                reason=f"host {self.name} has no backend {name}, and a record names it"
            )
        return self.backends[name]

    # Private

    @contextlib.contextmanager
    def starting(self, uuid: str) -> Iterator[model.Instance]:
        """Have the right to run an instance while it is started; raises as start()."""
        found = self.entitled(uuid)
        with self.tenures.starting(found, self.domains):
            yield found

    def _ensure(self, backend: base.Backend) -> bool:
        """Have a backend's pools; False, and a line in the log, when it is down."""
        try:
            backend.ensure()
        except (errors.StorageError, errors.LibvirtFailed) as e:
            if backend is self.files:
                raise
            self.note_down(backend, e)
            return False
        if self.down.pop(backend.name, None):
            LOG.info("host=%s backend=%s is back", self.name, backend.name)
        return True

    def _drop_states(self, backend: base.Backend, found: model.Instance) -> None:
        """Drop what a backend keeps of an instance's disks, which cannot go before."""
        if self.tenures.holder(backend, found.uuid) is not None:
            return
        for snapshot in found.snapshots:
            for disk in snapshot.disks:
                own = disk.place is snapshottree.Place.OWN
                if own and disk.backend == backend.name:
                    backend.drop_state(disk.volume, snapshot.id)

    def _remove_volumes(self, backend: base.Backend, uuid: str) -> None:
        holder = self.tenures.holder(backend, uuid)
        if holder is not None:
            LOG.warning("instance=%s is %s's now: its volumes stay", uuid, holder)
            return
        for name in backend.volumes.names():
            found = backend.volumes.find(name)
            if found is not None and found.body.owner == uuid:
                backend.remove(name)

    def _remove_retired(self, uuid: str) -> None:
        for backend in self.up():
            for volume in backend.retired(uuid):
                backend.remove(volume.name)
                LOG.info("instance=%s retired volume=%s removed", uuid, volume.name)

    def _file_backend(self) -> base.Backend:
        name = self.options.file_backend or next(iter(self.backends))
        chosen = self.backend(name)
        if not chosen.capabilities.files:
            raise errors.ConfigurationError(
                reason=f"file_backend = {name}: kind {chosen.kind} holds no files"
            )
        return chosen

    def _publish_card(self) -> None:
        with self.host.session("asking for its UUID") as session:
            uuid = card.host_uuid(session.conn.getCapabilities())
        ours = model.HostCard(
            host=self.name,
            uuid=uuid,
            release=__version__,
            records=record.READS,
            manifests=manifest.READS,
            tickets=TICKETS,
            backends=tuple(card.of(backend, self.files) for backend in self.up()),
            accepts_moves=self.options.accept_moves,
        )
        stored = self.mailbox.cards.find(mailbox.CARD)
        if stored is None or stored.body != ours:
            after = stored.generation if stored else 0
            self.mailbox.cards.publish(mailbox.CARD, ours, after=after)
            self.mailbox.cards.prune(mailbox.CARD)


def timeouts(conf: cfg.ConfigOpts) -> Timeouts:
    """Return the waits for a host's answers."""
    group = conf[options.GROUP]
    return Timeouts(connect=group.connect_timeout, call=group.call_timeout)
