# SPDX-License-Identifier: Apache-2.0
"""What hosts say of themselves."""

from virtmigrate.formats import DiskFormat
from virtmigrate.schema import Struct


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
    live: bool = False
    """It knows live migrations."""
