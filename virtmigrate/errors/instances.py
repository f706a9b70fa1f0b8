# SPDX-License-Identifier: Apache-2.0
"""Instances, and who may run them."""

from virtmigrate.errors.base import Error


class InstanceError(Error):
    msg = "instance {instance} on {host}: {reason}"


class InstanceNotFound(InstanceError):
    msg = "instance {instance} is not on host {host}"


class InstanceExists(InstanceError):
    msg = "instance {instance} is already on host {host}: {reason}"


class InstanceBusy(InstanceError):
    msg = "instance {instance} on {host} is in another operation: {reason}"


class InvalidState(InstanceError):
    msg = "instance {instance} on {host} is {state}: {reason}"


class NotEntitled(InstanceError):
    msg = (
        "host {host} has no right to run instance {instance}: {reason}. Starting it "
        "here could make two of it, so it was not started"
    )


class HeldElsewhere(NotEntitled):
    msg = (
        "host {host} may not run instance {instance}: its disks in backend {backend} "
        "are {holder}'s. It was not started. Stop it there, or move it; if {holder} "
        "is down for good: `virtmigrate instance take-over {instance}`"
    )


class TakenAway(HeldElsewhere):
    msg = (
        "host {host} may not run instance {instance}: {holder} took it over, and it "
        "has left backend {backend} since. It was not started. Destroy what is left of "
        "it on this host"
    )


class QuiesceFailed(InstanceError):
    msg = "instance {instance} on {host} was not quiesced: {reason}. {state}"


class AgentNotThere(QuiesceFailed):
    msg = (
        "instance {instance} on {host} cannot be quiesced: {reason}. Nothing was "
        "frozen. Install qemu-guest-agent in the guest and start it, or do without "
        "quiescing"
    )


class TransientRefused(InstanceError):
    msg = (
        "disk {target} of instance {instance} on {host} is not made {wanted}: {reason}"
    )


class TakeOverRefused(InstanceError):
    msg = "taking instance {instance} over to {host} is refused: {reason}"


class OwnedElsewhere(InstanceError):
    msg = (
        "instance {instance} belongs to {owner}: use its own command ({command}), "
        "or --unmanaged-override if {owner} must not know"
    )
