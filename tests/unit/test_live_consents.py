# SPDX-License-Identifier: Apache-2.0
"""What may come live, and for how long."""

import os
import time
import uuid
from pathlib import Path

import pytest

from virtmigrate.livemigration.consents import Consents

OURS, OTHER = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))


@pytest.fixture
def consents(tmp_path: Path) -> Consents:
    return Consents(tmp_path / "awaited", 60.0)


def make_older(tmp_path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(tmp_path / "awaited" / OURS, (then, then))


def test_without_any(consents: Consents) -> None:
    consents.sweep()
    consents.end(OURS)
    assert not consents.has(OURS)


def test_given_and_ended(consents: Consents) -> None:
    consents.give(OURS)
    consents.give(OURS.upper())
    consents.sweep()
    assert (consents.has(OURS), consents.has(OTHER)) == (True, False)
    consents.end(OURS)
    assert not consents.has(OURS)


def test_none_holds_for_ever(consents: Consents, tmp_path: Path) -> None:
    for each in (OURS, OTHER):
        consents.give(each)
    make_older(tmp_path, 61.0)
    assert not consents.has(OURS)
    consents.sweep()
    assert [path.name for path in (tmp_path / "awaited").iterdir()] == [OTHER]


def test_given_again(consents: Consents, tmp_path: Path) -> None:
    consents.give(OURS)
    make_older(tmp_path, 61.0)
    consents.give(OURS)
    consents.sweep()
    assert consents.has(OURS)


def test_a_name_that_is_no_uuid(consents: Consents) -> None:
    with pytest.raises(ValueError, match="badly formed"):
        consents.give("../journal")
