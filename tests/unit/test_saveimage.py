# SPDX-License-Identifier: Apache-2.0
"""Heads of memory images: read, changed, and refused where anything is amiss."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmigrate import errors, saveimage
from virtmigrate.saveimage import LENGTH, Compression, Head

TEXTS = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]),
    min_size=1,
    max_size=200,
)
ROOM = 4096
HEADS = st.builds(
    Head,
    text=TEXTS,
    cookie=st.none() | TEXTS,
    is_running=st.booleans(),
    compression=st.sampled_from(Compression),
    room=st.integers(2000, ROOM),
    order=st.sampled_from(["little", "big"]),
)
STREAM = b"QEVM" + bytes(range(256))


def made(
    *,
    magic: bytes = b"LibvirtQemudSave",
    version: int = 2,
    running: int = 1,
    compressed: int = 0,
    offset: int = 10,
    unused: bytes = bytes(56),
    texts: bytes = b"<domain/>\0<c/>\0",
    room: int | None = None,
    order: str = "<",
) -> bytes:
    """A head as libvirt lays it out, written by the test's own hand."""
    length = len(texts) if room is None else room
    numbers = struct.pack(f"{order}5I", version, length, running, compressed, offset)
    return magic + numbers + unused + texts


@given(HEADS)
def test_what_was_written_is_read(head: Head) -> None:
    data = head.encode()
    assert len(data) == head.length == saveimage.head_length(data)
    assert saveimage.decode(data + STREAM) == head


@given(HEADS, TEXTS)
def test_another_text_moves_nothing(head: Head, text: str) -> None:
    before, changed = head.encode(), head.with_text(text)
    after = changed.encode()
    assert len(after) == len(before)
    assert after[:32] == before[:32]
    assert saveimage.decode(after).cookie == head.cookie
    assert changed.with_text(head.text).encode() == before


@given(HEADS, st.data())
def test_truncated_is_refused(head: Head, data: st.DataObject) -> None:
    whole = head.encode()
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(errors.SaveImageRefused):
        saveimage.decode(whole[:length])


@given(HEADS, st.data())
def test_damaged_never_becomes_longer(head: Head, data: st.DataObject) -> None:
    """A changed byte is refused, or what is read is written back as it stands."""
    whole = bytearray(head.encode())
    place = data.draw(st.integers(0, LENGTH - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    try:
        found = saveimage.decode(bytes(whole))
    except errors.SaveImageRefused:
        return
    assert found.encode() == bytes(whole[: found.length])


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(errors.SaveImageRefused):
        saveimage.decode(data)


@pytest.mark.parametrize("order", ["<", ">"])
def test_layout(order: str) -> None:
    found = saveimage.decode(made(order=order) + STREAM)
    assert (found.text, found.cookie) == ("<domain/>", "<c/>")
    assert found.is_running
    assert found.compression is Compression.NONE
    assert found.order == {"<": "little", ">": "big"}[order]
    assert found.encode() == made(order=order)


def test_without_cookie() -> None:
    found = saveimage.decode(made(offset=0, texts=b"<domain/>\0\0\0"))
    assert found.cookie is None
    assert found.encode() == made(offset=0, texts=b"<domain/>\0\0\0")


@pytest.mark.parametrize(
    ("said", "head"),
    {
        "not written to its end": made(magic=b"LibvirtQemudPart"),
        "does not begin as one": made(magic=b"QEVMQEVMQEVMQEVM"),
        "version 1 is not known": made(version=1),
        "version 3 is not known": made(version=3),
        "compression 7": made(compressed=7),
        "says 2 of whether": made(running=2),
        "does not have": made(unused=b"\0" * 55 + b"\1"),
        "cookie is at 9": made(offset=9),
        "cookie is at 4000": made(offset=4000),
        "has no end": made(texts=b"<domain/>\0<c/>"),
        "is empty": made(offset=0, texts=b"\0\0\0"),
        "follows its texts": made(offset=0),
        "within its head": made(room=500),
        "would have 4294967295": made(room=2**32 - 1),
        "would have 0": made(room=0),
        "not UTF-8": made(offset=0, texts=b"\xff\xfe\0"),
    }.items(),
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "head",
)
def test_refused(said: str, head: bytes) -> None:
    with pytest.raises(errors.SaveImageRefused, match=said):
        saveimage.decode(head)


@pytest.mark.parametrize("text", ["", "a\0b", "\ud800"], ids=["empty", "nul", "half"])
def test_no_text(text: str) -> None:
    with pytest.raises(errors.SaveImageRefused):
        saveimage.decode(made()).with_text(text)


def test_no_room() -> None:
    head = saveimage.decode(made())
    with pytest.raises(errors.SaveImageRefused, match="room for 15"):
        head.with_text("<domain />")
    assert head.with_text("<d-main/>").text == "<d-main/>"
