# SPDX-License-Identifier: Apache-2.0
"""What records say of moves."""

import enum

from virtmigrate.formats import DiskFormat
from virtmigrate.model.instances import Instance
from virtmigrate.model.volumes import Digest, Proof, Role
from virtmigrate.schema import Struct


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


class Live(Struct, frozen=True):
    """What a transfer of a running instance says besides."""

    xml: str
    """The configuration that it runs with; the peer makes it its own."""
    ready: bool = False
    """The peer noted that it waits for it, and its volumes there can be filled."""


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
    live: Live | None = None
    """Its guest runs on; None for a cold move. `record` is set from the beginning."""
