# SPDX-License-Identifier: Apache-2.0
"""What is asked of snapshots."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from virtmigrate.snapshottree import Kind, Memory, Place


@dataclass(frozen=True)
class Wanted:
    """A snapshot that is to be taken."""

    name: str
    kind: Kind = Kind.DISK
    memory: Memory = Memory.NONE
    places: Mapping[str, Place] = field(default_factory=dict)
    """By target, where a disk's state is to be kept; others: where the backend does."""
    left_out: frozenset[str] = frozenset()
    """Targets of disks that are not frozen."""
    quiesce: bool = False
    """The guest's agent freezes its file systems, or the snapshot fails."""
    layer: str = ""
    """The first part of the names of the new layers; default: the disk's target."""
    description: str = ""
    automatic: bool = False
    """It may be deleted where chains get too deep (`flatten_chain`)."""
    by: str = ""
    timeout: float = 3600.0
    """Seconds until the writing of memory is given up."""


@dataclass(frozen=True)
class Return:
    """A snapshot that is to be gone back to."""

    snapshot: str
    """Its name or id."""
    power: str = ""
    """running, paused or off; default: as the guest was when it was taken, or for a
    disk snapshot as it is now."""
    configuration: bool | None = None
    """Bring its configuration back; default: that of a checkpoint."""
    delete_children: bool = False
    """Delete all that stands on it first, the leaves first."""
    keep: str = ""
    """Take a snapshot of this name of what is left, before."""
    layer: str = ""
    """As with Wanted."""
    by: str = ""


@dataclass(frozen=True)
class Step:
    """What a dry run says would be done."""

    what: str
    """freeze, layer, memory, restore, keep, drop, merge, remove, configure, power"""
    where: str
    """Disk, volume or snapshot."""
    how: str
