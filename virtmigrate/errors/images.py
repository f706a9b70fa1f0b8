# SPDX-License-Identifier: Apache-2.0
"""Images that come in, and those that are there."""

from virtmigrate.errors.base import Error


class ImageError(Error):
    msg = "image {image}: {reason}"


class ImageRefused(ImageError):
    """What came in is not what was declared, or not safe to use."""

    msg = "image {image} is refused: {reason}. Nothing of it is used"


class ImageNotConverted(ImageError):
    msg = (
        "image {image} was not converted: {reason}. What was written of it is not used"
    )


class ImageUnavailable(ImageError):
    msg = "image {image} cannot be fetched: {reason}"


class ImageNotFetched(ImageError):
    """Another one, who fetched it for all that wait, failed; ask again to try anew."""

    msg = "image {image}: {host} could not fetch it: {reason}"


class ImageStalled(ImageNotFetched):
    """Another one, who fetches it for all that wait, lives and does not advance."""

    msg = (
        "image {image}: {host} fetches it, and has been at {done} of {total} bytes for "
        "{seconds:g} s (operation {operation}). It goes on there; look at that host, "
        "and ask again"
    )


class ImageNotFound(ImageError):
    msg = "host {host}: backend {backend} has no image {image}, or more than one"


class ImageGone(ImageError):
    """It was dropped while something was made of it."""

    msg = "host {host}: image {image} was dropped meanwhile; ask for it again"


class ImageInUse(ImageError):
    msg = "host {host}: image {image} stays, it is used: {reason}"


class DiskTooSmall(ImageError):
    msg = "volume {volume} of {size} bytes is too small: {image} needs {least}"


class ImageNotTaken(ImageError):
    """Whoever is to keep it does not, or not as it was sent."""

    msg = "image {image} was not stored: {reason}. It is not to be used"


class ImageNotSaved(ImageError):
    """An instance's disk became no image."""

    msg = (
        "no image {image} was made of instance {instance} on {host}: {reason}. The "
        "guest was left as it is{state}"
    )
