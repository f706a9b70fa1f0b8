# SPDX-License-Identifier: Apache-2.0
"""The hosts that Nova's computes run on, and what libvirt and files say of them."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import libvirt
from oslo_config import cfg

from sandbox import Host
from virtmigrate import conf as options
from virtmigrate import domainxml

STATES = {1: "running", 3: "paused", 5: "shutoff"}


class Site:
    """One host, with a backend of kind dir."""

    def __init__(self, host: Host, tmp: Path, console: Path) -> None:
        self.host = host
        self.path = host.storage / "vm"
        self.console = console
        self.state = tmp / host.name
        self.overrides: dict[str, object] = {}

    def conf(self) -> cfg.ConfigOpts:
        """A configuration of its own: Nova's is one for all computes of a process."""
        conf = cfg.ConfigOpts()
        conf(args=[], default_config_files=[])
        options.register(conf)
        self.console.mkdir(parents=True, exist_ok=True)
        values: dict[str, object] = {
            "uri": self.host.local_uri,
            "address": self.host.name,
            "virt_type": "qemu",
            "state_path": str(self.state),
            "peer_uri": self.host.uri.replace(self.host.name, "{dest}", 1),
            "console_path": str(self.console),
            "settle_interval": 0.0,
            "event_interval": 0.5,
            "retry_timeout": 0.0,
            "resume_age": 0,
            # The guest does not listen.
            "shutdown_timeout": 1,
            **self.overrides,
        }
        for name, value in values.items():
            conf.set_override(name, value, options.GROUP)
        conf.set_override("path", str(self.path), "local")
        conf.set_override("traits", ["media=ssd"], "local")
        return conf

    @contextlib.contextmanager
    def libvirt(self) -> Iterator["libvirt.virConnect"]:
        conn = libvirt.open(self.host.local_uri)
        try:
            yield conn
        finally:
            conn.close()

    def state_of(self, uuid: str) -> str | None:
        """running, paused or shutoff; None without a domain. Asked of libvirt."""
        with self.libvirt() as conn:
            try:
                domain = conn.lookupByUUIDString(uuid)
            except libvirt.libvirtError:
                return None
            return STATES.get(domain.state()[0], "?")

    def xml(self, uuid: str) -> str:
        with self.libvirt() as conn:
            return str(conn.lookupByUUIDString(uuid).XMLDesc(2))

    def live_xml(self, uuid: str) -> str:
        with self.libvirt() as conn:
            return str(conn.lookupByUUIDString(uuid).XMLDesc(0))

    def memory(self, uuid: str) -> int:
        """MiB of the next start."""
        return domainxml.read(self.xml(uuid)).memory // 1024**2

    def disk(self, uuid: str, target: str = "vda") -> Path:
        for disk in domainxml.disks(self.xml(uuid)):
            if disk.target == target:
                return Path(disk.chain[0].source)
        raise KeyError(target)

    def view(self, uuid: str) -> str:
        """What a guest sees of its root disk, as qemu-img takes it behind `json:`."""
        (disk,) = [
            each for each in domainxml.disks(self.xml(uuid)) if each.target == "vda"
        ]
        found: dict[str, object] = {}
        for layer in reversed(disk.chain):
            assert layer.fmt is not None
            file = {"driver": "file", "filename": layer.source}
            below = {"backing": found} if found else {}
            found = {"driver": layer.fmt.value, "file": file, **below}
        return json.dumps(found)

    def volumes(self) -> dict[str, str]:
        """SHA-256 of each file that is no record, by its name."""
        areas = (self.path / "disks", self.path / "incoming")
        found = [path for area in areas for path in area.rglob("*") if path.is_file()]
        return {path.name: digest(path) for path in found if ".rec." not in path.name}

    def disks(self) -> list[str]:
        """Return the volumes that are disks of instances."""
        return [name for name in self.volumes() if name.startswith("vd")]

    def clear(self) -> None:
        """Remove all domains and pools, and the files."""
        with self.libvirt() as conn:
            for domain in conn.listAllDomains(0):
                if domain.isActive():
                    domain.destroy()
                if domain.hasManagedSaveImage(0):
                    domain.managedSaveRemove(0)
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
            for pool in conn.listAllStoragePools(0):
                if pool.isActive():
                    pool.destroy()
                pool.undefine()
        for path in (self.path, self.console):
            shutil.rmtree(path, ignore_errors=True)


class Sites:
    """All hosts, by name."""

    def __init__(self, hosts: Mapping[str, Host], tmp: Path) -> None:
        self.tmp = tmp
        # The path of a log goes with a guest: it is the same on all hosts.
        console = next(iter(hosts.values())).storage / "console"
        self._sites = {name: Site(host, tmp, console) for name, host in hosts.items()}

    def site(self, name: str) -> Site:
        """Return the site of a name; of a name that is none, the first."""
        return self._sites.get(name) or next(iter(self._sites.values()))

    def clear(self) -> None:
        for site in self._sites.values():
            site.clear()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
