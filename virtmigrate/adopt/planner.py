# SPDX-License-Identifier: Apache-2.0
class _Planner:
    """Finds out what is to be recorded, and all that stands against it."""

    def __init__(self, here: node.Node, uuid: str, given: Given) -> None:
        self._here = here
        self._uuid = uuid
        self._given = given
        self._backend: base.Backend = here.files
        self._pools = Pools(here.host)
        self._problems: list[str] = []
        self._xml = ""

    def plan(self) -> Adoption:
        self._demand_new()
        self._xml = self._here.domains.xml(self._uuid)
        found = domainxml.read(self._xml)
        notes = self._obstacles()
        chains = {disk.target: self._chain(disk) for disk in found.disks if disk.chain}
        self._check_given(found, chains)
        volumes, refs = self._volumes(found, chains)
        self._check_volumes(volumes)
        owner = self._owner()
        if self._problems:
            raise refused(self._here, self._uuid, self._problems)
        return Adoption(
            uuid=self._uuid,
            xml=self._xml,
            owner=owner,
            chains=chains,
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
        found = domainxml.obstacles(self._xml)
        disks = [each for each in found if each.startswith("disk ")]
        self._problems += disks
        burdens = self._here.domains.burdens(self._uuid)
        transient = "no persistent configuration"
        if transient in burdens:
            self._problems.append(f"the domain has {transient}: define it first")
        return [each for each in (*found, *burdens) if each not in self._problems]

    def _owner(self) -> str:
        nova = any(
            each.tag.startswith(f"{{{_NOVA}")
            for each in xml.parse(self._xml).iterfind("metadata/*")
        )
        if nova and self._given.owner is None:
            self._problems.append(
                "its metadata says that Nova made it: give --owner nova, so that only "
                "Nova's commands change it, or --owner virtmigrate if Nova let it go"
            )
        return self._given.owner or OWNER

    # Volumes

    def _volumes(
        self,
        found: domainxml.FoundDomain,
        chains: Mapping[str, tuple[domainxml.Layer, ...]],
    ) -> tuple[list[Planned], list[model.DiskRef]]:
        volumes: list[Planned] = []
        refs = []
        root = _root(found)
        for disk in found.disks:
            chain = chains.get(disk.target)
            if chain:
                role = _role(disk, root)
                made = list(self._layers(disk.target, chain, role))
                volumes += made
                refs.append(self._ref(disk.target, made[0]))
        if found.firmware and found.firmware.nvram:
            volumes.append(self._nvram(found.firmware.nvram))
            refs.append(self._ref(NVRAM, volumes[-1]))
        return volumes, refs

    def _layers(
        self, target: str, chain: tuple[domainxml.Layer, ...], role: Role
    ) -> Iterator[Planned]:
        names = [os.path.basename(layer.source) for layer in chain]
        for depth, layer in enumerate(chain):
            where = label(target, depth)
            if layer.type is not domainxml.SourceType.FILE:
                self._problems.append(
                    f"{where}: {layer.source} is no file; only files can be adopted"
                )
            shared = depth > 0 or role is Role.CONFIG
            mine = self._given.private_chain or not shared
            raw = layer.fmt is DiskFormat.RAW
            yield Planned(
                label=where,
                name=names[depth],
                path=layer.source,
                format=layer.fmt,
                role=Role.LAYER if depth else role,
                owner=self._uuid if mine else "",
                size=None if raw else self._virtual_size(where, layer),
                backing=names[depth + 1] if depth + 1 < len(chain) else None,
            )

    def _nvram(self, path: str) -> Planned:
        return Planned(
            label=NVRAM,
            name=os.path.basename(path),
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

    def _virtual_size(self, where: str, layer: domainxml.Layer) -> int | None:
        """Return a qcow2 layer's size, told by the operator or by a running QEMU."""
        if where in self._given.sizes:
            return self._given.sizes[where]
        told = None if "[" in where else self._running_size(where, layer)
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
                if disk.target == target and disk.chain:
                    top = disk.chain[0]
                    if (top.source, top.fmt) == (layer.source, layer.fmt):
                        return int(domain.blockInfo(target, 0)[0])
        return None

    def _check_volumes(self, volumes: list[Planned]) -> None:
        users = self._users()
        paths: dict[str, Planned] = {}
        for volume in volumes:
            self._check_name(volume)
            self._check_users(volume, users)
            self._check_record(volume)
            same = paths.setdefault(volume.name, volume)
            if same is volume:
                continue
            if same.path != volume.path:
                self._problems.append(
                    f"{volume.label}: {volume.path} and {same.path} have one file name, "
                    "which records need to differ: rename one of them"
                )
            elif Role.LAYER not in (same.role, volume.role):
                self._problems.append(
                    f"{volume.label}: {volume.path} is also {same.label}"
                )

    def _check_name(self, volume: Planned) -> None:
        name, where = volume.name, volume.label
        if os.path.normpath(volume.path) != volume.path or not name:
            self._problems.append(f"{where}: {volume.path} is no plain absolute path")
        if not name.isprintable() or " " in name or len(name.encode()) > NAME_LIMIT:
            self._problems.append(
                f"{where}: the file name {name!r} cannot name a record (no blanks, at "
                f"most {NAME_LIMIT} bytes): rename it"
            )
        asleep = self._pools.asleep(volume.directory)
        if asleep:
            self._problems.append(
                f"{where}: pool {asleep} lies at {volume.directory} and is not active: "
                f"`virsh pool-start {asleep}`"
            )

    def _users(self) -> dict[str, set[tuple[str, bool]]]:
        """Return which other domains name a file, and whether as a top."""
        users: dict[str, set[tuple[str, bool]]] = {}
        for uuid, name in self._here.domains.all():
            if uuid == self._uuid:
                continue
            for disk in domainxml.disks(self._here.domains.xml(uuid)):
                for depth, layer in enumerate(disk.chain):
                    written = depth == 0 and not disk.readonly
                    users.setdefault(layer.source, set()).add((name, written))
        return users

    def _check_users(
        self, volume: Planned, users: dict[str, set[tuple[str, bool]]]
    ) -> None:
        for name, written in sorted(users.get(volume.path, ())):
            if volume.owner or written:
                self._problems.append(
                    f"{volume.label}: domain {name} uses {volume.path}, too"
                )

    def _check_record(self, volume: Planned) -> None:
        found = existing(self._backend, volume.name)
        if found is not None and not volume_fits(found, volume, self._uuid):
            self._problems.append(
                f"{volume.label}: the name {volume.name} is that of the record of "
                f"{found.path} ({found.format.value}, owner "
                f"{found.owner or 'nobody'}): rename the file"
            )

    def _placed(self, volume: Planned) -> Planned:
        pool = self._pools.over(volume.directory)
        size = volume.size
        if pool and size is None:
            try:
                size = self._backend.pool(pool).physical(volume.name)
            except errors.VolumeNotFound:
                LOG.debug("volume=%s is not in pool %s", volume.name, pool)
        return dataclasses.replace(volume, pool=pool, size=size)
