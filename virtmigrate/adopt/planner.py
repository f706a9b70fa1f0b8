# SPDX-License-Identifier: Apache-2.0
"""What is to be recorded, and all that stands against it."""

import dataclasses
from collections.abc import Iterator
from pathlib import PurePath

from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, xml
from virtmigrate.adopt import checks, values
from virtmigrate.adopt.chains import Chain, Chains
from virtmigrate.adopt.pools import Pools
from virtmigrate.adopt.values import Adoption, Planned
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.instance import Power
from virtmigrate.migration.plan import NVRAM
from virtmigrate.model import Role

LOG = logging.getLogger(__name__)

OWNER = "virtmigrate"

_NOVA = "{http://openstack.org/xmlns/libvirt/nova/"
_TRANSIENT = "no persistent configuration"


class Planner:
    """Plans one adoption. One use, one thread."""

    def __init__(self, here: node.Node, uuid: str, given: values.Given) -> None:
        self._here = here
        self._uuid = uuid
        self._given = given
        self._backend: base.Backend = here.files
        self._pools = Pools(here.host)
        self._problems: list[str] = []
        self._xml = ""

    def plan(self) -> Adoption:
        """Return the plan; raise AdoptionRefused with all problems at once."""
        self._demand_new()
        self._xml = self._here.domains.xml(self._uuid)
        found = domainxml.read(self._xml)
        notes, owner = self._obstacles(), self._owner()
        chains = Chains(found, self._given)
        self._problems += chains.problems
        volumes, refs = self._volumes(found, chains.chains)
        self._problems += checks.problems(self._here, self._uuid, volumes)
        if self._problems:
            raise values.refused(self._here, self._uuid, self._problems)
        return Adoption(
            uuid=self._uuid,
            xml=self._xml,
            owner=owner,
            chains=chains.chains,
            volumes=tuple(self._placed(volume) for volume in volumes),
            refs=tuple(refs),
            notes=tuple(notes),
        )

    # The domain

    def _demand_new(self) -> None:
        try:
            stored = self._here.instances.find(self._uuid)
        except (errors.PoolNotFound, errors.RecordBroken):
            return
        if stored is not None:
            raise errors.InstanceExists(
                instance=self._uuid,
                host=self._here.name,
                reason=f"it has a record ({stored.body.state.value}, owner "
                f"{stored.body.owner}): there is nothing to adopt",
            )

    def _obstacles(self) -> list[str]:
        """Return what only forbids moves; what forbids adopting is a problem."""
        found = [
            *domainxml.obstacles(self._xml),
            *self._here.domains.burdens(self._uuid),
        ]
        hard = [each for each in found if each.startswith("disk ")]
        self._problems += hard
        if _TRANSIENT in found:
            self._problems.append(f"the domain has {_TRANSIENT}: define it first")
        return [each for each in found if each not in (*hard, _TRANSIENT)]

    def _owner(self) -> str:
        metadata = xml.parse(self._xml).iterfind("metadata/*")
        nova = any(str(each.tag).startswith(_NOVA) for each in metadata)
        if nova and self._given.owner is None:
            self._problems.append(
                "its metadata says that Nova made it: give --owner nova, so that only "
                "Nova's commands change it, or --owner virtmigrate if Nova let it go"
            )
        return self._given.owner or OWNER

    # Volumes

    def _volumes(
        self, found: domainxml.FoundDomain, chains: dict[str, Chain]
    ) -> tuple[list[Planned], list[model.DiskRef]]:
        volumes: list[Planned] = []
        refs = []
        root = _root(found)
        for disk in found.disks:
            chain = chains.get(disk.target)
            if chain:
                made = list(self._layers(disk.target, chain, _role(disk, root)))
                volumes += made
                refs.append(self._ref(disk.target, made[0]))
        if found.firmware and found.firmware.nvram:
            volumes.append(self._nvram(found.firmware.nvram))
            refs.append(self._ref(NVRAM, volumes[-1]))
        return volumes, refs

    def _layers(self, target: str, chain: Chain, role: Role) -> Iterator[Planned]:
        names = [*(PurePath(layer.source).name for layer in chain), None]
        for depth, layer in enumerate(chain):
            where = values.label(target, depth)
            if layer.type is not domainxml.SourceType.FILE:
                self._problems.append(
                    f"{where}: {layer.source} is no file; only files can be adopted"
                )
            shared = depth > 0 or role is Role.CONFIG
            mine = self._given.private_chain or not shared
            raw = layer.fmt is DiskFormat.RAW
            yield Planned(
                label=where,
                name=str(names[depth]),
                path=layer.source,
                format=layer.fmt,
                role=Role.LAYER if depth else role,
                owner=self._uuid if mine else "",
                size=None if raw else self._virtual_size(target, depth, layer),
                backing=names[depth + 1],
            )

    def _nvram(self, path: str) -> Planned:
        return Planned(
            label=NVRAM,
            name=PurePath(path).name,
            path=path,
            format=DiskFormat.RAW,
            role=Role.NVRAM,
            owner=self._uuid,
            size=None,
        )

    def _ref(self, target: str, top: Planned) -> model.DiskRef:
        return model.DiskRef(
            target=target, volume=top.name, backend=self._backend.name, role=top.role
        )

    # Sizes

    def _virtual_size(
        self, target: str, depth: int, layer: domainxml.Layer
    ) -> int | None:
        """Return a qcow2 layer's size: the operator's, a record's, a running QEMU's."""
        where = values.label(target, depth)
        if where in self._given.sizes:
            return self._given.sizes[where]
        recorded = checks.existing(self._backend, PurePath(layer.source).name)
        if recorded is not None and recorded.path == layer.source:
            return recorded.size
        told = self._running_size(target, layer) if depth == 0 else None
        if told is None:
            self._problems.append(
                f"{where}: the virtual size of {layer.source} is not known: no running "
                f"QEMU tells it, and headers are not read (say --size {where}=BYTES)"
            )
        return told

    def _running_size(self, target: str, layer: domainxml.Layer) -> int | None:
        """Return what the QEMU that has the disk open, as the XML says, sees."""
        power = self._here.domains.power(self._uuid)
        if power not in (Power.RUNNING, Power.PAUSED):
            return None
        with self._here.host.session("asking a disk's size") as session:
            domain = session.conn.lookupByUUIDString(self._uuid)
            for disk in domainxml.disks(domain.XMLDesc(0)):
                top = disk.chain[0] if disk.chain else None
                if disk.target != target or top is None:
                    continue
                if (top.source, top.fmt) == (layer.source, layer.fmt):
                    return int(domain.blockInfo(target, 0)[0])
        return None

    def _placed(self, volume: Planned) -> Planned:
        pool = self._pools.over(volume.directory)
        size = volume.size
        if pool and size is None:
            try:
                size = self._backend.pool(pool).physical(volume.name)
            except errors.VolumeNotFound:
                LOG.debug("volume=%s is not in pool %s", volume.name, pool)
        return dataclasses.replace(volume, pool=pool, size=size)


# Private


def _root(found: domainxml.FoundDomain) -> str | None:
    """Return the target of the disk that the guest boots from."""
    disks = [d for d in found.disks if d.device == "disk" and not d.readonly]
    ordered = sorted(
        enumerate(disks), key=lambda pair: (pair[1].boot_order or 999, pair[0])
    )
    return ordered[0][1].target if ordered else None


def _role(disk: domainxml.FoundDisk, root: str | None) -> Role:
    if disk.device == domainxml.DiskDevice.CDROM and disk.readonly:
        return Role.CONFIG
    return Role.ROOT if disk.target == root else Role.DATA
