# SPDX-License-Identifier: Apache-2.0
"""Hosts with a backend for files and one for disks, and instances between them."""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import msgspec

import sandbox
from sandbox.ceph import Ceph
from tests.functional import conftest, places
from virtmigrate import conf, domainxml, model, reading, stream
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.formats import DiskFormat
from virtmigrate.progress import Progress, Report
from virtmigrate.units import MiB

SIZE = 24 * MiB


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
        # A machine is emulated, and slow when others work, too.
        answer = 15 if isinstance(host, sandbox.Host) else 60
        self.config.write_text(
            f"[virtmigrate]\nuri = {places.uri_of(host)}\naddress = {host.name}\n"
            f"virt_type = qemu\nstate_path = {tmp}/state\n"
            f"peer_uri = {host.uri.replace(host.name, '{dest}', 1)}\n"
            f"enabled_backends = files, {name}\nfile_backend = files\n"
            f"call_timeout = {answer}\nconnect_timeout = 5\nrecord_grace = {grace}\n"
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

    def configure(self, **options: object) -> None:
        """Have a driver with other options."""
        text = self.config.read_text()
        for name, value in options.items():
            text = re.sub(rf"(?m)^{name} = .*\n", "", text)
            text = text.replace("[files]", f"{name} = {value}\n[files]")
        self.config.write_text(text)
        self.restart()

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
        with stream.Mover() as mover:
            return mover.survey(self._view(instance, target)).root()

    def content(self, instance: Any, target: str = "vda") -> bytes:
        """All that a disk holds, as its guest sees it."""
        with self._view(instance, target) as source:
            found = bytearray(source.size)
            for start in range(0, source.size, MiB):
                end = min(start + MiB, source.size)
                found[start:end] = source.read(start, end) or bytes(end - start)
            return bytes(found)

    def _view(self, instance: Any, target: str) -> reading.Source:
        name, volume = self.disk(instance, target)
        backend = self.driver.node.backend(name)
        if volume.format is not DiskFormat.QCOW2:
            return backend.source(volume, volume.size)
        path = self.config.with_name("guest-view")
        argv = ["qemu-img", "convert", "-U", "-O", "raw"]
        view = conftest.guest_view(backend.layers(volume.name))
        subprocess.run([*argv, view, str(path)], check=True, timeout=60)
        return reading.FileSource(path, volume.size)

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


@contextlib.contextmanager
def between(
    kinds: tuple[str, str],
    hosts: tuple[sandbox.Host, sandbox.Host],
    tmp: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[Kinds]:
    """Yield two hosts whose backends are of these kinds."""
    with contextlib.ExitStack() as stack:
        sides = []
        for side, kind, host in zip("ab", kinds, hosts, strict=True):
            place = places.PLACES[kind](host, "kinds", tmp / side, cluster)
            values = stack.enter_context(place)
            sides.append(Side(host, tmp / side, values, f"the{kind}"))
            stack.callback(sides[-1].close)
        yield Kinds(sides[0], sides[1], tmp)


def is_shared(kinds: Kinds) -> bool:
    found = [
        each.driver.node.backends[each.name].storage() for each in (kinds.a, kinds.b)
    ]
    return found[0] == found[1]


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


def put_layer(side: Side, instance: Any, size: int, *commands: str) -> model.Volume:
    """Put a layer over a disk of files, and write to it by qemu-io."""
    side.driver.power_off(instance)
    here = side.driver.node
    name, below = side.disk(instance)
    backend = here.backend(name)
    top = f"vda-{uuid.uuid4().hex[:4]}.{below.operation}"
    layer = msgspec.structs.replace(
        below,
        name=top,
        pool=backend.disks.name,
        path=backend.disks.volume_path(top),
        format=DiskFormat.QCOW2,
        size=size,
        backing=below.name,
        digest=None,
    )
    backend.overlay(layer, below)
    record = here.entitled(instance.uuid)
    (ref,) = record.disks
    new = msgspec.structs.replace(ref, volume=top)
    here.publish_instance(msgspec.structs.replace(record, disks=(new,)))
    view = conftest.guest_view(backend.layers(top))
    for command in commands:
        argv = ["qemu-io", "-c", command, view]
        subprocess.run(argv, check=True, timeout=60, capture_output=True)
    xml = here.domains.xml(instance.uuid)
    here.domains.undefine(instance.uuid)
    here.domains.define(domainxml.with_disks(xml, {"vda": backend.layers(top)}))
    side.driver.power_on(None, instance)
    return layer


# The program


def main() -> None:
    """Move an instance, and be killed when a share of a phase is done."""
    config, instance, dest, backend, phase, share = sys.argv[1:]

    def kill(report: Report) -> None:
        is_there = report.done >= float(share) * report.total
        if report.phase.startswith(phase) and is_there:
            print(report.sent, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    driver = VirtMigrateDriver(
        conf=conf.load(Path(config)), progress=lambda: Progress(kill, interval=0)
    )
    driver.init_host("killed")
    driver.migrate_disk_and_power_off(
        None, types.SimpleNamespace(uuid=instance), dest, Kinds.flavor_of(backend)
    )


if __name__ == "__main__":
    main()
