# SPDX-License-Identifier: Apache-2.0
"""The values that a domain's XML is built from and read into."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from virtmigrate import errors
from virtmigrate.formats import DiskFormat


class SourceType(enum.Enum):
    """Where a layer lies, as libvirt calls it."""

    FILE = "file"
    """A file, by its absolute path."""

    BLOCK = "block"
    """A block device, by its absolute path."""

    NETWORK = "network"
    """An RBD image, by pool/image."""


class InterfaceKind(enum.StrEnum):
    """What an interface is plugged into."""

    BRIDGE = "bridge"
    """A Linux bridge."""

    OVS = "ovs"
    """A bridge of Open vSwitch, as a port with an interface id."""

    NETWORK = "network"
    """A network that libvirt manages, by its name."""


class DiskDevice(enum.StrEnum):
    """What the guest takes a disk for."""

    DISK = "disk"
    """A hard disk."""

    CDROM = "cdrom"
    """A CD drive, which may be empty."""


@dataclass(frozen=True)
class Auth:
    """How QEMU shows itself to Ceph."""

    user: str  # without "client."
    secret: str  # UUID of the host's libvirt secret that holds the key


@dataclass(frozen=True)
class Layer:
    """One layer of a disk's backing chain, wholly told."""

    type: SourceType
    source: str  # absolute path; pool/image for NETWORK
    fmt: DiskFormat
    hosts: tuple[str, ...] = ()  # NETWORK: monitors, "name", "name:port", "[::1]:port"
    auth: Auth | None = None  # NETWORK only
    room: int = 0  # FILE: bytes of the file that QEMU may use; 0: it may grow


@dataclass(frozen=True)
class Disk:
    """A disk to be built."""

    target: str  # "vda"
    chain: tuple[Layer, ...]  # top first, complete: the last has no backing
    bus: str = "virtio"
    device: str = DiskDevice.DISK
    readonly: bool = False
    boot_order: int | None = None  # from 1
    serial: str | None = None
    cache: str = "none"
    discard: str = "unmap"


@dataclass(frozen=True)
class Interface:
    """A network interface."""

    mac: str
    bridge: str  # the bridge's name; with NETWORK the network's
    kind: InterfaceKind = InterfaceKind.BRIDGE
    interface_id: str | None = None  # OVS: UUID of the port
    device: str | None = None  # the host's end; libvirt names it when None
    model: str = "virtio"
    mtu: int | None = None  # bytes


@dataclass(frozen=True)
class Firmware:
    """The firmware files, when it is not the machine's own BIOS."""

    loader: str  # absolute path of the code, which is never written
    nvram: str | None = None  # absolute path of the instance's own variables
    nvram_template: str | None = None  # what libvirt makes a missing nvram of
    secure: bool = False  # secure boot, needs q35
    pflash: bool = True  # False: a ROM without variables


@dataclass(frozen=True)
class Topology:
    """How the virtual CPUs are arranged."""

    sockets: int
    cores: int
    threads: int
    dies: int = 1

    @property
    def total(self) -> int:
        """The number of virtual CPUs that it holds."""
        return self.sockets * self.dies * self.cores * self.threads


@dataclass(frozen=True)
class Cpu:
    """The virtual CPU."""

    mode: str  # "custom", "host-model", "host-passthrough", "maximum"
    model: str | None = None  # custom: libvirt's name of it
    features: tuple[tuple[str, str], ...] = ()  # (policy, name)
    match: str | None = None  # custom: "exact", "minimum", "strict"
    check: str | None = None  # "none", "partial", "full"
    topology: Topology | None = None


@dataclass(frozen=True)
class Domain:
    """An instance to be built."""

    uuid: str
    name: str
    memory: int  # bytes; rounded up to whole KiB
    vcpus: int
    virt_type: str  # "kvm" or "qemu"
    machine: str  # "q35", "pc", or a version of them
    arch: str = "x86_64"
    cpu: Cpu | None = None
    disks: tuple[Disk, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    firmware: Firmware | None = None
    console_log: str | None = None  # absolute path that the console is appended to
    metadata: Mapping[str, str] = field(default_factory=dict)  # ours
    title: str | None = None
    description: str | None = None


@dataclass(frozen=True)
class FoundLayer:
    """One layer of a backing chain, as far as the XML tells it."""

    type: SourceType
    source: str
    fmt: DiskFormat | None  # None: not named, or one that we do not know
    hosts: tuple[str, ...] = ()
    auth: Auth | None = None


@dataclass(frozen=True)
class FoundDisk:
    """A disk as its XML tells it; nothing is filled in."""

    target: str
    bus: str | None
    device: str  # as written: "floppy" and "lun" appear too
    readonly: bool
    chain: tuple[FoundLayer, ...]  # top first; empty for an empty drive
    terminated: bool  # the XML says that nothing is behind the last layer
    boot_order: int | None = None
    serial: str | None = None
    cache: str | None = None
    discard: str | None = None
    problems: tuple[str, ...] = ()  # sentences: what is left open or not understood

    def layers(self) -> tuple[Layer, ...]:
        """Return the chain as layers that a domain can be built from.

        Raises:
            DomainNotUnderstood: the XML leaves a format or the end open.
        """
        if self.problems:
            reason = "; ".join(self.problems)
            raise errors.DomainNotUnderstood(
                domain="with " + self.target, reason=reason
            )
        return tuple(
            Layer(found.type, found.source, found.fmt, found.hosts, found.auth)
            for found in self.chain
            if found.fmt is not None
        )


@dataclass(frozen=True)
class FoundDomain:
    """A domain as its XML tells it."""

    uuid: str
    name: str
    memory: int  # bytes
    vcpus: int  # the most that it may have
    virt_type: str
    machine: str
    arch: str
    emulator: str | None
    cpu: Cpu | None
    firmware: Firmware | None
    disks: tuple[FoundDisk, ...]
    interfaces: tuple[Interface, ...]  # those on bridges and networks only
    console_log: str | None
    metadata: dict[str, str] | None  # ours; None when there is none
