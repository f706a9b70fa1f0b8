# SPDX-License-Identifier: Apache-2.0
"""An image of Nova's image service, asked for in the name of the user who boots it."""

from typing import Any

from cryptography.exceptions import InvalidSignature
from cursive import exception as cursive
from nova import exception
from nova.image import glance

from virtmigrate import errors
from virtmigrate.sources.base import CHUNK, Check, Checksum, Described, Write
from virtmigrate.units import GiB


class NovaImage:
    """A source of the image cache. Used by one thread at a time.

    Who may not see the image gets none: each use asks the service. Signatures are
    verified while it is fetched where Nova's [glance]verify_glance_signatures says so.

    Arguments:
        context: Nova's, of the user.
    """

    def __init__(self, context: Any, image_id: str) -> None:
        self.origin = f"glance:{image_id}"
        self._context, self._id = context, image_id
        self._service = glance.API()

    def described(self) -> Described:
        """Return what the service says of the image now; see Source.described()."""
        try:
            entry = self._service.get(
                self._context, self._id, include_locations=True, show_deleted=False
            )
        except exception.NovaException as e:
            raise errors.ImageUnavailable(image=self.origin, reason=e) from e
        if entry.get("status") != "active":
            raise errors.ImageUnavailable(
                image=self.origin, reason=f"its status is {entry.get('status')}"
            )
        return Described(
            name=entry.get("name") or self.origin,
            format=entry.get("disk_format") or "unknown",
            size=entry.get("size"),
            checksum=self._checksum(entry),
            min_disk=int(entry.get("min_disk") or 0) * GiB,
            locations=_locations(entry),
        )

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """See Source.read(). Nova's client has no ranges: what is known is passed
        over."""
        check()
        sink = _Sink(write, check, start)
        try:
            self._service.download(self._context, self._id, data=sink)
        except (InvalidSignature, cursive.SignatureVerificationError) as e:
            raise errors.ImageRefused(
                image=self.origin, reason=f"its signature is not valid: {e}"
            ) from e
        except exception.NovaException as e:
            raise errors.ImageUnavailable(image=self.origin, reason=e) from e

    # Private

    def _checksum(self, entry: dict[str, Any]) -> Checksum:
        algorithm, digest = entry.get("os_hash_algo"), entry.get("os_hash_value")
        if not (algorithm and digest):
            algorithm, digest = "md5", entry.get("checksum")
        if not digest:
            raise errors.ImageRefused(
                image=self.origin, reason="the service has no digest of it"
            )
        try:
            return Checksum(str(algorithm), str(digest))
        except ValueError as e:
            raise errors.ImageRefused(image=self.origin, reason=e) from e


class _Sink:
    """What Nova writes an image into, as into a file."""

    def __init__(self, write: Write, check: Check, start: int) -> None:
        self._write, self._check, self._skip = write, check, start

    def write(self, data: bytes) -> None:
        self._check()
        passed = min(self._skip, len(data))
        self._skip -= passed
        for at in range(passed, len(data), CHUNK):
            self._write(data[at : at + CHUNK])

    def truncate(self, size: int) -> None:
        """Nova empties a file whose signature is wrong; ours is refused anyway."""


def _locations(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return where it is stored, if that is a place without passwords."""
    found = [each.get("url", "") for each in entry.get("locations") or ()]
    found.append(entry.get("direct_url") or "")
    return tuple(sorted({url for url in found if url.startswith("rbd://")}))
