# SPDX-License-Identifier: Apache-2.0
"""Memory images, and instances that are made of others."""

from virtmigrate.errors.base import Error
from virtmigrate.errors.instances import InstanceError


class SaveImageRefused(Error):
    msg = "the memory image is refused: {reason}"


class CloneError(InstanceError):
    msg = "clones of instance {instance} on {host}: {reason}"


class CloneRefused(CloneError):
    """Nothing was touched."""

    msg = "cloning instance {instance} on {host} is refused: {reason}"


class CloneFailed(CloneError):
    """One clone failed; `clone` is its UUID."""

    msg = (
        "clone {clone} of instance {instance} on {host} failed: {reason}. Nothing of "
        "it is left; the source and other clones go on"
    )
