# SPDX-License-Identifier: Apache-2.0
"""The header of a memory image, as libvirt's QEMU driver writes it.

A file that libvirt saved a guest to begins with 92 bytes:

    16  magic
     4  version
     4  length of the texts that follow the header
     4  whether the guest ran
     4  how QEMU's stream is compressed
     4  where the second text, the cookie, begins; 0 where there is none
    56  unused, zeros

Then come the domain's XML, a NUL, the cookie, a NUL, and zeros up to the length that
the header says; then QEMU's stream. The numbers are in the byte order of the host that
wrote them. So the XML can be another one, as long as it has room, and nothing behind it
moves.

What is not known here is refused: a guess would start a guest with a part of another
one's memory.
"""

import dataclasses
import enum
import struct
from dataclasses import dataclass
from typing import Literal

from virtmigrate import errors
from virtmigrate.units import MiB

LENGTH = 92
"""Bytes of the header."""

MAX_HEAD = 16 * MiB
"""The longest head that is read: header and texts. libvirt's are some 70 KiB."""

_MAGIC = b"LibvirtQemudSave"
_PARTIAL = b"LibvirtQemudPart"
_VERSION = 2
_FIELDS = "16s5I56s"
_UNUSED = bytes(56)

Order = Literal["little", "big"]
_PREFIX: dict[Order, str] = {"little": "<", "big": ">"}


class Compression(enum.Enum):
    """How QEMU's stream is compressed; the head never is."""

    NONE = 0
    GZIP = 1
    BZIP2 = 2
    XZ = 3
    LZOP = 4


@dataclass(frozen=True)
class Head:
    """All that lies before QEMU's stream."""

    text: str
    """The domain's XML."""
    cookie: str | None
    """What libvirt has to know of the guest beside its XML; never changed here."""
    is_running: bool
    """Whether the guest ran when it was saved."""
    compression: Compression
    room: int
    """Bytes that the texts have, with their ends and padding."""
    order: Order = "little"
    """Of the numbers."""

    @property
    def length(self) -> int:
        """Bytes of the head: QEMU's stream begins there."""
        return LENGTH + self.room

    def with_text(self, text: str) -> "Head":
        """Return a head with another XML, for the same stream.

        Raises SaveImageRefused where it has no room for it, or it has a NUL.
        """
        made = dataclasses.replace(self, text=text)
        made.encode()
        return made

    def encode(self) -> bytes:
        """Return the bytes, `length` of them; SaveImageRefused if they do not fit."""
        text = _encoded(self.text)
        texts, offset = text + b"\0", 0
        if self.cookie is not None:
            offset = len(texts)
            texts += _encoded(self.cookie) + b"\0"
        if len(texts) > self.room:
            raise _refused(
                f"its texts would have {len(texts)} bytes, and there is room for "
                f"{self.room}"
            )
        numbers = (
            _VERSION,
            self.room,
            int(self.is_running),
            self.compression.value,
            offset,
        )
        header = struct.pack(_PREFIX[self.order] + _FIELDS, _MAGIC, *numbers, _UNUSED)
        return header + texts.ljust(self.room, b"\0")


def head_length(header: bytes) -> int:
    """Return how long the head is that begins with these LENGTH bytes.

    Raises SaveImageRefused for what is no whole memory image of a known version.
    """
    _, numbers = _numbers(header)
    return LENGTH + numbers[1]


def decode(data: bytes) -> Head:
    """Return what a head says.

    Arguments:
        data: at least head_length() bytes from the beginning of the file.

    Raises SaveImageRefused: it is truncated, damaged, not written to its end, or of a
    version that is not known.
    """
    order, (_, room, running, compression, offset) = _numbers(data)
    texts = data[LENGTH : LENGTH + room]
    if len(texts) < room:
        raise _refused(f"it ends after {len(data)} bytes, within its head")
    if running not in (0, 1):
        raise _refused(f"it says {running} of whether the guest ran")
    if compression not in {each.value for each in Compression}:
        raise _refused(f"its compression {compression} is not known")
    text, end = _text(texts, 0)
    cookie = None
    if offset:
        if offset != end:
            raise _refused(f"its cookie is at {offset}, and its XML ends at {end}")
        cookie, end = _text(texts, offset)
    if any(texts[end:]):
        raise _refused("something follows its texts")
    return Head(text, cookie, bool(running), Compression(compression), room, order)


# Private


def _numbers(data: bytes) -> tuple[Order, tuple[int, int, int, int, int]]:
    """Return the byte order and the numbers of a header whose version is known."""
    if len(data) < LENGTH:
        raise _refused(f"it has {len(data)} bytes, less than a header")
    if data.startswith(_PARTIAL):
        raise _refused("it was not written to its end")
    if not data.startswith(_MAGIC):
        raise _refused("it does not begin as one")
    for order in _PREFIX:
        found = struct.unpack_from(_PREFIX[order] + _FIELDS, data)
        if found[1] == _VERSION:
            break
    else:
        version = int.from_bytes(data[16:20], "little")
        raise _refused(f"its version {version} is not known")
    if any(found[6]):
        raise _refused("it uses fields that this version does not have")
    if not 2 <= found[2] <= MAX_HEAD - LENGTH:
        raise _refused(f"its texts would have {found[2]} bytes")
    return order, (found[1], found[2], found[3], found[4], found[5])


def _text(texts: bytes, start: int) -> tuple[str, int]:
    """Return a text and where what follows its end begins."""
    end = texts.find(b"\0", start)
    if end < 0:
        raise _refused("one of its texts has no end")
    if end == start:
        raise _refused("one of its texts is empty")
    try:
        return texts[start:end].decode(), end + 1
    except UnicodeDecodeError as e:
        raise _refused(f"one of its texts is not UTF-8: {e}") from e


def _encoded(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as e:
        raise _refused(f"a text cannot be written: {e}") from e
    if not data or b"\0" in data:
        raise _refused("a text would be empty, or have a NUL")
    return data


def _refused(reason: str) -> errors.SaveImageRefused:
    return errors.SaveImageRefused(reason=reason)
