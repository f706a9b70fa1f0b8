# SPDX-License-Identifier: Apache-2.0
"""Manifests: equal roots if and only if the bytes are equal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmigrate import manifest
from virtmigrate.units import GiB, KiB, MiB, TiB

BLOCK = 64  # bytes; small, so that hypothesis makes many blocks


def of(data: bytes, block_size: int = BLOCK) -> manifest.Manifest:
    made = manifest.Manifest(len(data), block_size)
    for index in range(0, len(data), block_size):
        made.add(index // block_size, data[index : index + block_size])
    return made


# A few values only, so that equal blocks and zeros are frequent.
CONTENTS = st.lists(st.sampled_from([b"\0" * 32, b"\0" * 31 + b"\1", b"a" * 32])).map(
    b"".join
)


@given(one=CONTENTS, other=CONTENTS)
@settings(max_examples=300, deadline=None)
def test_equal_roots_mean_equal_bytes(one: bytes, other: bytes) -> None:
    assert (of(one).root() == of(other).root()) == (one == other)


@given(data=st.binary(min_size=1, max_size=500), where=st.integers(0), bit=st.just(1))
@settings(max_examples=200, deadline=None)
def test_any_changed_byte_changes_the_root(data: bytes, where: int, bit: int) -> None:
    changed = bytearray(data)
    changed[where % len(data)] ^= bit
    assert of(data).root() != of(bytes(changed)).root()


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, 10 * BLOCK])
def test_zeros_need_no_block(size: int) -> None:
    untouched = manifest.Manifest(size, BLOCK)
    assert untouched.root() == of(bytes(size)).root()
    assert set(of(bytes(size)).digests()) == {0}


def test_size_counts_even_where_all_is_zeros() -> None:
    roots = {manifest.Manifest(size, BLOCK).root() for size in range(3 * BLOCK)}
    assert len(roots) == 3 * BLOCK


def test_block_size_counts() -> None:
    data = b"a" * BLOCK
    assert of(data).root() != of(data, 2 * BLOCK).root()


def test_block_that_becomes_zeros_is_forgotten() -> None:
    made = of(b"a" * BLOCK)
    assert not made.add(0, bytes(BLOCK))
    assert made.root() == of(bytes(BLOCK)).root()


def test_last_block_is_as_long_as_what_is_left() -> None:
    made = manifest.Manifest(MiB + 10)
    assert made.add(1, b"a" * 10)
    longer = manifest.Manifest(MiB + 10)
    longer.add(1, b"a" * 10 + b"\0")
    assert made.root() != longer.root()


def test_empty_volume() -> None:
    assert manifest.Manifest(0).root() == of(b"", MiB).root()


def test_order_of_adding_is_all_the_same() -> None:
    backwards = manifest.Manifest(3 * BLOCK, BLOCK)
    for index, letter in ((2, b"c"), (0, b"a"), (1, b"b")):
        backwards.add(index, letter * BLOCK)
    data = b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK
    assert backwards.root() == of(data).root()


@pytest.mark.parametrize(
    ("size", "block_size"),
    [
        (0, MiB),
        (1, MiB),
        (512 * GiB, MiB),
        (512 * GiB + 1, 2 * MiB),
        (TiB, 2 * MiB),
        (TiB + 1, 4 * MiB),
        (64 * TiB, 128 * MiB),
    ],
)
def test_block_size_doubles(size: int, block_size: int) -> None:
    assert manifest.block_size_for(size) == block_size
    assert -(-size // block_size) <= 512 * KiB


def test_digest_for_a_record() -> None:
    made = of(b"a" * 100)
    digest = made.digest()
    assert digest.root == made.root()
    assert (digest.size, digest.block_size) == (100, BLOCK)
    assert digest.version in manifest.READS


@pytest.mark.parametrize(
    ("data", "zero"),
    [(b"", True), (b"\0", True), (b"\1", False), (b"\0" * 9 + b"\1", False)],
    ids=["empty", "zero", "one", "late"],
)
def test_is_zero(data: bytes, zero: bool) -> None:
    assert manifest.is_zero(data) is zero


# Blocks in pieces


@given(pieces=st.lists(st.sampled_from([b"", b"\0", bytes(9), b"a", b"\0b"])))
@settings(max_examples=300, deadline=None)
def test_fold_is_the_digest_of_all_pieces(pieces: list[bytes]) -> None:
    fold, holes = manifest.Fold(), manifest.Fold()
    for piece in pieces:
        assert fold.add(piece) == any(piece)
        if any(piece):
            holes.add(piece)
        else:
            holes.skip(len(piece))
        # Asking is no end.
        assert fold.digest() == holes.digest()
    assert fold.digest() == manifest.digest_of(b"".join(pieces))


@pytest.mark.parametrize("zeros", [MiB - 1, MiB, 3 * MiB + 7])
def test_fold_of_more_zeros_than_a_piece(zeros: int) -> None:
    fold = manifest.Fold()
    fold.skip(zeros)
    assert fold.digest() == manifest.ZERO
    assert fold.add(b"x")
    fold.skip(zeros)
    expected = manifest.digest_of(bytes(zeros) + b"x" + bytes(zeros))
    assert fold.digest() == expected


# What is not known


def test_unknown_is_like_nothing() -> None:
    known, other = of(b"a" * 3 * BLOCK), of(b"a" * 3 * BLOCK)
    assert list(known.unlike(other)) == []
    for made in (known, other):
        made[1] = manifest.UNKNOWN
    assert list(known.unlike(other)) == [1]
    assert list(manifest.Manifest.unknown(3 * BLOCK, BLOCK).unlike(other)) == [0, 1, 2]


@given(one=CONTENTS, other=CONTENTS)
@settings(max_examples=200, deadline=None)
def test_unlike_are_the_blocks_that_differ(one: bytes, other: bytes) -> None:
    def blocks(data: bytes) -> list[bytes]:
        return [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]

    one, other = one + one, other + other

    theirs = blocks(other)
    expected = [
        index
        for index, block in enumerate(blocks(one))
        if index >= len(theirs) or theirs[index] != block
    ]
    assert list(of(one).unlike(of(other))) == expected


def test_known_is_what_is_not_unknown() -> None:
    made = manifest.Manifest.unknown(2 * BLOCK + 1, BLOCK)
    for index in range(made.count):
        assert made.known() == index * BLOCK
        made[index] = manifest.ZERO
    assert made.known() == made.size
    assert made.root() == manifest.Manifest(2 * BLOCK + 1, BLOCK).root()


def test_digests_there_and_back() -> None:
    made = of(b"a" * BLOCK + bytes(BLOCK) + b"b")
    again = manifest.Manifest(made.size, BLOCK, made.digests())
    assert again.root() == made.root()
    assert made.slice(1, 3) == made[1] + made[2]
    assert made.slice(0, 3) == made.digests()


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_digests_of_another_number_of_blocks(length: int) -> None:
    with pytest.raises(ValueError, match="for 1 blocks"):
        manifest.Manifest(BLOCK, BLOCK, bytes(length))


@pytest.mark.parametrize(("index", "length"), [(-1, 32), (2, 32), (0, 31), (0, 33)])
def test_no_digest_moves_the_others(index: int, length: int) -> None:
    made = of(b"a" * 2 * BLOCK)
    with pytest.raises(IndexError):
        made[index] = bytes(length)
    assert made.root() == of(b"a" * 2 * BLOCK).root()
