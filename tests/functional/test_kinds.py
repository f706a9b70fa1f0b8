# SPDX-License-Identifier: Apache-2.0
"""Moves from any kind of backend to any other: the guest sees the same bytes."""

import contextlib
import hashlib
import subprocess
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import conftest, places
from virtmigrate import conf, domainxml, errors, manifest, model, reading, stream
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.formats import DiskFormat
from virtmigrate.model import TransferState
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

SIZE = 24 * MiB
PAIRS = [("dir-ext4", "rbd"), ("rbd", "dir-xfs"), ("rbd", "rbd")]
PAIRS += [("shared_dir", "shared_dir"), ("dir-xfs", "dir-falloc")]
"""Kinds of backends at the source and at the peer."""


@pytest.fixture(scope="module")
def hosts(box: sandbox.Sandbox) -> Iterator[tuple[sandbox.Host, sandbox.Host]]:
    yield box.add_host("kind-alpha"), box.add_host("kind-beta")
    box.remove_host("kind-alpha")
    box.remove_host("kind-beta")


class Side:
    """One host, with a backend for files and one for disks."""

    def __init__(
        self,
        host: places.Where,
        tmp: Path,
        disks: dict[str, Any],
        name: str,
        grace: int = 2,
        **options: object,
    ) -> None:
        self.host = host
        self.name = name
        storage = host.storage if isinstance(host, sandbox.Host) else Path("/srv")
        self.path = storage / f"kinds-{uuid.uuid4().hex[:8]}"
        lines = [f"{key} = {value}" for key, value in disks.items()]
        self.config = tmp / "virtmigrate.conf"
        self.config.parent.mkdir()
        self.config.write_text(
            f"[virtmigrate]\nuri = {places.uri_of(host)}\naddress = {host.name}\n"
            f"virt_type = qemu\nstate_path = {tmp}/state\n"
            f"peer_uri = {host.uri.replace(host.name, '{dest}', 1)}\n"
            f"enabled_backends = files, {name}\nfile_backend = files\n"
            f"call_timeout = 15\nconnect_timeout = 5\nrecord_grace = {grace}\n"
            "settle_interval = 0\nretry_timeout = 0\nresume_age = 0\n"
            "receiver_timeout = 10\n"
            + "".join(f"{key} = {value}\n" for key, value in options.items())
            + f"[files]\npath = {self.path}\n[{name}]\n"
            + "\n".join(lines)
            + "\n"
        )
        self.moved: list[Progress] = []
        self.driver = self._driver()

    def restart(self) -> None:
        """Have a driver as a restarted process would."""
        self.driver.cleanup_host(self.host.name)
        self.driver = self._driver()

    def close(self) -> None:
        self.driver.cleanup_host(self.host.name)
        with self.libvirt() as conn:
            for domain in conn.listAllDomains(0):
                if domain.isActive():
                    domain.destroy()
                with contextlib.suppress(libvirt.libvirtError):
                    domain.undefine()
            for pool in conn.listAllStoragePools(0):
                pool.destroy()
                pool.undefine()

    @contextlib.contextmanager
    def libvirt(self) -> Iterator["libvirt.virConnect"]:
        conn = libvirt.open(places.uri_of(self.host))
        try:
            yield conn
        finally:
            conn.close()

    def state_of(self, instance: Any) -> str | None:
        names = {1: "running", 3: "paused", 5: "shutoff"}
        with self.libvirt() as conn:
            try:
                return names.get(conn.lookupByUUIDString(instance.uuid).state()[0])
            except libvirt.libvirtError:
                return None

    def disk(self, instance: Any, target: str = "vda") -> tuple[str, model.Volume]:
        """The backend and the record of a disk."""
        here = self.driver.node
        refs = here.instances.read(instance.uuid).body.disks
        (ref,) = (each for each in refs if each.target == target)
        return ref.backend, here.backend(ref.backend).volumes.read(ref.volume).body

    def root(self, instance: Any, target: str = "vda") -> str:
        """Digest of all that a disk holds, as its guest sees it."""
        name, volume = self.disk(instance, target)
        backend = self.driver.node.backend(name)
        source = backend.source(volume, volume.size)
        if volume.format is DiskFormat.QCOW2:
            path = self.config.with_name("guest-view")
            argv = ["qemu-img", "convert", "-U", "-O", "raw"]
            view = conftest.guest_view(backend.layers(volume.name))
            subprocess.run([*argv, view, str(path)], check=True, timeout=60)
            source = reading.FileSource(path, volume.size)
        with stream.Mover() as mover:
            return mover.survey(source).root()

    def volumes(self) -> set[str]:
        """All that lies in the backends."""
        found = set()
        for backend in self.driver.node.backends.values():
            for pool in (backend.disks, backend.incoming, backend.volumes.pool):
                found |= {f"{backend.name}/{each}" for each in pool.names()}
        return found

    def _driver(self) -> VirtMigrateDriver:
        made = VirtMigrateDriver(conf=conf.load(self.config), progress=self._progress)
        made.init_host(self.host.name)
        return made

    def _progress(self) -> Progress:
        self.moved.append(Progress())
        return self.moved[-1]


class Kinds:
    """Two sides, and an instance that moves between them."""

    def __init__(self, a: Side, b: Side, tmp: Path) -> None:
        self.a = a
        self.b = b
        self.image = tmp / "image"
        data = hashlib.shake_128(b"kinds").digest(3 * MiB)
        with self.image.open("wb") as file:
            file.truncate(SIZE)
            file.write(data)
            file.seek(SIZE - MiB)
            file.write(data[:MiB])

    def spawn(self, flavor: Any = None) -> Any:
        made = types.SimpleNamespace(
            uuid=str(uuid.uuid4()),
            name=f"guest-{uuid.uuid4().hex[:6]}",
            flavor=flavor or self.flavor(self.a),
        )
        meta = {"path": str(self.image), "disk_format": "raw"}
        self.a.driver.spawn(None, made, meta)
        return made

    def flavor(self, side: Side, **values: int) -> Any:
        return self.flavor_of(side.name, **values)

    @staticmethod
    def flavor_of(backend: str, **values: int) -> Any:
        fields = {"memory_mb": 64, "vcpus": 1, "root_gb": 0, "ephemeral_gb": 0}
        specs = {"virtmigrate:backend": backend}
        return types.SimpleNamespace(**{**fields, **values}, extra_specs=specs)

    def move(self, instance: Any, **values: int) -> None:
        ticket = self.a.driver.migrate_disk_and_power_off(
            None, instance, self.b.host.name, self.flavor(self.b, **values), None
        )
        self.b.driver.finish_migration(None, None, instance, ticket, None)

    def sent(self) -> int:
        """Bytes that the last move sent."""
        return self.a.moved[-1].report().sent


@pytest.fixture(params=PAIRS, ids="-".join)
def kinds(
    request: pytest.FixtureRequest,
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    with contextlib.ExitStack() as stack:
        sides = []
        for side, kind, host in zip("ab", request.param, hosts, strict=True):
            place = places.PLACES[kind](host, "kinds", tmp_path / side, cluster)
            values = stack.enter_context(place)
            sides.append(Side(host, tmp_path / side, values, f"the{kind}"))
            stack.callback(sides[-1].close)
        yield Kinds(sides[0], sides[1], tmp_path)


def is_shared(kinds: Kinds) -> bool:
    found = [
        each.driver.node.backends[each.name].storage() for each in (kinds.a, kinds.b)
    ]
    return found[0] == found[1]


def test_moved_and_confirmed(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    assert kinds.a.disk(instance)[0] == kinds.a.name
    kinds.move(instance)
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    assert kinds.b.disk(instance)[0] == kinds.b.name
    assert (kinds.sent() == 0) == is_shared(kinds)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.settle()
    assert kinds.b.root(instance) == before
    if not is_shared(kinds):
        assert not [name for name in kinds.a.volumes() if "vda" in name]
    kinds.b.driver.destroy(None, instance, None)
    for side in (kinds.a, kinds.b):
        assert not [name for name in side.volumes() if "vda" in name]


def test_moved_and_reverted(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before, volumes = kinds.a.root(instance), kinds.a.volumes()
    kinds.move(instance)
    spoil(kinds.b, instance)
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.state_of(instance) == "running"
    assert kinds.b.state_of(instance) is None
    assert kinds.a.root(instance) == before
    assert {n for n in kinds.a.volumes() if ".rec." not in n} == {
        n for n in volumes if ".rec." not in n
    }
    kinds.a.driver.destroy(None, instance, None)


def test_resized(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    kinds.move(instance, root_gb=1, memory_mb=80)
    name, volume = kinds.b.disk(instance)
    assert (name, volume.size) == (kinds.b.name, 1024 * MiB)
    assert kinds.b.state_of(instance) == "running"
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.disk(instance)[1].size == SIZE
    assert kinds.a.root(instance) == before
    kinds.move(instance, root_gb=1)
    kinds.a.driver.confirm_migration(None, None, instance, None)
    grown = manifest.Manifest(1024 * MiB)
    assert kinds.b.root(instance) != grown.root()
    kinds.b.driver.destroy(None, instance, None)


def test_a_failed_move_leaves_nothing(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    there = kinds.b.volumes()
    kinds.a.driver._progress = lambda: Cancelling()
    with pytest.raises((errors.MigrationError, errors.Cancelled)):
        kinds.move(instance)
    kinds.a.driver.settle()
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    left = {n for n in kinds.b.volumes() if ".rec." not in n}
    assert left == {n for n in there if ".rec." not in n}
    kinds.a.driver.destroy(None, instance, None)


class Cancelling(Progress):
    """Somebody cancels when the right is about to be given."""

    def phase(self, name: str, total: int = 0) -> None:
        super().phase(name, total)
        if name == "handing over":
            self.cancel()


def spoil(side: Side, instance: Any) -> None:
    """Write to a disk as its guest would."""
    name, volume = side.disk(instance)
    backend = side.driver.node.backend(name)
    with side.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        domain.suspend()
        if volume.format is DiskFormat.QCOW2:
            domain.destroy()
            argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", volume.path]
            subprocess.run(argv, check=True, timeout=30, stdout=subprocess.DEVNULL)
            return
    target = backend.target(volume.name, volume.size)
    if backend.disks.name != backend.incoming.name:
        with Path(volume.path).open("r+b") as file:
            file.write(b"spoilt")
        return
    with target.writer(volume.size, lambda: None) as writer:
        writer.write(0, b"spoilt")


def test_the_state_is_one_of_the_transfer(kinds: Kinds) -> None:
    instance = kinds.spawn()
    kinds.move(instance)
    (stored,) = (
        each
        for each in kinds.b.driver.node.mailbox.open_transfers()
        if each.body.instance == instance.uuid
    )
    assert stored.body.state is TransferState.SETTLED
    (sent,) = (v for v in stored.body.volumes if v.target == "vda")
    assert (sent.backend, sent.shared) == (kinds.b.name, is_shared(kinds))
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


# Disks that are clones

CLONED = [("rbd", "dir-xfs"), ("rbd", "rbd"), ("dir-xfs", "dir-ext4")]


def stand_on_image(side: Side, instance: Any) -> model.Volume:
    """Make an instance's root disk a clone of an image that holds the same."""
    here, (name, root) = side.driver.node, side.disk(instance)
    backend, pool = here.backend(name), here.backend(name).incoming
    side.driver.power_off(instance)

    def new(name: str, **fields: Any) -> model.Volume:
        state, path = model.VolumeState.INCOMPLETE, pool.volume_path(name)
        values = {"name": name, "pool": pool.name, "path": path, "state": state}
        return msgspec.structs.replace(root, **{**values, **fields})

    def finished(volume: model.Volume, **fields: Any) -> model.Volume:
        pool, path = backend.accept(volume.name)
        values = {"pool": pool, "path": path, "state": model.VolumeState.USABLE}
        return backend.update(msgspec.structs.replace(volume, **values, **fields))

    with stream.Mover() as mover:
        digest = mover.survey(backend.source(root, root.size)).digest()
        made = new(f"image.{uuid.uuid4().hex[:8]}", role=model.Role.IMAGE, owner="")
        image = finished(backend.copy(root, made, mover), digest=digest)
        made = new(f"vda.{uuid.uuid4().hex[:16]}", operation="cloning")
        disk = finished(backend.clone(image, made, mover))
    record = here.instances.read(instance.uuid).body
    refs = tuple(
        msgspec.structs.replace(ref, volume=disk.name) if ref.target == "vda" else ref
        for ref in record.disks
    )
    here.publish_instance(msgspec.structs.replace(record, disks=refs))
    with side.libvirt() as conn:
        text = conn.lookupByUUIDString(instance.uuid).XMLDesc(2)
        conn.defineXML(domainxml.with_disks(text, {"vda": backend.layers(disk.name)}))
    backend.remove(root.name)
    side.driver.power_on(None, instance, None)
    return image


@pytest.mark.parametrize("kinds", CLONED, ids="-".join, indirect=True)
def test_a_clone_moves_whole(kinds: Kinds) -> None:
    """With what it shares with its image, which stays behind."""
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    image = stand_on_image(kinds.a, instance)
    backend = kinds.a.driver.node.backend(kinds.a.name)
    assert kinds.a.root(instance) == before
    assert backend.users(image.name) == {kinds.a.disk(instance)[1].name}
    kinds.move(instance)
    assert kinds.b.root(instance) == before
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.settle()
    assert kinds.b.state_of(instance) == "running"
    assert kinds.b.root(instance) == before
    assert (kinds.b.disk(instance)[1].parent == image.name) == is_shared(kinds)
    assert backend.users(image.name) == (
        {kinds.b.disk(instance)[1].name} if is_shared(kinds) else set()
    )
    kinds.b.driver.destroy(None, instance, None)
    backend.remove(image.name)
    for side in (kinds.a, kinds.b):
        assert not [n for n in side.volumes() if "vda" in n or "image" in n]


@pytest.mark.parametrize("kinds", CLONED, ids="-".join, indirect=True)
def test_a_clone_comes_back(kinds: Kinds) -> None:
    instance = kinds.spawn()
    before = kinds.a.root(instance)
    image = stand_on_image(kinds.a, instance)
    _, disk = kinds.a.disk(instance)
    kinds.move(instance, root_gb=1)
    spoil(kinds.b, instance)
    assert kinds.b.root(instance) != before
    kinds.b.driver.destroy(None, instance, None)
    kinds.a.driver.finish_revert_migration(None, instance)
    assert kinds.a.state_of(instance) == "running"
    assert kinds.a.root(instance) == before
    back = kinds.a.disk(instance)[1]
    assert (back.parent, back.backing) == (disk.parent, disk.backing)
    kinds.a.driver.destroy(None, instance, None)
    kinds.a.driver.node.backend(kinds.a.name).remove(image.name)


@pytest.mark.parametrize("kinds", [PAIRS[0]], ids="-".join, indirect=True)
def test_equal_names_in_two_backends(kinds: Kinds) -> None:
    """A name tells a volume from others of its backend only."""
    instance = kinds.spawn()
    add_disk(kinds.a, instance, "vdb", b"another disk")
    before = kinds.a.root(instance), kinds.a.root(instance, "vdb")
    assert kinds.a.disk(instance)[1].name == kinds.a.disk(instance, "vdb")[1].name
    kinds.move(instance)
    assert (kinds.b.root(instance), kinds.b.root(instance, "vdb")) == before
    kinds.a.driver.confirm_migration(None, None, instance, None)
    kinds.b.driver.destroy(None, instance, None)


def add_disk(side: Side, instance: Any, target: str, data: bytes) -> None:
    """Give an instance a disk of files, whose volume is called as its root's is."""
    here = side.driver.node
    _, root = side.disk(instance)
    path = Path(here.files.disks.volume_path(root.name))
    volume = msgspec.structs.replace(
        root, pool=here.files.disks.name, path=str(path), role=model.Role.EPHEMERAL
    )
    here.files.allocate(volume)
    with path.open("r+b") as file:
        file.write(data)
    record = here.instances.read(instance.uuid).body
    ref = model.DiskRef(
        target=target, volume=volume.name, backend="files", role=volume.role
    )
    here.publish_instance(msgspec.structs.replace(record, disks=(*record.disks, ref)))
    side.driver.power_off(instance)
    layers = here.files.layers(volume.name)
    with side.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        domain.attachDeviceFlags(
            f"<disk type='file'><driver name='qemu' type='{layers[0].fmt.value}'/>"
            f"<source file='{path}'/><target dev='{target}' bus='virtio'/></disk>",
            libvirt.VIR_DOMAIN_AFFECT_CONFIG,
        )
    side.driver.power_on(None, instance, None)
