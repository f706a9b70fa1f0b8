# SPDX-License-Identifier: Apache-2.0
"""All checks of a live move, before anything is touched."""

import dataclasses
import time
import uuid as uuids

import msgspec

from virtmigrate import domainxml, errors, model, needs, node, peer
from virtmigrate.formats import DiskFormat
from virtmigrate.host import Host
from virtmigrate.instance import Power
from virtmigrate.livemigration import compatibility, domains
from virtmigrate.migration import inspection, landing, trees
from virtmigrate.model import InstanceState, TransferState
from virtmigrate.units import round_up

_SAFE = ("none", "directsync")
"""Cache modes by which nothing of a disk is in this host's memory only."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A live move that can work."""

    original: model.Instance
    """Its record with all that is needed to put it back."""
    transfer: model.Transfer
    cards: dict[str, model.BackendCard]
    """The peer's backends that volumes come to, by name."""


class Planner:
    """Plans one live move.

    Arguments:
        there: the peer, as a source of moves sees it.
        host: its libvirtd that runs guests.
        dest: what the caller calls it.
    """

    def __init__(
        self, here: node.Node, there: peer.Peer, host: Host, uuid: str, dest: str
    ) -> None:
        self._here = here
        self._there = there
        self._host = host
        self._uuid = uuid
        self._dest = dest

    def plan(self, request: str = "-") -> Plan:
        """Return the plan; MigrationRefused: nothing was touched."""
        try:
            return self._plan(request)
        except errors.MigrationRefused:
            raise
        except errors.Error as e:
            raise self._refused(str(e)) from e

    # Private

    def _refused(self, reason: str) -> errors.MigrationRefused:
        return errors.MigrationRefused(instance=self._uuid, reason=reason)

    def _plan(self, request: str) -> Plan:
        here, uuid = self._here, self._uuid
        if self._dest == here.name:
            raise self._refused("it is on that host")
        here.note_confirmed(uuid)
        record = here.entitled(uuid)
        if record.state is InstanceState.ARRIVED:
            raise self._refused(
                "the move that brought it is neither confirmed nor lost"
            )
        inspection.demand_free(here, record)
        if thrown := [ref.target for ref in record.disks if ref.transient]:
            raise self._refused(
                f"{', '.join(thrown)} is transient: what its guest wrote there does "
                "not go along. Only a cold move takes it, which drops that"
            )
        original = inspection.inspect(here, record)
        if original.power == Power.OFF.value:
            raise self._refused("it is off: only a cold move takes it")
        live = domains.Domains(here.host).migratable_xml(uuid)
        card = self._check_peer(record, live)
        landings = landing.choose(
            here, self._there, record, card, memories=trees.memories(record)
        )
        trees.demand_movable(record, landings)
        self._check_disks(record, landings, live)
        transfer = self._transfer(original, landings, live, request)
        cards = {each.card.name: each.card for each in landings.values()}
        return Plan(original, transfer, cards)

    def _check_peer(self, record: model.Instance, live: str) -> model.HostCard:
        card = self._there.card()
        peer.agree(card)
        if card.host != self._dest:
            raise self._refused(f"the host at {self._dest} calls itself {card.host}")
        if not card.live:
            raise self._refused(f"release {card.release} there knows no live moves")
        cpu = domainxml.cpu_needed(str(self._here.domains.xml(record.uuid)))
        self._there.demand(
            needs.Needs(
                uuid=record.uuid,
                name=record.name,
                arch=domainxml.arch(live),
                machine=domainxml.machine(live),
                virt_type=domainxml.virt_type(live),
                cpu_model=cpu.model if cpu else None,
            )
        )
        found = compatibility.obstacles(self._here.host, self._host, live)
        if found:
            raise self._refused("; ".join(found))
        return card

    def _check_disks(
        self,
        record: model.Instance,
        landings: dict[str, landing.Landing],
        live: str,
    ) -> None:
        found = {disk.target: disk for disk in domainxml.disks(live)}
        for ref in record.disks:
            is_shared = landings[ref.target].shared
            disk = found.get(ref.target)
            if disk is None:
                raise self._refused(f"{ref.target} is no disk: only cold moves take it")
            cache = disk.cache or "default"
            if is_shared and not disk.readonly and cache not in _SAFE:
                raise self._refused(
                    f"disk {ref.target} has cache = {cache}: what this host has not "
                    f"written yet the peer would not see; use {' or '.join(_SAFE)}"
                )
            if not is_shared and disk.readonly:
                raise self._refused(f"{ref.target} is read-only, and not seen there")
            if not is_shared and record.snapshots:
                raise self._refused(
                    f"{ref.target} is not seen there, and has snapshots: only a cold "
                    "move takes them along"
                )

    # What is to be there

    def _transfer(
        self,
        original: model.Instance,
        landings: dict[str, landing.Landing],
        live: str,
        request: str,
    ) -> model.Transfer:
        operation = uuids.uuid4().hex[:16]
        volumes = tuple(
            self._volume(ref, landings[ref.target], operation) for ref in original.disks
        )
        return model.Transfer(
            operation=operation,
            request=request,
            instance=original.uuid,
            source=self._here.name,
            peer=self._dest,
            state=TransferState.RESERVED,
            generation=1,
            volumes=volumes,
            created=time.time(),
            record=self._at_peer(original, volumes, operation),
            live=model.Live(xml=live),
        )

    def _volume(
        self, ref: model.DiskRef, there: landing.Landing, operation: str
    ) -> model.TransferVolume:
        top = self._here.backend(ref.backend).chain(ref.volume)[0]
        if there.shared:
            return model.TransferVolume(
                name=top.name,
                backend=there.card.name,
                source=top.name,
                target=ref.target,
                role=ref.role,
                format=top.format,
                size=top.size,
                length=top.size,
                room=0,
                backing=top.backing,
                shared=True,
            )
        size = round_up(top.size, there.card.granularity)
        return model.TransferVolume(
            name=f"{ref.target}.{operation}",
            backend=there.card.name,
            source=top.name,
            target=ref.target,
            role=ref.role,
            format=DiskFormat.RAW,
            size=size,
            length=size,
            room=size,
        )

    def _at_peer(
        self,
        original: model.Instance,
        volumes: tuple[model.TransferVolume, ...],
        operation: str,
    ) -> model.Instance:
        pairs = list(zip(original.disks, volumes, strict=True))
        disks = tuple(
            msgspec.structs.replace(ref, volume=each.name, backend=each.backend)
            for ref, each in pairs
        )
        # A tree goes along only where all of it is shared.
        backends = {ref.backend: each.backend for ref, each in pairs if each.shared}
        return msgspec.structs.replace(
            original,
            disks=disks,
            snapshots=trees.at_peer(original.snapshots, {}, backends),
            operation=operation,
            peer=self._here.name,
        )
