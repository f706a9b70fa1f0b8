# SPDX-License-Identifier: Apache-2.0
"""Images of OpenStack's image service (Glance, API v2), made and filled.

The service makes an image active by itself when the last byte came. So a body that is
given up never ends as one that is whole: it is sent in chunks, and the one that ends it
is missing. What the service says of what it stored is compared afterwards, and the
image deleted when that is something else. Needs the extra `glance`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
import requests
from keystoneauth1 import exceptions

from virtmigrate import errors
from virtmigrate.sinks.base import Announced, Digest, Piece, padded
from virtmigrate.sources import glance as reading
from virtmigrate.sources.base import STRONG
from virtmigrate.sources.download import BROKEN, Terms
from virtmigrate.units import GiB, MiB

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ENTRY = MiB
_PATCH = "application/openstack-images-v2.1-json-patch"
_SAID = 200
"""Bytes of an answer that an error shows."""


class Connection(Protocol):
    """A connection of openstacksdk."""

    @property
    def image(self) -> Any: ...


class GlanceSink:
    """One image of the service. Raises ImageNotTaken when the id is no UUID.

    Arguments:
        is_new: begin() makes the image, under this id; else it is there, and queued.
        answer: seconds that the service may take to store what it got.
    """

    algorithm = "sha512"
    """The service's default; when it tells another one, that is counted as well."""

    def __init__(
        self,
        connection: Connection,
        image_id: str,
        terms: Terms,
        *,
        is_new: bool,
        answer: float,
    ) -> None:
        self._connection, self._terms = connection, terms
        self._id, self._is_new, self._answer = image_id, is_new, answer
        self._size = 0
        if not _ID.fullmatch(image_id):
            raise self._refused("its id is no UUID")
        self._path = f"/images/{image_id}"

    @property
    def place(self) -> str:
        return f"glance:{self._id}"

    def look(self) -> None:
        """See Sink.look(). Refuses an image that is not queued: it has bytes."""
        if not self._is_new:
            status = self._entry().status
            if status != "queued":
                raise self._refused(f"it is {status}, and only a queued one is filled")

    def begin(self, coming: Announced) -> None:
        self._size = coming.size
        if self._is_new:
            self._create(coming)
        else:
            self._describe(coming)

    def take(self, pieces: Iterator[Piece]) -> None:
        answer = self._ask(
            "PUT",
            f"{self._path}/file",
            data=_body(pieces),
            headers={"Content-Type": "application/octet-stream"},
            # A body can be sent once: keystoneauth would send what is left of it.
            allow_reauth=False,
            timeout=(self._terms.timeout, self._answer),
        )
        self._demand_ok(answer, "took no bytes")

    def prove(self, digest: Digest) -> str:
        entry = self._entry()
        if entry.status != "active":
            raise self._refused(f"it is {entry.status} after its last byte, not active")
        if entry.size != self._size:
            raise self._refused(
                f"the service has {entry.size} bytes of it instead of {self._size}"
            )
        algorithm, found = self._stored(entry)
        expected = digest(algorithm)
        if found != expected:
            raise self._refused(
                f"its {algorithm} is {found} at the service, and {expected} was sent"
            )
        return ""

    def publish(self) -> None:
        """It is active since its last byte came."""

    def abort(self, mark: str = "") -> None:
        answer = self._ask("DELETE", self._path)
        if answer.status_code != requests.codes.not_found:
            self._demand_ok(answer, "may still be there: it was not deleted")

    # Private

    def _create(self, coming: Announced) -> None:
        said = {
            **coming.properties,
            "id": self._id,
            "name": coming.name,
            "disk_format": coming.format,
            "container_format": "bare",
            "min_disk": -(-coming.virtual_size // GiB),
        }
        answer = self._ask(
            "POST",
            "/images",
            data=json.dumps(said).encode(),
            headers={"Content-Type": "application/json"},
        )
        self._demand_ok(answer, "was not made")

    def _describe(self, coming: Announced) -> None:
        core = {"disk_format": coming.format, "container_format": "bare"}
        changes = [
            *({"op": "replace", "path": f"/{k}", "value": v} for k, v in core.items()),
            *(
                {"op": "add", "path": f"/{_pointer(k)}", "value": v}
                for k, v in coming.properties.items()
            ),
        ]
        answer = self._ask(
            "PATCH",
            self._path,
            data=json.dumps(changes).encode(),
            headers={"Content-Type": _PATCH},
        )
        self._demand_ok(answer, "was not described")

    def _stored(self, entry: reading.Entry) -> tuple[str, str]:
        """Return a digest of what the service has; read back where it tells none."""
        if entry.os_hash_algo in STRONG and entry.os_hash_value:
            return entry.os_hash_algo, entry.os_hash_value
        found = hashlib.new(self.algorithm)
        source = reading.GlanceImage(self._connection, self._id, self._terms)
        source.read(found.update, lambda: None)
        return self.algorithm, found.hexdigest()

    def _entry(self) -> reading.Entry:
        answer = self._ask("GET", self._path, headers={"Accept": "application/json"})
        self._demand_ok(answer, "cannot be looked at")
        try:
            data = answer.raw.read(_ENTRY, decode_content=True)
            return msgspec.json.decode(data, type=reading.Entry)
        except (msgspec.DecodeError, UnicodeDecodeError, *BROKEN) as e:
            raise self._refused(f"its entry cannot be read ({e})") from e

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        timeout = (self._terms.timeout, self._terms.timeout)
        asked: dict[str, Any] = {"timeout": timeout, **options}
        try:
            found: requests.Response = self._connection.image.request(
                path,
                method,
                redirect=False,
                raise_exc=False,
                connect_retries=0,
                # The SDK's default sends a body again, which can be read once: what
                # is left of it would become an image.
                status_code_retries=0,
                stream=True,
                # It would read the answer for its debug log, and leave nothing of it.
                log=False,
                **asked,
            )
        except (exceptions.ClientException, requests.RequestException) as e:
            raise self._refused(f"the service does not answer ({e})") from e
        return found

    def _demand_ok(self, answer: requests.Response, what: str) -> None:
        if not answer.ok or answer.is_redirect:
            said = " ".join(_said(answer).split())
            raise self._refused(
                f"it {what}: the service said {answer.status_code} {said}"
            )

    def _refused(self, reason: str) -> errors.ImageNotTaken:
        return errors.ImageNotTaken(image=self.place, reason=reason)


# Private


def _body(pieces: Iterator[Piece]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, int):
            yield from padded(piece)
        elif piece:
            yield piece


def _said(answer: requests.Response) -> str:
    """Return the beginning of what an answer says."""
    with contextlib.suppress(*BROKEN):
        data: bytes = answer.raw.read(_SAID, decode_content=True)
        return data.decode(errors="replace")
    return ""


def _pointer(name: str) -> str:
    """Return a property's name as JSON Patch writes it."""
    return name.replace("~", "~0").replace("/", "~1")
