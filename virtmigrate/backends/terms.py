# SPDX-License-Identifier: Apache-2.0
"""What is said of backends: what a kind can do, and how one is set up."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtmigrate import reading, storagepool
from virtmigrate.formats import DiskFormat


class Clones(enum.Enum):
    """How a disk is made of an image of its backend."""

    COPY = "copy"
    """All data is read and written once more; holes stay holes."""
    REFLINK = "reflink"
    """The two share their blocks where the file system can; else as COPY."""
    OVERLAY = "overlay"
    """A qcow2 layer over the image, which stays below it."""
    SHARED = "shared"
    """The storage shares blocks until they are written to; the image has to stay."""
    SNAPSHOT = "snapshot"
    """As SHARED, and it can never change its size. One that is to be longer than the
    image is made as COPY."""


class Reach(enum.Enum):
    """Whom a backend's locks keep apart."""

    HOST = "host"
    """The processes of this host. Other hosts do not know of them."""
    STORAGE = "storage"
    """All hosts that have the storage."""


@dataclass(frozen=True)
class Capabilities:
    """What a kind of backend can do."""

    formats: tuple[DiskFormat, ...]
    """Formats that its volumes may have."""
    overlays: bool
    """A volume can be frozen below a new layer, and the layer dropped or merged."""
    snapshots: bool
    """It can keep a volume as it is now, and make it that again."""
    shared: bool
    """Several hosts may have it."""
    streams: bool
    """libvirt's streams reach its volumes; else data comes in pieces, as files."""
    thick: bool
    """A volume takes all of its size at once, and shows what was there before."""
    files: bool
    """It can hold NVRAM, memory images and records of instances."""
    clones: Clones = Clones.COPY
    locks: Reach = Reach.HOST
    fences: bool = False
    """It can say who has a volume open, and refuse what they write from then on."""
    nested: bool = True
    """It keeps states also of a volume that shares the blocks of another (`parent`)."""


@dataclass(frozen=True)
class Arrived:
    """An incoming volume, as the host that it came to reads it."""

    size: int
    """Bytes that it has."""
    source: reading.Source
    flush: Callable[[], bool]
    """Has its bytes on its storage; says False when this process cannot."""


@dataclass(frozen=True)
class ImageLimits:
    """What idle images are dropped for; 0 is no limit."""

    count: int = 0
    bytes: int = 0
    age: int = 0
    """Seconds since the last use."""
    free: int = 0
    """Bytes of room to make."""


@dataclass(frozen=True)
class Settings:
    """A backend's group of options."""

    name: str
    path: str
    ownership: storagepool.Ownership
    reserved: int
    busy_timeout: float
    record_grace: float
    traits: tuple[str, ...] = ()
    images: ImageLimits = ImageLimits()
    options: Mapping[str, Any] = field(default_factory=dict)
    """What only its kind has."""
    lock_path: Path = Path()
    """Directory for file locks of this host."""
    lock_lease: float = 30.0
    """Seconds until a lock that hosts share is free when its holder died."""


class Reuse(enum.Enum):
    """What became of a retired volume."""

    GONE = "gone"
    """It is not there."""
    MOVED = "moved"
    """It was set aside, untouched but for its length."""
    UNPROVEN = "unproven"
    """It was set aside earlier; its bytes have to be read to be known."""
    SWITCHED = "switched"
    """It is the incoming volume already; its bytes have to be read likewise."""
