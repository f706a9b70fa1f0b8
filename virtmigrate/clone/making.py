# SPDX-License-Identifier: Apache-2.0
"""One clone, from its record to a guest that stands still off every network.

The record comes first and says that it is being made, so that whatever is killed is
found by it. On failure the caller undoes all of it by that record.
"""

import dataclasses
import random
import time

import msgspec
from oslo_log import log as logging

from virtmigrate import domainstate, domainxml, errors, filling, model, node
from virtmigrate.clone import apart, configuration
from virtmigrate.clone.memory import Memory, text_of, with_text
from virtmigrate.clone.terms import New
from virtmigrate.domainxml import Interface
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Cloned, CloneState, Role, VolumeState
from virtmigrate.rollback import Rollback
from virtmigrate.snapshottree import FrozenDisk, Snapshot

LOG = logging.getLogger(__name__)

_RANDOM = random.SystemRandom()


@dataclasses.dataclass(frozen=True)
class Twin:
    """One clone, with all that was decided of it before anything is made."""

    new: New
    operation: str
    """The end of its volumes' names."""
    interfaces: tuple[Interface, ...]
    """Where it is plugged in when it is somebody else, in the order of the source's."""
    macs: dict[str, str]
    """By the source's, in lower case."""


class Making:
    """Makes clones of one snapshot. The caller has claimed all that it works on.

    Arguments:
        source: the record of the instance that the snapshot is of.
        snapshot: its frozen disks are what clones stand on.
    """

    def __init__(
        self,
        here: node.Node,
        held: apart.Apart,
        source: model.Instance,
        snapshot: Snapshot,
        *,
        is_live: bool,
    ) -> None:
        self._here = here
        self._apart = held
        self._states = domainstate.States(here.host)
        self._source = source
        self._snapshot = snapshot
        self._is_live = is_live

    def prepare(self, twin: Twin) -> None:
        """Make record, disks and domain of a clone, which nobody can start.

        Raises InstanceExists: nothing was made.
        """
        uuid = twin.new.uuid
        self._demand_new(twin)
        record = self._record(twin)
        self._here.publish_instance(record)
        disks = tuple(self._disk(twin, ref) for ref in self._source.disks)
        self._here.publish_instance(msgspec.structs.replace(record, disks=disks))
        text = self._text(self._snapshot.domain_xml, twin, disks)
        self._states.define(text)
        LOG.debug("clone=%s of instance=%s defined", uuid, self._source.uuid)

    def restore(self, twin: Twin, memory: Memory, head: bytes) -> None:
        """Start a clone from its source's memory: its CPUs stand still, its links are
        down.

        Arguments:
            head: what the memory's head was; it is the clone's afterwards.
        """
        uuid = twin.new.uuid
        record = self._here.instances.read(uuid).body
        text = self._text(text_of(head), twin, record.disks)
        memory.write(with_text(head, text))
        with self._here.starting(uuid):
            self._states.restore_from(memory.path)
        self._apart.hold(uuid)

    # Private

    def _demand_new(self, twin: Twin) -> None:
        uuid = twin.new.uuid
        taken = dict(self._states.all())
        reason = ""
        if uuid in taken:
            reason = "it has a domain"
        elif self._here.instances.find(uuid) is not None:
            reason = "it has a record"
        elif twin.new.name in taken.values():
            reason = f"a domain is called {twin.new.name}"
        if reason:
            raise errors.InstanceExists(
                instance=uuid, host=self._here.name, reason=reason
            )

    def _record(self, twin: Twin) -> model.Instance:
        return model.Instance(
            uuid=twin.new.uuid,
            name=twin.new.name,
            owner=self._source.owner,
            host=self._here.name,
            state=model.InstanceState.HERE,
            operation=twin.operation,
            memory=self._source.memory,
            vcpus=self._source.vcpus,
            disks=(),
            cloned=Cloned(
                source=self._source.uuid,
                operation=twin.operation,
                state=CloneState.MAKING,
                live=self._is_live,
                created=time.time(),
            ),
        )

    def _disk(self, twin: Twin, ref: model.DiskRef) -> model.DiskRef:
        frozen = {each.target: each for each in self._snapshot.disks}
        if ref.target in frozen:
            volume = self._layer(twin, ref, frozen[ref.target])
        else:
            volume = self._copy(twin, ref)
        return msgspec.structs.replace(ref, volume=volume.name)

    def _layer(
        self, twin: Twin, ref: model.DiskRef, frozen: FrozenDisk
    ) -> model.Volume:
        backend = self._here.backend(frozen.backend)
        below = backend.volumes.read(frozen.volume).body
        name = f"{ref.target}.{twin.operation}"
        pool = backend.pool(below.pool)
        layer = self._volume(twin, name, pool.name, pool.volume_path(name))
        layer = msgspec.structs.replace(
            layer,
            format=DiskFormat.QCOW2,
            role=ref.role,
            size=below.size,
            backing=below.name,
        )
        made = backend.overlay(layer, below)
        durable = backend.persist(made.pool, made.name)
        return backend.update(
            msgspec.structs.replace(made, state=VolumeState.USABLE, durable=durable)
        )

    def _copy(self, twin: Twin, ref: model.DiskRef) -> model.Volume:
        """Copy what the guest cannot write to."""
        backend = self._here.backend(ref.backend)
        source = backend.volumes.read(ref.volume).body
        name, pool = f"{ref.target}.{twin.operation}", backend.incoming
        volume = self._volume(twin, name, pool.name, pool.volume_path(name))
        volume = msgspec.structs.replace(volume, role=ref.role, size=source.size)
        filler = filling.Filler(self._here, backend)
        with self._here.mover() as mover, Rollback() as undo:
            filler.reserve(volume, undo)
            made = filler.settle(backend.copy(source, volume, mover))
            undo.commit()
        return made

    def _volume(self, twin: Twin, name: str, pool: str, path: str) -> model.Volume:
        return model.Volume(
            name=name,
            pool=pool,
            path=path,
            format=DiskFormat.RAW,
            role=Role.DATA,
            size=0,
            state=VolumeState.INCOMPLETE,
            owner=twin.new.uuid,
            operation=twin.operation,
            origin=self._here.name,
        )

    def _text(self, text: str, twin: Twin, disks: tuple[model.DiskRef, ...]) -> str:
        options = self._here.options
        known = {disk.target for disk in domainxml.disks(text) if disk.chain}
        found = configuration.Twin(
            source=self._source.uuid,
            uuid=twin.new.uuid,
            name=twin.new.name,
            chains={
                ref.target: self._here.backend(ref.backend).layers(ref.volume)
                for ref in disks
                if ref.target in known
            },
            macs=twin.macs,
            devices=dict(
                zip(twin.macs, (each.device for each in twin.interfaces), strict=True)
            ),
            console_log=f"{options.console_path}/virtmigrate-{twin.new.uuid}.log",
            metadata={
                "owner": self._source.owner,
                "operation": twin.operation,
                "clone-of": self._source.uuid,
            },
        )
        return configuration.as_twin(text, found, self._apart.network)


def twin(new: New, operation: str, source: tuple[Interface, ...]) -> Twin:
    """Return a clone whose interfaces are those asked for, or the source's with MACs
    of their own.

    Arguments:
        source: the source's interfaces; there are as many in `new`, or none.
    """
    wanted = new.interfaces or tuple(
        dataclasses.replace(each, mac=_mac(), device=None) for each in source
    )
    ends = tuple(
        dataclasses.replace(end, mac=end.mac.lower(), mtu=end.mtu or each.mtu)
        for end, each in zip(wanted, source, strict=True)
    )
    macs = {each.mac.lower(): end.mac for each, end in zip(source, ends, strict=True)}
    return Twin(new, operation, ends, macs)


# Private


def _mac() -> str:
    """Return a MAC of those that QEMU's guests have."""
    tail = (_RANDOM.randrange(256) for _ in range(3))
    return ":".join(["52:54:00", *(f"{each:02x}" for each in tail)])
