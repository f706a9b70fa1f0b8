# SPDX-License-Identifier: Apache-2.0
"""Doing what is planned, step by step; every step adds its undoing."""

import dataclasses
import uuid as uuids

import libvirt
import msgspec

from virtmigrate import domainxml, errors, model, node
from virtmigrate.adopt import checks, values
from virtmigrate.adopt.pools import Pools
from virtmigrate.adopt.values import Adoption, Planned
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.model import InstanceState, VolumeState
from virtmigrate.rollback import Rollback


class Run:
    """Does what is planned; every step adds its undoing."""

    def __init__(self, here: node.Node, planned: Adoption, undo: Rollback) -> None:
        self._here = here
        self._planned = planned
        self._undo = undo
        self._backend: base.Backend = here.files
        self._pools = Pools(here.host)
        self._operation = uuids.uuid4().hex[:16]

    def run(self) -> Adoption:
        volumes = self._measured()
        for volume in reversed(volumes):
            self._record(volume)
        self._define()
        made = self._instance()
        self._hold(made)
        self._here.publish_instance(made)
        return dataclasses.replace(self._planned, volumes=volumes)

    def _measured(self) -> tuple[Planned, ...]:
        """Make the pools; return the volumes with all sizes. All must be there."""
        measured, missing = [], []
        for volume in self._planned.volumes:
            pool = self._pool(volume.directory)
            try:
                length = self._backend.pool(pool).physical(volume.name)
            except errors.VolumeNotFound:
                missing.append(f"{volume.label}: there is no file {volume.path}")
                continue
            raw = volume.format is DiskFormat.RAW
            size = length if raw else volume.size
            measured.append(dataclasses.replace(volume, pool=pool, size=size))
        if missing:
            raise values.refused(self._here, self._planned.uuid, missing)
        return tuple(measured)

    def _pool(self, directory: str) -> str:
        found = self._pools.over(directory)
        if found is not None:
            return found
        self._undo.add("remove the pool", lambda: self._pools.remove(directory))
        return self._pools.make(directory)

    def _record(self, volume: Planned) -> None:
        found = checks.existing(self._backend, volume.name)
        wanted = model.Volume(
            name=volume.name,
            pool=str(volume.pool),
            path=volume.path,
            format=volume.format,
            role=volume.role,
            size=int(volume.size or 0),
            state=VolumeState.USABLE,
            owner=volume.owner,
            operation=self._operation,
            origin=self._here.name,
            backing=volume.backing,
        )
        if found is None:
            name = volume.name
            self._undo.add(f"forget {name}", lambda: self._backend.volumes.remove(name))
        elif msgspec.structs.replace(found, operation=self._operation) == wanted:
            return
        elif not found.owner:
            # Other instances stand on it, as it is recorded.
            return
        self._backend.update(wanted)

    def _define(self) -> None:
        """Write full chains and our metadata into the domain's configuration."""
        planned, domains = self._planned, self._here.domains
        values = {"owner": planned.owner, "operation": self._operation}
        text = domainxml.with_disks(planned.xml, planned.chains)
        self._undo.add("redefine the domain", lambda: domains.define(planned.xml))
        domains.define(domainxml.with_metadata(text, values))
        with self._here.host.session("writing its metadata") as session:
            domain = session.conn.lookupByUUIDString(planned.uuid)
            if domain.isActive():
                domain.setMetadata(
                    libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                    domainxml.metadata_element(values),
                    domainxml.METADATA_PREFIX,
                    domainxml.METADATA_URI,
                    libvirt.VIR_DOMAIN_AFFECT_LIVE,
                )

    def _hold(self, made: model.Instance) -> None:
        """Keep other hosts that see its disks from starting it."""
        domains, tenures = self._here.domains, self._here.tenures
        used = {ref.backend for ref in made.disks}
        if tenures.concern(made):
            self._undo.add("let it go", lambda: tenures.drop(made.uuid, used))
            with tenures.starting(made, domains):
                """It may run already."""

    def _instance(self) -> model.Instance:
        found = domainxml.read(self._planned.xml)
        return model.Instance(
            uuid=self._planned.uuid,
            name=found.name,
            owner=self._planned.owner,
            host=self._here.name,
            state=InstanceState.HERE,
            operation=self._operation,
            memory=found.memory,
            vcpus=found.vcpus,
            disks=self._planned.refs,
            power=self._here.domains.power(self._planned.uuid).value,
            autostart=self._here.domains.autostart(self._planned.uuid),
        )
