# SPDX-License-Identifier: Apache-2.0
"""An image of Nova's image service that is filled, in the name of who asked for it."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import nova.conf.service_token
from nova import context as nova_context
from nova import exception, service_auth
from nova.image import glance
from oslo_log import log as logging

from virtmigrate import errors, sinks
from virtmigrate.nova_plugin.glance import NovaImage
from virtmigrate.sources.base import STRONG
from virtmigrate.units import KiB

LOG = logging.getLogger(__name__)

_PIECE = 64 * KiB
"""Bytes that Nova's client asks for at once."""


class Uploads:
    """The image service. Safe to share between threads.

    What a killed process left is removed in the name of Nova's own user, by
    [service_user]; where there is none, or it may not, the log names the image.
    """

    def __init__(self) -> None:
        self._contexts: dict[str, Any] = {}

    @contextlib.contextmanager
    def asked_by(self, context: Any, image_id: str) -> Iterator[None]:
        """Fill an image in the name of a user meanwhile."""
        self._contexts[image_id] = context
        try:
            yield
        finally:
            del self._contexts[image_id]

    def __call__(self, image_id: str, *, is_new: bool) -> sinks.Sink:
        context = self._contexts.get(image_id)
        return Upload(context, image_id) if context else Leftover(image_id)


class Upload:
    """One image that is there, and queued: a sink. Used by one thread.

    The service makes it active by itself when it has the last byte. Nova's client
    sends a body that broke off again from where it stopped: that is refused here.
    """

    algorithm = "sha512"
    """The service's default; when it tells another one, that is counted as well."""

    def __init__(self, context: Any, image_id: str) -> None:
        self._context, self._id = context, image_id
        self._service = glance.API()
        self._coming: sinks.Announced | None = None

    @property
    def place(self) -> str:
        return f"glance:{self._id}"

    def look(self) -> None:
        """See Sink.look(). Refuses an image that is not queued: it has bytes."""
        status = self._entry().get("status")
        if status != "queued":
            raise self._refused(f"it is {status}, and only a queued one is filled")

    def begin(self, coming: sinks.Announced) -> None:
        """It is there; all that is said of it goes with its bytes."""
        self._coming = coming

    def take(self, pieces: Iterator[sinks.Piece]) -> None:
        assert self._coming is not None
        said = {
            "disk_format": self._coming.format,
            "container_format": "bare",
            "properties": dict(self._coming.properties),
        }
        body = _Body(pieces)
        try:
            with self._explained("took no bytes"):
                self._service.update(self._context, self._id, said, data=body)
        finally:
            # What ended the reading counts, whatever a client made of it.
            if body.error is not None:
                raise body.error

    def prove(self, digest: sinks.Digest) -> str:
        assert self._coming is not None
        entry = self._entry()
        if entry.get("status") != "active":
            raise self._refused(
                f"it is {entry.get('status')} after its last byte, not active"
            )
        if entry.get("size") != self._coming.size:
            raise self._refused(
                f"the service has {entry.get('size')} bytes of it instead of "
                f"{self._coming.size}"
            )
        algorithm, found = self._stored(entry)
        if found != (expected := digest(algorithm)):
            raise self._refused(
                f"its {algorithm} is {found} at the service, and {expected} was sent"
            )
        return ""

    def publish(self) -> None:
        """It is active since its last byte came."""

    def abort(self, mark: str = "") -> None:
        with (
            self._explained("may still be there"),
            contextlib.suppress(exception.ImageNotFound),
        ):
            self._service.delete(self._context, self._id)

    # Private

    def _entry(self) -> dict[str, Any]:
        with self._explained("cannot be looked at"):
            found: dict[str, Any] = self._service.get(
                self._context, self._id, show_deleted=False
            )
        return found

    def _stored(self, entry: dict[str, Any]) -> tuple[str, str]:
        """Return a digest of what the service has; read back where it tells none."""
        algorithm, value = entry.get("os_hash_algo"), entry.get("os_hash_value")
        if algorithm in STRONG and value:
            return str(algorithm), str(value)
        found = hashlib.new(self.algorithm)
        with self._explained("cannot be read back"):
            NovaImage(self._context, self._id).read(found.update, lambda: None)
        return self.algorithm, found.hexdigest()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Raise ImageNotTaken for whatever Nova's client raises."""
        try:
            yield
        except (errors.Error, errors.Cancelled):
            raise
        except Exception as e:
            raise self._refused(f"it {what}: {e}") from e

    def _refused(self, reason: str) -> errors.ImageNotTaken:
        return errors.ImageNotTaken(image=self.place, reason=reason)


class Leftover(Upload):
    """An image that a killed process was filling: it only goes."""

    def __init__(self, image_id: str) -> None:
        super().__init__(_own_context(), image_id)

    def abort(self, mark: str = "") -> None:
        """Remove it. Where that is not allowed it stays, as nobody's debt: Nova's
        other drivers leave theirs, too."""
        try:
            if self._context is None:
                raise self._refused("there is no [service_user] to remove it")
            super().abort(mark)
        except errors.ImageNotTaken as e:
            LOG.warning("%s. Remove it: openstack image delete %s", e, self._id)


# Private


def _own_context() -> Any:
    """Return a context of Nova's own user; None where it has none."""
    group = nova.conf.service_token.SERVICE_USER_GROUP
    auth = service_auth.get_service_auth_plugin(group)
    if auth is None:
        return None
    return nova_context.RequestContext(user_auth_plugin=auth, is_admin=True)


class _Body:
    """Pieces, as a file that is read once.

    Its truth is asked for once before each request that sends it (glanceclient's
    _chunk_body): a second one would send the rest as if it were all.
    """

    def __init__(self, pieces: Iterator[sinks.Piece]) -> None:
        self._bytes = _bytes(pieces)
        self._kept = b""
        self._is_begun = False
        self.error: BaseException | None = None

    def __bool__(self) -> bool:
        if self._is_begun:
            raise errors.ImageNotTaken(
                image="of this server", reason="the connection broke off"
            )
        return True

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        self._is_begun = True
        try:
            self._kept = self._kept or next(self._bytes, b"")
        except BaseException as e:
            self.error = e
            raise
        found, self._kept = self._kept[:size], self._kept[size:]
        return found


def _bytes(pieces: Iterator[sinks.Piece]) -> Iterator[bytes]:
    for piece in pieces:
        for data in sinks.padded(piece) if isinstance(piece, int) else (piece,):
            for at in range(0, len(data), _PIECE):
                yield data[at : at + _PIECE]
