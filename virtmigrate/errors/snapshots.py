# SPDX-License-Identifier: Apache-2.0
"""Snapshots of instances."""

from virtmigrate.errors.instances import InstanceError


class SnapshotError(InstanceError):
    msg = "instance {instance} on {host}: {reason}"


class SnapshotNotFound(SnapshotError):
    msg = "instance {instance} on {host} has no snapshot {snapshot}"


class SnapshotExists(SnapshotError):
    msg = "instance {instance} on {host} has a snapshot {snapshot} already"


class SnapshotRefused(SnapshotError):
    msg = "{doing} of instance {instance} on {host} is refused: {reason}"


class SnapshotFailed(SnapshotError):
    msg = (
        "{doing} of instance {instance} on {host} failed: {reason}. All is as it was "
        "before, and nothing of it is left"
    )


class SnapshotPutOff(SnapshotError):
    """It was cancelled when only room was left to be given back."""

    msg = (
        "instance {instance} on {host}: giving back the room of layers was cancelled. "
        "What was to be deleted is, the guest is as it was, and the layers stay until "
        "`virtmigrate host settle`, or the next settling of the driver, merges them"
    )


class SnapshotUndecided(SnapshotError):
    """It failed, and so did undoing it; settle() does that once it can."""

    msg = (
        "{doing} of instance {instance} on {host} failed: {reason}. Undoing it failed, "
        "too: {then}. The guest may be paused, or off. `virtmigrate host settle` "
        "undoes it, or finishes it where the guest went on in its layers"
    )
