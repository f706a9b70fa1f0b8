# SPDX-License-Identifier: Apache-2.0
"""What records say: volumes, instances, transfers and hosts.

All sizes are bytes. Unknown fields are refused: a newer release that adds one
raises the schema.
"""

from virtmigrate.model.cards import BackendCard, HostCard
from virtmigrate.model.instances import (
    Change,
    Changing,
    Cloned,
    CloneState,
    DiskRef,
    Instance,
    InstanceState,
    Tenure,
)
from virtmigrate.model.transfers import Live, Transfer, TransferState, TransferVolume
from virtmigrate.model.volumes import (
    Digest,
    Hold,
    Layout,
    Origin,
    Proof,
    Role,
    Slot,
    Transient,
    Volume,
    VolumeState,
)
from virtmigrate.schema import Struct
from virtmigrate.snapshottree import Snapshot

__all__ = [
    "BackendCard",
    "Change",
    "Changing",
    "CloneState",
    "Cloned",
    "Digest",
    "DiskRef",
    "Hold",
    "HostCard",
    "Instance",
    "InstanceState",
    "Layout",
    "Live",
    "Origin",
    "Proof",
    "Role",
    "Slot",
    "Snapshot",
    "Struct",
    "Tenure",
    "Transfer",
    "TransferState",
    "TransferVolume",
    "Transient",
    "Volume",
    "VolumeState",
]
