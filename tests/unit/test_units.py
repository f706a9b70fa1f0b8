# SPDX-License-Identifier: Apache-2.0
"""Sizes as people read them, and rounding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmigrate import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (units.KiB, "1.0 KiB"),
        (1536 * units.MiB, "1.5 GiB"),
        (units.MiB, "1.0 MiB"),
        (5000 * units.TiB, "5000.0 TiB"),
        (-2 * units.KiB, "-2.0 KiB"),
        (0.4, "0 B"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert units.format_bytes(count) == text


@given(value=st.integers(0, 2**70), step=st.integers(1, 2**40))
def test_round_up(value: int, step: int) -> None:
    rounded = units.round_up(value, step)
    assert rounded % step == 0
    assert value <= rounded < value + step
