# SPDX-License-Identifier: Apache-2.0
"""What is asked for when an image is made of an instance, and what came of it."""

import enum
import uuid as uuids
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from virtmigrate.schema import Struct


class Quiesce(enum.Enum):
    """Whether the guest's agent freezes its file systems for the switch."""

    NO = "no"
    TRY = "try"
    """If it can; else the image is what a power cut would have left."""
    DEMAND = "demand"
    """Or no image is made. A guest that is off has nothing to freeze."""


class Stage(enum.Enum):
    """How far it is, for who keeps the instance's state."""

    FROZEN = "frozen"
    """The guest writes elsewhere; its disks stand still."""
    SENDING = "sending"
    """The bytes go."""


class Kind(enum.Enum):
    """What an image becomes."""

    FILE = "file"
    SERVICE = "glance"
    CACHE = "cache"


class Target(Struct, frozen=True):
    """Where the image of one disk goes."""

    kind: Kind
    where: str
    """A path, an image's id, a backend's name."""
    name: str
    """For people; of a file its last part."""
    is_new: bool = True
    """Of the image service: it is made, too; else it is there, and queued."""

    def beside(self, disk: str) -> "Target":
        """Return where the image of another disk goes."""
        if self.kind is Kind.FILE:
            path = Path(self.where)
            other = path.with_name(f"{path.stem}-{disk}{path.suffix}")
            return msgspec.structs.replace(self, where=str(other), name=other.name)
        where = str(uuids.uuid4()) if self.kind is Kind.SERVICE else self.where
        return msgspec.structs.replace(
            self, where=where, name=f"{self.name}-{disk}", is_new=True
        )


def _ignore(stage: Stage) -> None:
    """Nobody keeps the instance's state."""


@dataclass(frozen=True)
class Wanted:
    """Images that are to be made of an instance."""

    target: Target
    """Of its root disk."""
    format: str
    """raw or qcow2."""
    compress: bool = False
    """A qcow2 image is compressed, which takes room for one in staging."""
    all_disks: bool = False
    """One of each disk that the guest writes to, all of the same moment."""
    quiesce: Quiesce = Quiesce.NO
    trim: bool = False
    """Before that the agent discards what the file systems do not use any more."""
    keep_layer: bool = False
    """The disks stay frozen, as a snapshot of the instance."""
    bandwidth: int = 0
    """Bytes per second; 0: no limit of its own."""
    timeout: float = 14400.0
    """Seconds for all of it."""
    by: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)
    """What an image service keeps beside it."""
    told: Callable[[Stage], object] = _ignore
    """Is told how far it is; what it raises ends the work, and goes on."""


@dataclass(frozen=True)
class Saved:
    """An image that was made."""

    disk: str
    """The target of the disk."""
    place: str
    format: str
    size: int
    """Bytes that were sent."""
    virtual_size: int
    consistency: str
    """What a guest finds that starts from it; "off" of one that was off."""
    digest: str
    """ALGORITHM:HEX of what was sent, which is what is there."""
