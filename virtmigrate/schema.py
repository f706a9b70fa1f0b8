# SPDX-License-Identifier: Apache-2.0
"""How all that records say is typed."""

import msgspec


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen, strictly typed structure."""
