# SPDX-License-Identifier: Apache-2.0
"""Images that were made of instances of a host, and lie in its caches only."""

from virtmigrate import errors
from virtmigrate.sources.base import Check, Described, Write


class SavedImage:
    """One that an image cache has, or nobody.

    Arguments:
        name: what it was called when it was made, with the operation's id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.origin = f"saved:{name}"

    def described(self) -> Described:
        """Return what its slot in a cache is known by."""
        return Described(self.name, "raw")

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """See Source.read(). It cannot be fetched again: raises ImageUnavailable."""
        raise errors.ImageUnavailable(
            image=self.origin,
            reason="it was made of an instance, and this backend's cache has it not "
            "any more",
        )
