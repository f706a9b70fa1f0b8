# SPDX-License-Identifier: Apache-2.0
"""What records say of volumes, and of the storage that they lie in."""

import enum

import msgspec

from virtmigrate.formats import DiskFormat
from virtmigrate.schema import Struct


class VolumeState(enum.Enum):
    INCOMPLETE = "incomplete"
    """Being made; its content is nothing yet, and it counts as reserved room."""
    USABLE = "usable"
    """Its content is proven."""
    FROZEN = "frozen"
    """Proven, and below a layer: it never changes until that layer is gone."""
    MERGING = "merging"
    """A layer whose content is in the volume below it, or about to be: its guest may
    stand still for that."""
    RETIRED = "retired"
    """Of an instance that moved away: never started, kept so that a return sends
    only what changed, and removed first when room is short."""
    DOOMED = "doomed"
    """Removed; its bytes are being wiped. Nothing uses it, and its name and its room
    are free when it is gone."""


class Proof(enum.Enum):
    """How a copy was compared with its source."""

    FULL = "full"
    """Every byte: equal manifests."""
    SAMPLED = "sampled"
    """Some blocks, drawn at random."""
    NONE = "none"
    """Nothing was compared."""


class Role(enum.Enum):
    ROOT = "root"
    EPHEMERAL = "ephemeral"
    DATA = "data"
    CONFIG = "config"
    """A config drive: read-only for the guest, never grown."""
    NVRAM = "nvram"
    MEMORY = "memory"
    LAYER = "layer"
    """Below another volume in a backing chain."""
    IMAGE = "image"
    """Read-only, of the image cache: base of disks, and owned by no instance."""


class Digest(Struct, frozen=True):
    """Proof of a volume's content: see manifest.py."""

    version: int
    size: int
    block_size: int
    root: str


class Hold(Struct, frozen=True):
    """A peer's wish that an image stays, until it has what stands on it."""

    operation: str
    until: float
    """Seconds since the epoch; from then on it counts no more."""


class Origin(Struct, frozen=True):
    """Of an image: where it came from, and what was found at the door."""

    key: str
    """What tells it from all others, and from what its source gave before."""
    source: str
    name: str
    format: str
    """As declared there, and found; the volume itself is raw."""
    checksum: str
    """ALGORITHM:HEX of what came."""
    min_disk: int
    rules: int
    """The version of the rules that it was checked by."""
    checked: float
    used: float
    """Seconds since the epoch; so is `checked`."""
    pinned: bool = False


class Slot(Struct, frozen=True):
    """The one place of an image in a backend: see slots.py."""

    key: str
    source: str
    operation: str
    host: str
    """Who fetches it, or fetched it."""
    done: int = 0
    total: int = 0
    """Bytes of what is being done."""
    volume: str = ""
    """What it became."""
    failed: str = ""
    """Why it became nothing."""


class Transient(Struct, frozen=True):
    """Of a layer that goes when its guest is off: what it stands on."""

    target: str
    backend: str
    """Of the disk's volume; the layer may lie in another one."""
    volume: str
    room: int
    """Bytes that the layer takes at most."""


class Volume(Struct, frozen=True):
    """The record of one volume."""

    name: str
    pool: str
    path: str
    """As the host's QEMU opens it."""
    format: DiskFormat
    role: Role
    size: int
    """Virtual size: what the guest sees."""
    state: VolumeState
    owner: str
    """UUID of the instance that it belongs to."""
    operation: str
    """The operation that made it."""
    origin: str
    """The host that made it."""
    backing: str | None = None
    """Name of the volume below, whose record stands in the same backend."""
    parent: str | None = None
    """The volume in the same backend that this one's storage shares blocks with, so
    that it has to stay; not part of its backing chain."""
    digest: Digest | None = None
    """Of its bytes when the operation that proved it ended."""
    durable: bool = False
    """Fsynced on its host after the last write of ours."""
    proof: Proof = Proof.FULL
    """How the copy that it came by was proven. Only FULL is ever a base of a delta
    or a source for a cache."""
    holds: tuple[Hold, ...] = ()
    """Of an image: the transfers that count on it."""
    image: Origin | None = None
    """Of an image that the cache fetched."""
    transient: Transient | None = None
    """Of a layer over a transient disk; it has no `backing`."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How a backend's volumes and records are laid out.

    Fields that a newer release adds are passed over: by the version it is known
    whether they matter.
    """

    version: int
    id: str
    """UUID of this storage, drawn when it was made: the same on every host."""
    upgrading: int | None = None
    """The version that an upgrade began to make of it."""
