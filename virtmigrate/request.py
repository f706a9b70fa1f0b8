# SPDX-License-Identifier: Apache-2.0
"""What a source asks of a peer's receiver, and what it is answered: as bytes.

Both lie in the peer's mailbox, as volumes of fixed size:

    OPERATION.NUMBER.request    one head
    OPERATION.NUMBER.answer     one head, then room for the digests of a manifest

A head is 4096 bytes: a line (magic, version, length, name), JSON, a BLAKE3 digest
of both, zeros. A head that is being written is no valid one. The digests are
written before the head that vouches for them by their root.
"""

import enum
import random
import re
from typing import Annotated, TypeVar

import blake3
import msgspec

from virtmigrate import manifest, model
from virtmigrate.formats import DiskFormat
from virtmigrate.units import MiB

VERSION = 1
READS = (1,)

HEAD = 4096
"""Bytes of a request, and of the first part of an answer."""

NUMBERS = 64
"""Requests of one operation that may lie in a mailbox at once."""

PIECES = 16
"""Pieces of one volume that may be under way at once."""

PIECE_LIMIT = 64 * MiB
"""Bytes of a piece."""

LEASE_LIMIT = 7 * 86400.0
"""Seconds that an image is held at most; a lease can be renewed."""

REASON_LIMIT = 400
"""Characters of a reason; JSON makes at most six bytes of each."""

_REQUEST = b"virtmigrate-request"
_ANSWER = b"virtmigrate-answer"
_LETTER = re.compile(r"([0-9a-f]{16})\.[0-9]{1,2}\.(?:request|answer)")
_NAME = re.compile(r"([0-9a-f]{16})\.(0|[1-9][0-9]?)\.request")

Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
# Not "$", which a newline may follow.
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]*\Z", max_length=255)]
Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]*\Z", max_length=64)]

T = TypeVar("T", bound=msgspec.Struct)


class TooNew(ValueError):
    """It is whole, and a newer release wrote it."""


class Verb(enum.Enum):
    VERIFY = "verify"
    """Read an incoming volume at the peer and answer with its manifest."""
    GROW = "grow"
    """Make an incoming volume larger."""
    IMPORT = "import"
    """Write a piece, a file in incoming, into an incoming volume of a backend that
    libvirt's streams do not reach."""
    HOLD = "hold"
    """Keep an image of the cache for the operation, and tell its name."""
    RELEASE = "release"
    """The operation needs its images no more."""
    REUSE = "reuse"
    """Make what an earlier move left of a disk the incoming volume of this one."""
    RECLAIM = "reclaim"
    """Remove what earlier moves left, until what is missing is free."""
    FINISH = "finish"
    """Take the instance that was given, as finish_migration does."""
    GIVE_BACK = "give back"
    """Take it away again and give it back, as destroy does."""
    EXPECT = "expect"
    """Note that a running instance is coming, and make what it is to be put into."""
    ARRIVE = "arrive"
    """Make what came running one of this host's instances."""
    CALL_OFF = "call off"
    """It does not come any more: remove what was made for it."""


class State(enum.Enum):
    WORKING = "working"
    """It was seen; the answer comes. The head changes while the work goes on."""
    DONE = "done"
    FAILED = "failed"
    """It was refused, or could not be done; `reason` says why."""


class Request(model.Struct, frozen=True):
    """What is asked. The client fills in operation, number and nonce."""

    verb: Verb
    operation: Hex = ""
    number: Annotated[int, msgspec.Meta(ge=0, lt=NUMBERS)] = 0
    nonce: Hex = ""
    """Random: an answer to an older request of the same name is not taken for its."""
    volume: Name = ""
    """An incoming volume of the transfer."""
    size: Size = 0
    """VERIFY: bytes that the volume has; IMPORT: that are to be written; GROW, REUSE:
    that it is to have; RECLAIM: that are missing; HOLD: that a guest sees of the
    image."""
    offset: Size = 0
    """IMPORT: where in the volume the piece is written."""
    piece: Name = ""
    """IMPORT: the file that holds it, from its beginning."""
    format: DiskFormat | None = None
    """HOLD: the image's. It stands on no other. None where it is named by its key."""
    sample: Size = 0
    """VERIFY: how many blocks to read; 0 means all."""
    seed: Hex = ""
    """VERIFY: draws the blocks, so that the peer could not know them before."""
    root: Hex = ""
    """HOLD: of the image's manifest, or without a format its key; RELEASE: of its
    manifest, empty for all images."""
    lease: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """HOLD: seconds."""
    backend: Name = ""
    """HOLD, RELEASE, RECLAIM: which of the peer's."""


class Answer(model.Struct, frozen=True):
    """What is said, so far."""

    request: Hex
    """Digest of the request that it answers."""
    state: State
    beat: int = 0
    """Changes while there is hope."""
    done: int = 0
    """Bytes that were worked on."""
    reason: str = ""
    name: Name = ""
    """HOLD: the image's volume."""
    size: int = 0
    """RECLAIM: bytes that were freed; HOLD: that a guest sees of the image."""
    durable: bool = False
    """VERIFY: the volume was fsynced before it was read."""
    digest: model.Digest | None = None
    """Vouches for the digests behind the head; HOLD: of the image."""


def piece_name(volume: str, number: int) -> str:
    """Return the file for a piece of a volume; it ends as all of the operation do."""
    disk, _, operation = volume.rpartition(".")
    return f"{disk}-p{number}.{operation}"


def request_name(operation: str, number: int) -> str:
    return f"{operation}.{number}.request"


def answer_name(request: str) -> str:
    """Return the name of the answer's volume, from that of the request's."""
    return request.removesuffix(".request") + ".answer"


def parse_name(name: str) -> tuple[str, int] | None:
    """Return a request's operation and number; None for what is no request."""
    found = _NAME.fullmatch(name)
    if found is None or int(found[2]) >= NUMBERS:
        return None
    return found[1], int(found[2])


def operation_of(name: str) -> str | None:
    """Return the operation of a request's or an answer's volume; None of any other."""
    found = _LETTER.fullmatch(name)
    return found[1] if found else None


def encode(request: Request) -> bytes:
    """Return a request's bytes; ValueError when it does not fit."""
    name = request_name(request.operation, request.number)
    return _seal(_REQUEST, name, request)


def decode(data: bytes, name: str) -> Request:
    """Return the request of this name.

    Raises ValueError when the bytes are not it, whole, TooNew when a newer
    release wrote them.
    """
    request = _open(_REQUEST, name, data, Request)
    if name != request_name(request.operation, request.number):
        raise ValueError("it speaks of another operation")
    return request


def digest(data: bytes) -> str:
    """Return what an answer calls a request by, from the request's bytes."""
    return blake3.blake3(data).hexdigest()


def encode_answer(answer: Answer, name: str) -> bytes:
    """Return the head of the answer of this name."""
    reason = answer.reason.encode("ascii", "replace").decode()[:REASON_LIMIT]
    return _seal(_ANSWER, name, msgspec.structs.replace(answer, reason=reason))


def decode_answer(data: bytes, name: str) -> Answer:
    """Return the answer in a head; ValueError as decode()."""
    return _open(_ANSWER, name, data, Answer)


def answer_size(request: Request) -> int:
    """Return the bytes of the answer's volume."""
    return HEAD + payload_size(request)


def payload_size(request: Request) -> int:
    """Return the bytes of the manifest that the answer brings."""
    if request.verb not in (Verb.VERIFY, Verb.REUSE):
        return 0
    block = manifest.block_size_for(request.size)
    return -(-request.size // block) * manifest.LENGTH


def manifest_of(answer: Answer, size: int, payload: bytes) -> manifest.Manifest:
    """Return the manifest of an answer.

    Raises ValueError when the digests are not those that the head vouches for, or
    not of a volume of this size.
    """
    block = manifest.block_size_for(size)
    if answer.digest is None or (size, block) != (
        answer.digest.size,
        answer.digest.block_size,
    ):
        raise ValueError("it brings no manifest of this size")
    found = manifest.Manifest(size, block, payload)
    if found.digest() != answer.digest:
        raise ValueError("its digests are not whole")
    return found


def sampled(count: int, sample: int, seed: str) -> list[int]:
    """Return the blocks of `count` that a seed draws, in order."""
    if not 0 < sample < count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), sample))


# Private


def _seal(magic: bytes, name: str, body: msgspec.Struct) -> bytes:
    payload = msgspec.json.encode(body)
    text = magic + f" {VERSION} {len(payload)} {name}\n".encode() + payload
    data = text + b"\n" + blake3.blake3(text).hexdigest().encode() + b"\n"
    if len(data) > HEAD:
        raise ValueError(f"{name} would have {len(data)} bytes")
    return data.ljust(HEAD, b"\0")


def _open(magic: bytes, name: str, data: bytes, kind: type[T]) -> T:
    if len(data) != HEAD:
        raise ValueError(f"it has {len(data)} bytes")
    text, _, rest = data.rstrip(b"\0").removesuffix(b"\n").rpartition(b"\n")
    if rest != blake3.blake3(text).hexdigest().encode():
        raise ValueError("its digest does not match")
    head, _, payload = text.partition(b"\n")
    fields = head.split(b" ", 3)
    if len(fields) != 4 or fields[0] != magic or fields[3] != name.encode():
        raise ValueError("it was written under another name")
    if fields[1].isdigit() and int(fields[1][:9]) > max(READS):
        raise TooNew(f"it is of version {int(fields[1][:9])}")
    # Only what we would write ourselves is read: one form for each content.
    try:
        body = msgspec.json.decode(payload, type=kind)
        if data == _seal(magic, name, body):
            return body
    except msgspec.MsgspecError as e:
        raise ValueError(f"it is not understood: {e}") from e
    raise ValueError("it is not as we would write it")
