# SPDX-License-Identifier: Apache-2.0
"""Sizes are int bytes and times float seconds everywhere; these make them readable."""

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB


def format_bytes(count: float) -> str:
    """Return a count of bytes as a person reads it: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of step that is not less than value."""
    return -(-value // step) * step
