# SPDX-License-Identifier: Apache-2.0
"""The formats that a disk's layer may have."""

from __future__ import annotations

import enum


class DiskFormat(enum.Enum):
    """How the bytes of one layer are to be read; always told, never probed."""

    RAW = "raw"
    """The guest's bytes as they are; can have no backing layer."""

    QCOW2 = "qcow2"
    """QEMU's copy-on-write format; may have a backing layer."""
