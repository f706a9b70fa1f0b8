# SPDX-License-Identifier: Apache-2.0
"""All checks of a move, before anything is touched: one that cannot work costs
no downtime."""

import dataclasses
import time
import uuid as uuids

import msgspec

from virtmigrate import domainxml, errors, model, node, peer
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.model import InstanceState, Role, TransferState
from virtmigrate.peer import Peer, sent_size

MOVABLE = (Power.RUNNING, Power.PAUSED, Power.OFF)

NVRAM = "nvram"
"""Target of the reference to the UEFI variables, which are no disk."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the caller wants; None leaves a thing as it is."""

    instance: str
    dest: str
    request: str = "-"
    """The caller's id of its request, for logs and records."""
    memory: int | None = None
    vcpus: int | None = None
    sizes: dict[Role, int] = dataclasses.field(default_factory=dict)
    """New sizes in bytes of the disks of a role; disks never shrink."""
    timeout: float = 60.0
    retry_interval: float = 10.0
    """Seconds, for the guest to shut down."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A move that can work."""

    original: model.Instance
    """Its record with all that is needed to put it back."""
    transfer: model.Transfer
    card: model.BackendCard
    """The peer's backend."""
    backend: base.Backend
    """Ours."""


def make(here: node.Node, there: Peer, request: Request) -> Plan:
    """Check everything and return the plan.

    Raises MigrationRefused; nothing was touched, but for a nonce that came and went.
    """
    try:
        return _Planner(here, there, request).plan()
    except errors.MigrationRefused:
        raise
    except errors.Error as e:
        raise errors.MigrationRefused(instance=request.instance, reason=e) from e


# Private


class _Planner:
    def __init__(self, here: node.Node, there: Peer, request: Request) -> None:
        self._here = here
        self._there = there
        self._request = request
        self._operation = uuids.uuid4().hex[:16]

    def plan(self) -> Plan:
        uuid = self._request.instance
        self._here.note_confirmed(uuid)
        record = self._here.entitled(uuid)
        self._check_arrival(uuid)
        if record.state is InstanceState.ARRIVED:
            raise self._refuse("the move that brought it is neither confirmed nor lost")
        xml = self._here.domains.xml(uuid)
        power = self._check_domain(uuid, xml)
        backend = self._backend(record)
        self._check_disks(record, backend, xml)
        card = self._check_peer(record, xml)
        landing = self._landing(record, backend, card)
        transfer = self._transfer(record, backend, *landing)
        original = msgspec.structs.replace(
            record,
            domain_xml=xml,
            power=power.value,
            autostart=self._here.domains.autostart(uuid),
        )
        return Plan(original, transfer, landing[0], backend)

    def _refuse(self, reason: str) -> errors.MigrationRefused:
        return errors.MigrationRefused(instance=self._request.instance, reason=reason)

    # This host

    def _check_arrival(self, uuid: str) -> None:
        """See that nobody may take it back from here."""
        for stored in self._here.mailbox.open_transfers():
            state = stored.body.state
            if stored.body.instance == uuid and state in peer.HELD:
                raise self._refuse(
                    f"its move from {stored.body.source} (operation {stored.name}) "
                    "is neither confirmed nor reverted"
                )

    def _check_domain(self, uuid: str, xml: str) -> Power:
        found = [*domainxml.obstacles(xml), *self._here.domains.burdens(uuid)]
        if found:
            raise self._refuse("it cannot be carried: " + "; ".join(found))
        power = self._here.domains.power(uuid)
        if power not in MOVABLE:
            raise self._refuse(f"it is {power.value}")
        return power

    def _backend(self, record: model.Instance) -> base.Backend:
        names = {ref.backend for ref in record.disks}
        if len(names) != 1:
            raise self._refuse(f"its disks lie in {len(names)} backends")
        return self._here.backend(names.pop())

    def _check_disks(
        self, record: model.Instance, backend: base.Backend, xml: str
    ) -> None:
        """See that the domain uses what the records say, all of it, and no more."""
        recorded = {ref.target: ref for ref in record.disks}
        for disk in domainxml.disks(xml):
            if not disk.chain:
                continue
            ref = recorded.pop(disk.target, None)
            if ref is None:
                raise self._refuse(f"disk {disk.target} has no record")
            top = backend.layers(ref.volume)[0]
            found = disk.chain[0]
            if (found.source, found.fmt) != (top.source, top.fmt):
                raise self._refuse(
                    f"disk {disk.target} is {found.source} as {found.fmt}, and its "
                    f"record says {top.source} as {top.fmt}"
                )
        self._check_nvram(recorded.pop(NVRAM, None), backend, xml)
        if recorded:
            raise self._refuse(f"the domain has no disk {', '.join(recorded)}")

    def _check_nvram(
        self, ref: model.DiskRef | None, backend: base.Backend, xml: str
    ) -> None:
        firmware = domainxml.firmware(xml)
        path = firmware.nvram if firmware else None
        recorded = backend.layers(ref.volume)[0].source if ref else None
        if path != recorded:
            raise self._refuse(f"its NVRAM is {path}, and its record says {recorded}")

    # The peer

    def _check_peer(self, record: model.Instance, xml: str) -> model.HostCard:
        card = self._there.card()
        peer.agree(card)
        cpu = domainxml.cpu_needed(xml)
        self._there.demand(
            peer.Needs(
                uuid=record.uuid,
                name=record.name,
                arch=domainxml.arch(xml),
                machine=domainxml.machine(xml),
                virt_type=domainxml.virt_type(xml),
                cpu_model=cpu.model if cpu else None,
            )
        )
        return card

    def _landing(
        self, record: model.Instance, backend: base.Backend, card: model.HostCard
    ) -> tuple[model.BackendCard, bool]:
        """Return the peer's backend for the disks, and whether it is this one.

        A volume with a name that only we know, made here, is looked for there:
        paths, names and ids prove nothing.
        """
        records = backend.volumes.pool
        with backend.disks.nonce() as nonce, records.nonce() as note:
            for each in card.backends:
                seen = self._there.sees(each.disks, nonce)
                if seen != self._there.sees(each.records, note):
                    raise self._refuse(
                        f"backend {each.name} of {card.host} shares "
                        f"{'disks' if seen else 'records'} with {backend.name}, and "
                        "not both"
                    )
                if seen:
                    return each, self._all_in(backend, record)
        ranked = sorted(card.backends, key=lambda each: each.name != backend.name)
        if not ranked:
            raise self._refuse(f"host {card.host} has no backend")
        return ranked[0], False

    def _all_in(self, backend: base.Backend, record: model.Instance) -> bool:
        """Tell whether all volumes lie in the pool that was proven.

        Others, adopted ones, are copied: that is right wherever they lie.
        """
        chains = [
            backend.chain(ref.volume) for ref in record.disks if ref.target != NVRAM
        ]
        return all(v.pool == backend.disks.name for chain in chains for v in chain)

    # What will be sent

    def _transfer(
        self,
        record: model.Instance,
        backend: base.Backend,
        card: model.BackendCard,
        shared: bool,
    ) -> model.Transfer:
        volumes: dict[str, model.TransferVolume] = {}
        for ref in record.disks:
            if shared and ref.target != NVRAM:
                volume = self._shared(ref, backend)
                volumes[volume.source] = volume
            else:
                self._add_chain(ref, backend, volumes)
        self._check_growth(volumes)
        return model.Transfer(
            operation=self._operation,
            request=self._request.request,
            instance=record.uuid,
            source=self._here.name,
            peer=self._request.dest,
            state=TransferState.RESERVED,
            generation=0,
            backend=card.name,
            volumes=tuple(volumes.values()),
            created=time.time(),
        )

    def _add_chain(
        self,
        ref: model.DiskRef,
        backend: base.Backend,
        volumes: dict[str, model.TransferVolume],
    ) -> None:
        """Add a disk's layers from the lowest up; one that disks share goes once."""
        backing: str | None = None
        chain = backend.chain(ref.volume)
        for level, volume in reversed(list(enumerate(chain))):
            if volume.name not in volumes:
                suffix = f"-{level}" if level else ""
                name = f"{ref.target}{suffix}.{self._operation}"
                sent = self._sent(ref, backend, volume, name, backing)
                volumes[volume.name] = sent
            backing = volumes[volume.name].name

    def _sent(
        self,
        ref: model.DiskRef,
        backend: base.Backend,
        volume: model.Volume,
        name: str,
        backing: str | None,
    ) -> model.TransferVolume:
        length = backend.pool(volume.pool).physical(volume.name)
        if volume.format is DiskFormat.RAW and length != volume.size:
            raise self._refuse(
                f"volume {volume.name} has {length} bytes, and its record says "
                f"{volume.size}"
            )
        top = volume.name == ref.volume
        size = self._new_size(ref, volume) if top else volume.size
        sent = model.TransferVolume(
            name=name,
            source=volume.name,
            target=ref.target,
            role=ref.role if top else Role.LAYER,
            format=volume.format,
            size=size,
            length=length,
            room=0,
            backing=backing,
            grow=size > volume.size,
        )
        return msgspec.structs.replace(sent, room=max(size, sent_size(sent)))

    def _shared(
        self, ref: model.DiskRef, backend: base.Backend
    ) -> model.TransferVolume:
        """Plan a layer over a disk that both hosts see: below it nothing changes."""
        top = backend.chain(ref.volume)[0]
        frozen = ref.role is not Role.CONFIG
        if frozen and not backend.capabilities.overlays:
            raise self._refuse(
                f"backend {backend.name} is shared and cannot keep {ref.target} as "
                "it is until the move is confirmed"
            )
        return model.TransferVolume(
            name=f"{ref.target}.{self._operation}" if frozen else top.name,
            source=top.name,
            target=ref.target,
            role=ref.role,
            format=DiskFormat.QCOW2 if frozen else top.format,
            size=self._new_size(ref, top),
            length=0,
            room=0,
            backing=top.name if frozen else None,
            shared=True,
        )

    def _new_size(self, ref: model.DiskRef, volume: model.Volume) -> int:
        wanted = self._request.sizes.get(ref.role, volume.size)
        if wanted < volume.size:
            raise self._refuse(
                f"disk {ref.target} has {volume.size} bytes and cannot shrink to "
                f"{wanted}"
            )
        return wanted

    def _check_growth(self, volumes: dict[str, model.TransferVolume]) -> None:
        if any(v.grow and v.role is Role.NVRAM for v in volumes.values()):
            raise self._refuse("NVRAM cannot grow")
