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
        "before"
    )
