# SPDX-License-Identifier: Apache-2.0
"""What records say of instances."""

import enum

from virtmigrate.model.volumes import Role
from virtmigrate.schema import Struct
from virtmigrate.snapshottree import Snapshot


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
    FLATTENING = "flattening"
    """The active layer of a disk gets what it stands on; the guest may run."""


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
    kept: Snapshot | None = None
    """What a revert makes of what there was."""
    gone: tuple[str, ...] = ()
    """Ids that are deleted."""
    power: str = ""
    """What the guest is to be after a revert: running, paused or off; of a merge, what
    it did before it was paused for that; of a snapshot, what it was, once it is not
    to be restored from its memory any more."""
    configuration: bool = False
    """A revert brings the snapshot's configuration back, too."""
    layer: DiskRef | None = None
    """The layer that is merged, or gets what it stands on; its disk's target is ""
    where it is no disk's top."""


class CloneState(enum.Enum):
    """What a clone is."""

    MAKING = "being made"
    """Nobody may start it: it would be its source once more. Settling takes it away."""
    APART = "apart"
    """It runs, and reaches no network: it is not proven to be somebody else."""
    READY = "ready"
    """It is proven to be somebody else; or it was made of one that was off."""


class Cloned(Struct, frozen=True):
    """What an instance was made of, and how far it is from that."""

    source: str
    """UUID of the instance that it was made of."""
    operation: str
    state: CloneState
    live: bool
    """It went on from its source's memory."""
    created: float
    """Seconds since the epoch."""
    report: str = ""
    """What was done to make it somebody else, and what was read back: JSON."""
    identities: tuple[tuple[str, str], ...] = ()
    """What was read from it that has to differ from all of its kin: name, value."""
    unproven: tuple[str, ...] = ()
    """Names of what the caller took the risk of."""


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
    cloned: Cloned | None = None
    policy: tuple[str, ...] = ()
    """How it may leave a host that is drained, first choice first; none: the host's."""
    apart: tuple[str, ...] = ()
    """Groups whose members are never to be on one host."""


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
