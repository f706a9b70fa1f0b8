# SPDX-License-Identifier: Apache-2.0
"""What the process that looks says to the one that asked, which does not trust it."""

from __future__ import annotations

import msgspec

from virtmigrate.door.terms import Limits, Refusal

LONGEST = 16 * 1024
"""Bytes of an answer."""
_REASON = 300
"""Characters of a reason that are shown."""


class Answer(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Either why not, or what it is."""

    refused: str = ""
    format: str = ""
    virtual_size: int = 0


def understood(data: bytes, declared: str, limits: Limits) -> int:
    """Return the size in an answer. Raises Refusal, also for what is no answer."""
    try:
        answer = msgspec.json.decode(data[:LONGEST], type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise Refusal("the look at it gave no answer") from e
    if answer.refused:
        raise Refusal(answer.refused)
    if answer.format != declared or not 0 < answer.virtual_size <= limits.max_size:
        raise Refusal("the look at it gave an answer that cannot be")
    return answer.virtual_size


def plain(text: str) -> str:
    """Return a text in which nothing of an image reaches a terminal or a log raw."""
    shown = text[:_REASON].encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= _REASON else shown[:_REASON] + "..."
