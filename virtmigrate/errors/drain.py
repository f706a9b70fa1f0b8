# SPDX-License-Identifier: Apache-2.0
"""Hosts that are emptied."""

from virtmigrate.errors.base import Error
from virtmigrate.errors.hosts import HostError


class HostDraining(HostError):
    """It takes no new instances; nothing was made or moved."""

    msg = (
        "host {host} is drained since {since} and takes no instances; nothing was "
        "touched. `virtmigrate host drain --stop` on it ends that"
    )


class DrainRefused(Error):
    msg = "draining host {host} is refused: {reason}. Nothing was moved"


class PlanDamaged(Error):
    msg = "the file {path} is no plan of a return ({reason}); nothing was moved"


class WayMissing(Error):
    """A way of moving that this installation does not have."""

    msg = "instance {instance} cannot move {way}: {reason}. Nothing was touched"


class NotArrived(Error):
    """The source gave the instance up, and the peer did not get it going."""

    msg = (
        "moving instance {instance} ({operation}): it was handed over to {peer}, which "
        "could not finish taking it: {reason}. Its data is whole. Drain again to go "
        "on, or `virtmigrate instance revert {instance}` to take it back"
    )
