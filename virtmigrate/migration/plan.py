# SPDX-License-Identifier: Apache-2.0
"""All checks of a move, before anything is touched: one that cannot work costs
no downtime."""

import dataclasses
import time
import uuid as uuids

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, needs, node, peer
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.migration import inspection, landing, trees
from virtmigrate.model import InstanceState, Proof, Role, TransferState
from virtmigrate.peer import Peer
from virtmigrate.placement import ANY, Demand
from virtmigrate.reservation import sent_size
from virtmigrate.units import round_up

LOG = logging.getLogger(__name__)

NVRAM = inspection.NVRAM


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
    demand: Demand = ANY
    """What the disks ask of the peer's backend."""
    timeout: float = 60.0
    retry_interval: float = 10.0
    """Seconds, for the guest to shut down."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A move that can work."""

    original: model.Instance
    """Its record with all that is needed to put it back."""
    transfer: model.Transfer
    cards: dict[str, model.BackendCard]
    """The peer's backends that the volumes come to, by name."""


def make(
    here: node.Node, there: Peer, request: Request, operation: str | None = None
) -> Plan:
    """Check everything and return the plan.

    Arguments:
        operation: one whose copies at the peer are gone on with.

    Raises MigrationRefused; nothing was touched, but for a nonce that came and went.
    """
    try:
        return _Planner(here, there, request, operation).plan()
    except errors.MigrationRefused:
        raise
    except errors.Error as e:
        raise errors.MigrationRefused(instance=request.instance, reason=e) from e


# Private


_Key = tuple[str, str]
"""A volume of this host: its backend and its name, which is unique only there."""


class _Planner:
    def __init__(
        self, here: node.Node, there: Peer, request: Request, operation: str | None
    ) -> None:
        self._here = here
        self._there = there
        self._request = request
        self._operation = operation or uuids.uuid4().hex[:16]

    def plan(self) -> Plan:
        uuid = self._request.instance
        self._here.note_confirmed(uuid)
        record = self._here.entitled(uuid)
        self._check_arrival(uuid)
        if record.state is InstanceState.ARRIVED:
            raise self._refuse("the move that brought it is neither confirmed nor lost")
        original = inspection.inspect(self._here, record)
        card = self._check_peer(record, str(original.domain_xml))
        landings = landing.choose(
            self._here,
            self._there,
            record,
            card,
            self._request.demand,
            trees.memories(record),
        )
        trees.demand_movable(record, landings)
        transfer = self._transfer(record, landings)
        cards = {each.card.name: each.card for each in landings.values()}
        return Plan(original, transfer, cards)

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

    # The peer

    def _check_peer(self, record: model.Instance, xml: str) -> model.HostCard:
        card = self._there.card()
        peer.agree(card)
        if card.host != self._request.dest:
            # Under this name it would be let in nowhere: see tenure.py.
            raise self._refuse(
                f"the host at {self._request.dest} calls itself {card.host}: name it "
                "so, or change its option address"
            )
        cpu = domainxml.cpu_needed(xml)
        self._there.demand(
            needs.Needs(
                uuid=record.uuid,
                name=record.name,
                arch=domainxml.arch(xml),
                machine=domainxml.machine(xml),
                virt_type=domainxml.virt_type(xml),
                cpu_model=cpu.model if cpu else None,
            )
        )
        return card

    # What will be sent

    def _transfer(
        self, record: model.Instance, landings: dict[str, landing.Landing]
    ) -> model.Transfer:
        volumes: dict[_Key, model.TransferVolume] = {}
        for ref in record.disks:
            backend, there = self._here.backend(ref.backend), landings[ref.target]
            if there.shared:
                volume = self._shared(ref, backend, there.card)
                volumes[ref.backend, volume.source] = volume
            elif there.converted:
                volume = self._converted(ref, backend, there.card)
                volumes[ref.backend, volume.source] = volume
            else:
                self._add_chain(ref, backend, there.card, volumes)
        self._add_snapshots(record, landings, volumes)
        self._check_growth(volumes)
        return model.Transfer(
            operation=self._operation,
            request=self._request.request,
            instance=record.uuid,
            source=self._here.name,
            peer=self._request.dest,
            state=TransferState.RESERVED,
            generation=0,
            volumes=tuple(volumes.values()),
            created=time.time(),
        )

    def _add_snapshots(
        self,
        record: model.Instance,
        landings: dict[str, landing.Landing],
        volumes: dict[_Key, model.TransferVolume],
    ) -> None:
        """Add what snapshots hold, and no disk stands on; and files of memory."""
        for ref in (*trees.layers(record), *trees.memories(record)):
            if not landings[ref.target].shared:
                backend, card = self._here.backend(ref.backend), landings[ref.target]
                self._add_chain(ref, backend, card.card, volumes)

    def _add_chain(
        self,
        ref: model.DiskRef,
        backend: base.Backend,
        card: model.BackendCard,
        volumes: dict[_Key, model.TransferVolume],
    ) -> None:
        """Add a disk's layers from the lowest up; one that disks share goes once."""
        backing: str | None = None
        chain = backend.chain(ref.volume)
        for level, volume in reversed(list(enumerate(chain))):
            key = ref.backend, volume.name
            if key not in volumes:
                suffix = f"-{level}" if level else ""
                if ref.role is Role.LAYER:
                    suffix = f"-s{len(volumes)}"
                name = f"{ref.target}{suffix}.{self._operation}"
                sent = self._sent(ref, backend, card, volume, name, backing)
                volumes[key] = sent
            backing = volumes[key].name

    def _sent(
        self,
        ref: model.DiskRef,
        backend: base.Backend,
        card: model.BackendCard,
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
        grown = top and ref.role is not Role.LAYER
        size = self._new_size(ref, volume) if grown else volume.size
        if volume.format is DiskFormat.RAW:
            size = round_up(size, card.granularity)
        is_image = volume.role is Role.IMAGE and volume.proof is Proof.FULL
        below = Role.IMAGE if is_image else Role.LAYER
        sent = model.TransferVolume(
            name=name,
            backend=card.name,
            source=volume.name,
            target=ref.target,
            role=ref.role if top else below,
            format=volume.format,
            size=size,
            length=length,
            room=0,
            backing=backing,
            grow=size > volume.size,
            # So that the peer can tell whether it has this image.
            digest=volume.digest if is_image and not top else None,
        )
        return msgspec.structs.replace(sent, room=max(size, sent_size(sent)))

    def _converted(
        self, ref: model.DiskRef, backend: base.Backend, card: model.BackendCard
    ) -> model.TransferVolume:
        """Plan that all a guest sees of a disk becomes one raw volume."""
        top = backend.chain(ref.volume)[0]
        size = round_up(self._new_size(ref, top), card.granularity)
        LOG.info(
            "operation=%s disk=%s becomes raw: what its guest writes to its top layer "
            "is sent when it is off",
            self._operation,
            ref.target,
        )
        return model.TransferVolume(
            name=f"{ref.target}.{self._operation}",
            backend=card.name,
            source=top.name,
            target=ref.target,
            role=ref.role,
            format=DiskFormat.RAW,
            size=size,
            length=top.size,
            room=size,
            grow=size > top.size,
        )

    def _shared(
        self, ref: model.DiskRef, backend: base.Backend, card: model.BackendCard
    ) -> model.TransferVolume:
        """Plan how a disk that both hosts see stays what it is until the confirm.

        By a layer over it, or as the backend keeps states itself. A transient one that
        could get a layer stays by itself, as does what the guest cannot write to.
        """
        top, can = backend.chain(ref.volume)[0], backend.capabilities
        lasting = not (ref.transient and can.overlays)
        changes = ref.role is not Role.CONFIG and lasting
        frozen = changes and can.overlays
        if not lasting and self._new_size(ref, top) > top.size:
            raise self._refuse(
                f"disk {ref.target} is transient and lies where both hosts see it, so "
                "that it cannot grow by a move: make it permanent first (`virtmigrate "
                "instance transient`)"
            )
        return model.TransferVolume(
            name=f"{ref.target}.{self._operation}" if frozen else top.name,
            backend=card.name,
            source=top.name,
            target=ref.target,
            role=ref.role,
            format=DiskFormat.QCOW2 if frozen else top.format,
            size=self._new_size(ref, top),
            length=top.size,
            room=0,
            backing=top.name if frozen else None,
            shared=True,
            kept=changes and not frozen,
            grow=changes and not frozen and self._new_size(ref, top) > top.size,
        )

    def _new_size(self, ref: model.DiskRef, volume: model.Volume) -> int:
        wanted = self._request.sizes.get(ref.role, volume.size)
        if wanted < volume.size:
            raise self._refuse(
                f"disk {ref.target} has {volume.size} bytes and cannot shrink to "
                f"{wanted}"
            )
        return wanted

    def _check_growth(self, volumes: dict[_Key, model.TransferVolume]) -> None:
        if any(v.grow and v.role is Role.NVRAM for v in volumes.values()):
            raise self._refuse("NVRAM cannot grow")
