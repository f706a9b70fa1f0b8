# SPDX-License-Identifier: Apache-2.0
"""Requests and answers as bytes: only what is whole, and meant, is read."""

import random

import blake3
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmigrate import manifest, model, request
from virtmigrate.formats import DiskFormat
from virtmigrate.request import Answer, Request, State, Verb
from virtmigrate.units import MiB, TiB

OPERATION = "0123456789abcdef"

texts = st.text(max_size=255)
sizes = st.integers(0, 2**62)
hexes = st.text("0123456789abcdef", max_size=64)
requests = st.builds(
    Request,
    verb=st.sampled_from(Verb),
    operation=st.just(OPERATION),
    number=st.integers(0, request.NUMBERS - 1),
    nonce=hexes,
    volume=st.text("abcdefgh.-", max_size=255),
    size=sizes,
    format=st.none() | st.sampled_from(DiskFormat),
    sample=sizes,
    seed=hexes,
    root=hexes,
    lease=st.floats(0, 1e12),
    backend=st.text("abc-", max_size=31),
)
answers = st.builds(
    Answer,
    request=hexes,
    state=st.sampled_from(State),
    beat=sizes,
    done=sizes,
    reason=texts,
    name=st.text("abcdefgh.-", max_size=255),
    size=sizes,
    durable=st.booleans(),
    digest=st.none()
    | st.builds(
        model.Digest, version=st.just(1), size=sizes, block_size=sizes, root=hexes
    ),
)


def name_of(wanted: Request) -> str:
    return request.request_name(wanted.operation, wanted.number)


def resealed(data: bytes, old: bytes, new: bytes) -> bytes:
    """Change the text of a head, and seal it as its writer would."""
    text = data.rstrip(b"\0")[:-66]
    assert old in text
    text = text.replace(old, new, 1)
    sealed = text + b"\n" + blake3.blake3(text).hexdigest().encode() + b"\n"
    return sealed.ljust(request.HEAD, b"\0")


EXAMPLE = Request(verb=Verb.VERIFY, operation=OPERATION, number=3, volume="vda.x")
DATA = request.encode(EXAMPLE)
NAME = f"{OPERATION}.3.request"


@given(requests)
def test_request_survives(wanted: Request) -> None:
    data = request.encode(wanted)
    assert len(data) == request.HEAD
    assert request.decode(data, name_of(wanted)) == wanted


@given(answers)
def test_answer_survives(answer: Answer) -> None:
    data = request.encode_answer(answer, "op.3.answer")
    assert len(data) == request.HEAD
    found = request.decode_answer(data, "op.3.answer")
    assert len(found.reason) <= request.REASON_LIMIT and found.reason.isascii()
    assert msgspec.structs.replace(found, reason=answer.reason) == answer


@given(requests, st.integers(0, request.HEAD * 8 - 1))
def test_flipped_bit(wanted: Request, bit: int) -> None:
    data = bytearray(request.encode(wanted))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError):
        request.decode(bytes(data), name_of(wanted))


def test_every_flipped_byte_of_an_answer() -> None:
    data = request.encode_answer(Answer(request="ab", state=State.DONE), "a.answer")
    for index in range(len(data)):
        spoilt = bytearray(data)
        spoilt[index] ^= 0x20
        with pytest.raises(ValueError):
            request.decode_answer(bytes(spoilt), "a.answer")


@given(st.integers(0, request.HEAD - 1))
def test_truncated(length: int) -> None:
    for data in (DATA[:length], DATA[:length].ljust(request.HEAD, b"\0")):
        if data != DATA:
            with pytest.raises(ValueError):
                request.decode(data, NAME)


@given(st.binary(max_size=200))
def test_garbage(data: bytes) -> None:
    for each in (data, data.ljust(request.HEAD, b"\0"), DATA + data + b"x"):
        with pytest.raises(ValueError):
            request.decode(each, NAME)


@pytest.mark.parametrize(
    "name", [f"{OPERATION}.4.request", f"{OPERATION[::-1]}.3.request", NAME + "x", ""]
)
def test_wrong_name(name: str) -> None:
    with pytest.raises(ValueError, match="another name"):
        request.decode(DATA, name)


def test_sealed_name_that_is_not_the_bodys() -> None:
    other = f"{OPERATION}.4.request".encode()
    data = resealed(DATA, NAME.encode(), other)
    with pytest.raises(ValueError, match="another operation"):
        request.decode(data, other.decode())


def test_answer_is_no_request() -> None:
    data = request.encode_answer(Answer(request="ab", state=State.DONE), NAME)
    with pytest.raises(ValueError, match="another name"):
        request.decode(data, NAME)


def test_newer_version() -> None:
    for version in (b"2", b"999999999999999999999"):
        data = resealed(DATA, b"-request 1 ", b"-request " + version + b" ")
        with pytest.raises(request.TooNew):
            request.decode(data, NAME)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"-request 1 ", b"-request 0 "),
        (b"-request 1 ", b"-request x "),
        (b"-request 1 ", b"-request 01 "),
        (b"-request 1 ", b"-request "),
        (b'"verify"', b'"delete"'),
        (b'"size":0', b'"size":-1'),
        (b'"size":0', b'"size":4611686018427387905'),
        (b'"size":0', b'"size":1e3'),
        (b'"size":0', b'"size":"0"'),
        (b'"number":3', b'"number":64'),
        (b'"lease":0.0', b'"lease":-1.0'),
        (b'"lease":0.0', b'"lease":1e999'),
        (b'"seed":""', b'"seed":"x"'),
        (b'"seed":""', b'"seed":"A0"'),
        (b'"backend":""', b'"backend":"","more":1'),
        (b'"backend":""', b'"backend":"","size":9'),
        (b'"verb"', b' "verb"'),
        (b'"vda.x"', b'"' + b"v" * 256 + b'"'),
        (b'"vda.x"', b'"vda.x\\n"'),
        (b'"vda.x"', b'"../vda.x"'),
        (b'"vda.x"', '"vd\u00e4.x"'.encode()),
        (b'"seed":""', b'"seed":"0\\n"'),
        (b"{", b"["),
    ],
)
def test_sealed_and_not_understood(old: bytes, new: bytes) -> None:
    """A writer that seals nonsense: it is refused, and is no newer release."""
    data = resealed(DATA, old, new)
    with pytest.raises(ValueError) as caught:
        request.decode(data, NAME)
    assert not isinstance(caught.value, request.TooNew)


def test_request_that_does_not_fit() -> None:
    wide = "\x01" * 255
    wanted = msgspec.structs.replace(EXAMPLE, volume=wide * 3)
    with pytest.raises(ValueError, match="would have"):
        request.encode(wanted)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "host.rec.1",
        f"{OPERATION}.rec.1",
        f"{OPERATION}.3.answer",
        f"{OPERATION}.request",
        f"{OPERATION}.03.request",
        f"{OPERATION}.-1.request",
        f"{OPERATION}.64.request",
        f"{OPERATION}.100.request",
        f"{OPERATION}.٣.request",
        f"{OPERATION}.3.request\n",
        f"\n{OPERATION}.3.request",
        f"../{OPERATION}.3.request",
        f"{OPERATION[:-1]}.3.request",
        f"{OPERATION}0.3.request",
        f"{OPERATION.upper()}.3.request",
        f"{OPERATION}.3.request.request",
    ],
)
def test_names_of_no_request(name: str) -> None:
    assert request.parse_name(name) is None


@given(st.integers(0, request.NUMBERS - 1))
def test_names_of_requests(number: int) -> None:
    name = request.request_name(OPERATION, number)
    assert request.parse_name(name) == (OPERATION, number)
    assert request.answer_name(name) == f"{OPERATION}.{number}.answer"


@pytest.mark.parametrize(
    ("verb", "size", "blocks"),
    [
        (Verb.VERIFY, 0, 0),
        (Verb.VERIFY, 1, 1),
        (Verb.VERIFY, MiB + 1, 2),
        (Verb.IMPORT, 8 * TiB, 0),
        (Verb.REUSE, 2**62, 512 * 1024),
        (Verb.GROW, 8 * TiB, 0),
        (Verb.RECLAIM, 8 * TiB, 0),
        (Verb.HOLD, 8 * TiB, 0),
    ],
)
def test_size_of_an_answer(verb: Verb, size: int, blocks: int) -> None:
    wanted = Request(verb=verb, size=size)
    assert request.answer_size(wanted) == request.HEAD + blocks * manifest.LENGTH


# Manifests in answers


def proven(size: int) -> tuple[manifest.Manifest, Answer]:
    found = manifest.Manifest(size)
    for index in range(found.count):
        found[index] = random.Random(index).randbytes(32)
    answer = Answer(request="ab", state=State.DONE, digest=found.digest())
    return found, answer


@given(st.integers(0, 5 * MiB))
def test_manifest_survives(size: int) -> None:
    found, answer = proven(size)
    again = request.manifest_of(answer, size, found.digests())
    assert again.digests() == found.digests()


def test_manifest_that_is_not_the_heads() -> None:
    found, answer = proven(3 * MiB)
    data = found.digests()
    spoilt = bytearray(data)
    spoilt[70] ^= 1
    for size, payload in [
        (3 * MiB, bytes(spoilt)),
        (3 * MiB, data[:-1]),
        (3 * MiB, data + b"\0"),
        (3 * MiB, b""),
        (4 * MiB, data),
        (3 * MiB - 1, data),
    ]:
        with pytest.raises(ValueError):
            request.manifest_of(answer, size, payload)


@pytest.mark.parametrize("block_size", [0, 1, -1, 2 * MiB, 2**60])
def test_manifest_of_another_block_size(block_size: int) -> None:
    """A peer must not choose how much memory its answer takes."""
    found, answer = proven(3 * MiB)
    assert answer.digest is not None
    digest = msgspec.structs.replace(answer.digest, block_size=block_size)
    answer = msgspec.structs.replace(answer, digest=digest)
    with pytest.raises(ValueError, match="no manifest of this size"):
        request.manifest_of(answer, 3 * MiB, found.digests())


def test_answer_without_a_manifest() -> None:
    with pytest.raises(ValueError, match="no manifest"):
        request.manifest_of(Answer(request="ab", state=State.DONE), MiB, b"")


# Samples


@given(st.integers(0, 2000), st.integers(0, 2000), hexes)
def test_sampled(count: int, sample: int, seed: str) -> None:
    drawn = request.sampled(count, sample, seed)
    assert drawn == sorted(set(drawn)) == request.sampled(count, sample, seed)
    assert all(0 <= index < count for index in drawn)
    assert len(drawn) == (sample if 0 < sample < count else count)


def test_seeds_draw_other_samples() -> None:
    drawn = {tuple(request.sampled(1000, 10, f"{n:x}")) for n in range(20)}
    assert len(drawn) == 20
