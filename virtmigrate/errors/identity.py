# SPDX-License-Identifier: Apache-2.0
"""Making a clone somebody else."""

from virtmigrate.errors.instances import InstanceError


class IdentityError(InstanceError):
    msg = "instance {instance} on {host}: {reason}"


class GuestFailed(IdentityError):
    msg = "the guest of instance {instance} on {host} failed: {doing}: {reason}"


class IdentityRefused(IdentityError):
    msg = (
        "instance {instance} on {host} cannot be made somebody else for certain: "
        "{reason}. Nothing was changed. Put the guest right, or name what to risk: a "
        "clone then stays off the network"
    )


class HookFailed(IdentityError):
    msg = (
        "a hook in the guest of instance {instance} on {host} failed: {hook}: "
        "{reason}. The hooks before it have run, those after it have not"
    )


class IdentityFailed(IdentityError):
    msg = (
        "instance {instance} on {host} is not somebody else yet: step {step}: "
        "{reason}. Keep it off the network: {state}. Change it again, or destroy it"
    )
