# SPDX-License-Identifier: Apache-2.0
"""A new instance: its volumes from files, its record, its domain."""

import uuid as uuids
from dataclasses import dataclass
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import (
    domainxml,
    errors,
    filling,
    imagecache,
    model,
    node,
    placement,
    reading,
    sources,
)
from virtmigrate import transient as transients
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.migration.plan import NVRAM
from virtmigrate.model import InstanceState, Role, VolumeState
from virtmigrate.rollback import Rollback
from virtmigrate.units import round_up

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A new instance as the caller wants it. Sizes are bytes."""

    uuid: str
    name: str
    memory: int
    vcpus: int
    image: Path | sources.Source
    """A raw file, copied as it is and never looked into; or where an image comes
    from, that is cached and cloned."""
    root_size: int = 0
    """0: the image's size."""
    ephemeral_sizes: tuple[int, ...] = ()
    config_drive: Path | None = None
    """An image of a CD, read-only for the guest."""
    loader: str | None = None
    """UEFI firmware on the host; with it, nvram_template."""
    nvram_template: Path | None = None
    interfaces: tuple[domainxml.Interface, ...] = ()
    demand: placement.Demand = placement.ANY
    """What its disks ask of the backend that they come to."""
    transient: frozenset[str] = frozenset()
    """Targets of disks to which nothing is written for good."""
    owner: str = "virtmigrate"


class Spawner:
    """Makes instances on this host. Safe to share between threads."""

    def __init__(self, here: node.Node, caches: imagecache.Caches) -> None:
        self._here = here
        self._caches = caches

    def spawn(self, wanted: Wanted, *, power_on: bool = True) -> None:
        """Make the instance and start it.

        Raises InstanceExists. On failure nothing of it stays.
        """
        transients.demand(self._here, wanted.uuid, wanted.transient, _writable(wanted))
        with self._here.claimed(wanted.uuid):
            if self._here.domains.exists(wanted.uuid):
                raise errors.InstanceExists(
                    instance=wanted.uuid, host=self._here.name, reason="it has a domain"
                )
            if self._here.instances.find(wanted.uuid) is not None:
                raise errors.InstanceExists(
                    instance=wanted.uuid, host=self._here.name, reason="it has a record"
                )
            with Rollback() as undo:
                self._build(wanted, undo)
                if power_on:
                    self._here.start(wanted.uuid)
                undo.commit()
            LOG.info("instance=%s made on %s", wanted.uuid, self._here.name)

    def _build(self, wanted: Wanted, undo: Rollback) -> None:
        operation = uuids.uuid4().hex[:16]
        record = model.Instance(
            uuid=wanted.uuid,
            name=wanted.name,
            owner=wanted.owner,
            host=self._here.name,
            state=InstanceState.HERE,
            operation=operation,
            memory=wanted.memory,
            vcpus=wanted.vcpus,
            disks=(),
        )
        # First, so that destroy finds what a killed spawn left.
        undo.add("remove the instance's record", lambda: self._forget(wanted.uuid))
        self._here.publish_instance(record)
        disks = _Volumes(self._here, self._caches, wanted, operation, undo).make()
        disks = transients.marked(disks, wanted.transient)
        record = msgspec.structs.replace(record, disks=disks)
        self._here.publish_instance(record)
        used = {ref.backend for ref in disks}
        undo.add("let it go", lambda: self._here.tenures.drop(wanted.uuid, used))
        undo.add("undefine the domain", lambda: self._undefine(wanted.uuid))
        self._here.domains.define(domainxml.build(self._domain(wanted, record)))

    def _forget(self, uuid: str) -> None:
        self._here.instances.remove(uuid)

    def _undefine(self, uuid: str) -> None:
        self._here.domains.kill(uuid)
        self._here.domains.undefine(uuid)

    def _domain(self, wanted: Wanted, record: model.Instance) -> domainxml.Domain:
        options = self._here.options
        return domainxml.Domain(
            uuid=wanted.uuid,
            name=wanted.name,
            memory=wanted.memory,
            vcpus=wanted.vcpus,
            virt_type=options.virt_type,
            machine=options.machine_type,
            disks=tuple(self._disk(ref) for ref in record.disks if ref.target != NVRAM),
            interfaces=wanted.interfaces,
            firmware=self._firmware(wanted, record),
            console_log=f"{options.console_path}/virtmigrate-{wanted.uuid}.log",
            metadata={"owner": wanted.owner, "operation": record.operation},
        )

    def _disk(self, ref: model.DiskRef) -> domainxml.Disk:
        chain = self._here.backend(ref.backend).layers(ref.volume)
        if ref.role is Role.CONFIG:
            return domainxml.Disk(
                target=ref.target,
                chain=chain,
                bus="sata",
                device=domainxml.DiskDevice.CDROM,
                readonly=True,
            )
        order = 1 if ref.role is Role.ROOT else None
        return domainxml.Disk(target=ref.target, chain=chain, boot_order=order)

    def _firmware(
        self, wanted: Wanted, record: model.Instance
    ) -> domainxml.Firmware | None:
        if wanted.loader is None:
            return None
        for ref in record.disks:
            if ref.target == NVRAM:
                layers = self._here.backend(ref.backend).layers(ref.volume)
                return domainxml.Firmware(loader=wanted.loader, nvram=layers[0].source)
        return domainxml.Firmware(loader=wanted.loader, nvram=None)


class _Volumes:
    """The volumes of one new instance."""

    def __init__(
        self,
        here: node.Node,
        caches: imagecache.Caches,
        wanted: Wanted,
        operation: str,
        undo: Rollback,
    ) -> None:
        self._here = here
        self._caches = caches
        self._wanted = wanted
        self._operation = operation
        self._undo = undo
        sizes = (self._root_size(), *wanted.ephemeral_sizes)
        self._disks = placement.choose(here, wanted.demand, sum(sizes))

    def make(self) -> tuple[model.DiskRef, ...]:
        wanted = self._wanted
        refs = [self._root(wanted.image)]
        for number, size in enumerate(wanted.ephemeral_sizes):
            refs.append(self._empty(f"vd{chr(ord('b') + number)}", size))
        if wanted.config_drive:
            refs.append(self._filled("sda", Role.CONFIG, wanted.config_drive))
        if wanted.nvram_template:
            refs.append(self._filled(NVRAM, Role.NVRAM, wanted.nvram_template))
        return tuple(refs)

    # Private

    def _root(self, image: Path | sources.Source) -> model.DiskRef:
        if isinstance(image, Path):
            return self._filled("vda", Role.ROOT, image, self._wanted.root_size)
        backend = self._disks
        filler = filling.Filler(self._here, backend)

        def wanted(found: model.Volume) -> model.Volume:
            size = filling.aligned(backend, self._wanted.root_size or found.size)
            volume = self._volume(backend, "vda", Role.ROOT, size)
            filler.reserve(volume, self._undo)
            return volume

        with self._here.mover() as mover:
            cloned = self._caches.of(backend).clone(image, wanted, mover)
        return _ref(backend, "vda", filler.settle(cloned))

    def _empty(self, target: str, size: int) -> model.DiskRef:
        size = round_up(size, self._disks.granularity())
        volume = self._volume(self._disks, target, Role.EPHEMERAL, size)
        filling.Filler(self._here, self._disks).empty(volume, self._undo)
        return _ref(self._disks, target, volume)

    def _filled(
        self, target: str, role: Role, source: Path, size: int = 0
    ) -> model.DiskRef:
        """Make a volume from a file of this machine, read back and proven."""
        length = source.stat().st_size
        if size and size < length:
            raise errors.InvalidState(
                instance=self._wanted.uuid,
                host=self._here.name,
                state="not made",
                reason=f"{source} has {length} bytes, and {target} only {size}",
            )
        backend = self._disks if role is Role.ROOT else self._here.files
        size = filling.aligned(backend, size or length)
        volume = self._volume(backend, target, role, size)
        filling.Filler(self._here, backend).filled(
            volume, reading.FileSource(source, length), self._undo
        )
        return _ref(backend, target, volume)

    def _root_size(self) -> int:
        wanted = self._wanted
        if wanted.root_size or not isinstance(wanted.image, Path):
            return wanted.root_size
        return wanted.image.stat().st_size

    def _volume(
        self, backend: base.Backend, target: str, role: Role, size: int
    ) -> model.Volume:
        pool, name = backend.incoming, f"{target}.{self._operation}"
        return model.Volume(
            name=name,
            pool=pool.name,
            path=pool.volume_path(name),
            format=DiskFormat.RAW,
            role=role,
            size=size,
            state=VolumeState.INCOMPLETE,
            owner=self._wanted.uuid,
            operation=self._operation,
            origin=self._here.name,
        )


# Private


def _writable(wanted: Wanted) -> set[str]:
    """Return the targets of the disks that a guest will write to."""
    count = 1 + len(wanted.ephemeral_sizes)
    return {f"vd{chr(ord('a') + number)}" for number in range(count)}


def _ref(backend: base.Backend, target: str, volume: model.Volume) -> model.DiskRef:
    return model.DiskRef(
        target=target, volume=volume.name, backend=backend.name, role=volume.role
    )
