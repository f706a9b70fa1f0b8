# SPDX-License-Identifier: Apache-2.0
"""The migration string: whole, of this instance and release, or refused."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtmigrate import errors, manifest, model
from virtmigrate.formats import DiskFormat
from virtmigrate.migration import ticket

INSTANCE = "11111111-2222-3333-4444-555555555555"
DIGEST = model.Digest(version=1, size=4096, block_size=1048576, root="ab" * 32)


def made(instance: str = INSTANCE) -> ticket.Ticket:
    return ticket.Ticket(
        version=ticket.VERSION,
        operation="0123456789abcdef",
        instance=instance,
        source="alpha",
        digests={"vda.0123456789abcdef": DIGEST},
        record="cd" * 16,
    )


TEXT = ticket.write(made())


def test_round_trip() -> None:
    assert ticket.read(TEXT, INSTANCE) == made()


@given(where=st.integers(0, len(TEXT) - 1), letter=st.characters())
@settings(max_examples=500, deadline=None)
def test_damaged_anywhere(where: int, letter: str) -> None:
    damaged = TEXT[:where] + letter + TEXT[where + 1 :]
    if damaged != TEXT:
        with pytest.raises(errors.TicketDamaged):
            ticket.read(damaged, INSTANCE)


def test_every_character_is_guarded() -> None:
    for where, letter in enumerate(TEXT):
        damaged = TEXT[:where] + chr(ord(letter) ^ 1) + TEXT[where + 1 :]
        with pytest.raises(errors.TicketDamaged):
            ticket.read(damaged, INSTANCE)


@given(length=st.integers(0, len(TEXT) - 1))
@settings(max_examples=100, deadline=None)
def test_cut_short(length: int) -> None:
    with pytest.raises(errors.TicketDamaged):
        ticket.read(TEXT[:length], INSTANCE)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", TEXT + " ", TEXT * 2, "virtmigrate:1:", "\ud800"],
    ids=["empty", "nova", "null", "longer", "twice", "headless", "surrogate"],
)
def test_no_ticket(text: str) -> None:
    with pytest.raises(errors.TicketDamaged):
        ticket.read(text, INSTANCE)


def test_of_another_instance() -> None:
    text = ticket.write(made("other"))
    with pytest.raises(errors.TicketDamaged, match="of instance other"):
        ticket.read(text, INSTANCE)


def test_of_a_newer_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket, "VERSION", ticket.VERSION + 1)
    text = ticket.write(made())
    monkeypatch.undo()
    with pytest.raises(errors.TicketDamaged, match="version 2"):
        ticket.read(text, INSTANCE)


@pytest.mark.parametrize(
    "body",
    ["{", "{}", '{"version": 1, "unknown": 2}', "[1]"],
    ids=["no-json", "empty", "unknown-field", "other-type"],
)
def test_sealed_but_no_ticket(body: str) -> None:
    text = f"virtmigrate:{ticket.VERSION}:{ticket._digest(body)}:{body}"
    with pytest.raises(errors.TicketDamaged):
        ticket.read(text, INSTANCE)


def volume(name: str, digest: model.Digest | None) -> model.TransferVolume:
    return model.TransferVolume(
        name=name,
        backend="default",
        source=f"of-{name}",
        target="vda",
        role=model.Role.ROOT,
        format=DiskFormat.RAW,
        size=4096,
        length=4096,
        room=4096,
        digest=digest,
    )


def test_of_a_transfer_names_what_was_sent() -> None:
    digest = manifest.Manifest(4096).digest()
    transfer = model.Transfer(
        operation="op",
        request="req-1",
        instance=INSTANCE,
        source="alpha",
        peer="beta",
        state=model.TransferState.GIVEN,
        generation=3,
        volumes=(volume("sent", digest), volume("shared", None)),
        created=time.time(),
    )
    found = ticket.of(transfer)
    assert found.digests == {"sent": digest}
    assert (found.operation, found.instance, found.source) == ("op", INSTANCE, "alpha")
    assert ticket.read(ticket.write(found), INSTANCE) == found
