# SPDX-License-Identifier: Apache-2.0
"""What records say: volumes, instances, transfers and hosts.

All sizes are bytes. Unknown fields are refused: a newer release that adds one
raises the schema.
"""

import enum

import msgspec

from virtmigrate.formats import DiskFormat
from virtmigrate.schema import Struct as Struct
from virtmigrate.snapshottree import Snapshot


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


class InstanceState(enum.Enum):
    HERE = "here"
    """This host has the right to run it."""
    ARRIVED = "arrived"
    """So it has, and the source of the move that brought it may get it back."""
    LEAVING = "leaving"
    """A move has stopped it; the right is still here, and the domain is undefined."""
    AWAY = "away"
    """The right was given up; only the transfer's record says who has it."""
    GONE = "gone"
    """It came here by a move and was given back."""


class TransferState(enum.Enum):
    RESERVED = "reserved"
    """The source sends. The peer may not run the instance."""
    GIVEN = "given"
    """The source gave the right up. The peer may take it, or the source withdraw."""
    TAKEN = "taken"
    """The peer has the right, and imports."""
    SETTLED = "settled"
    """The peer has the instance defined and its volumes durable."""
    CONFIRMED = "confirmed"
    """The source will not take it back."""
    RETURNING = "returning"
    """The peer takes its domain and volumes away, to give the right back."""
    RETURNED = "returned"
    """The peer gave the right back; it has no domain any more."""
    WITHDRAWN = "withdrawn"
    """The source took the right back before the peer took it, or the peer gave up
    waiting for the source."""


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


class DiskRef(Struct, frozen=True):
    """A disk of an instance: the top of its chain."""

    target: str
    volume: str
    backend: str
    role: Role
    transient: bool = False
    """What its guest writes goes to a layer that is no part of this chain, and is
    thrown away when the guest is off."""


class Changing(enum.Enum):
    """What is being done to an instance's snapshots."""

    CREATING = "creating"
    """Layers are being made and put over the disks. The domain's XML says which."""
    PREPARING = "preparing to revert"
    """Layers are being made; nothing else was touched."""
    REVERTING = "reverting"
    """The record says what the disks are, and the domain is being made that."""
    RESUMING = "resuming"
    """All is as it is to be, but that the guest does not run yet."""
    DELETING = "deleting"
    """States are being dropped; they are not to be gone back to any more."""
    TIDYING = "tidying up"
    """Layers that nobody needs are being merged or removed; the guest may run."""


class Change(Struct, frozen=True):
    """A change of an instance's snapshots that is not finished.

    Written before its first step, taken away after its last one: what a kill leaves
    is finished, or undone, by what this says.
    """

    what: Changing
    operation: str
    """The end of the names of volumes that were made for it."""
    disks: tuple[DiskRef, ...] = ()
    """As they are to be."""
    snapshot: Snapshot | None = None
    """The one that is made, or reverted to."""
    gone: tuple[str, ...] = ()
    """Ids that are deleted."""
    power: str = ""
    """What the guest is to be after a revert: running, paused or off; of a merge, what
    it did before it was paused for that; of a snapshot, what it was, once it is not
    to be restored from its memory any more."""
    configuration: bool = False
    """A revert brings the snapshot's configuration back, too."""
    layer: DiskRef | None = None
    """The layer that is merged; its disk's target is "" where it is no disk's top."""


class Instance(Struct, frozen=True):
    """The record of an instance on one host."""

    uuid: str
    name: str
    owner: str
    """The compute service that it belongs to."""
    host: str
    state: InstanceState
    operation: str
    """What changed this record last."""
    memory: int
    vcpus: int
    disks: tuple[DiskRef, ...]
    peer: str | None = None
    """The other host, while the instance moves or is away."""
    domain_xml: str | None = None
    """The whole inactive XML while no domain is defined."""
    power: str = "off"
    """What it was when a move stopped it: running, paused or off; "started" once
    the move's peer did what that asks for."""
    autostart: bool = False
    snapshots: tuple[Snapshot, ...] = ()
    current: str | None = None
    """The id of the snapshot that the disks went on from."""
    detached: tuple[DiskRef, ...] = ()
    """Disks that a revert took away; their volumes stay until the instance goes."""
    change: Change | None = None


class Tenure(Struct, frozen=True):
    """Who may run an instance; beside those of its disks that several hosts see.

    It never ends by itself: a host that nobody reaches may still be writing.
    """

    host: str
    """Who may run it."""
    record: Instance
    """The instance as that host has it, with the whole XML."""
    peer: str | None = None
    """Who may take it, by a move that goes on: `host` has stopped it for that."""
    clients: tuple[str, ...] | None = ()
    """What the storage calls those that have the disks open since it was started; None
    where that is not known: while it is being started, where the storage did not show
    it of each disk, and where it has no names for them."""
    lost: tuple[str, ...] = ()
    """Hosts from which it was taken, and that have not cleared away what they have of
    it: one may come back with a guest that runs."""
    gone: bool = False
    """The instance has left this backend: only those in `lost` may not begin anew, and
    as long as there are some the record stays."""


class TransferVolume(Struct, frozen=True):
    """One volume on its way."""

    name: str
    """At the peer; it holds the operation's id."""
    backend: str
    """The peer's backend that it comes to."""
    source: str
    target: str
    """The disk that it is the top of, or a layer of."""
    role: Role
    format: DiskFormat
    size: int
    """Virtual size after the move."""
    length: int
    """Bytes of the file or device that are sent; of a shared disk, its size before."""
    room: int
    """Bytes that are reserved for it."""
    backing: str | None = None
    shared: bool = False
    """Both hosts see it: nothing is sent, and neither deletes it for the other."""
    kept: bool = False
    """Shared, and its backend keeps its state at the stop until the confirm."""
    held: bool = False
    """The peer has it in its image cache, by this name: nothing is sent."""
    grow: bool = False
    """The guest's view of it grows to `size`, once the domain is started."""
    digest: Digest | None = None
    """Set with the hand-over."""
    proof: Proof = Proof.FULL
    """How the copy was proven; set with the hand-over."""


class Transfer(Struct, frozen=True):
    """The record of one move, in the peer's mailbox: what both hosts agree on."""

    operation: str
    request: str
    """The caller's request id, for the logs."""
    instance: str
    source: str
    peer: str
    state: TransferState
    generation: int
    """Of the instance's record when the source gave it up."""
    volumes: tuple[TransferVolume, ...]
    created: float
    """Seconds since the epoch, on the source."""
    record: Instance | None = None
    """The instance as it is to be at the peer; set with the hand-over."""


class BackendCard(Struct, frozen=True):
    """What a host says of one of its backends."""

    name: str
    kind: str
    disks: str
    incoming: str
    records: str
    """Names of its pools."""
    formats: tuple[DiskFormat, ...]
    files: bool
    """It takes NVRAM, config drives and other files."""
    thick: bool = False
    """A volume takes all of its size at once, and shows what was there before."""
    preallocates: bool = False
    """A raw volume gets all of its room when it is made, and reads as zeros."""
    granularity: int = 1
    """Bytes that sizes are multiples of."""
    pieces: str = ""
    """The pool that takes data for it in pieces; "" where streams reach it."""
    reserved: int = 0
    """Bytes of its room that are left free."""
    traits: tuple[str, ...] = ()
    """What it is, for flavors that ask for it."""


class HostCard(Struct, frozen=True):
    """What a host says of itself to those that send to it."""

    host: str
    uuid: str
    release: str
    records: tuple[int, ...]
    manifests: tuple[int, ...]
    tickets: tuple[int, ...]
    """Versions that it reads."""
    backends: tuple[BackendCard, ...]
    accepts_moves: bool = False
    """Its receiver finishes moves, and gives instances back."""
