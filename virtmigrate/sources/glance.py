# SPDX-License-Identifier: Apache-2.0
"""Images of OpenStack's image service (Glance, API v2), by openstacksdk.

The SDK gives tokens, the catalogue and TLS. What is asked is asked plainly: an image's
entry, and its bytes, whose download goes on where it broke. Needs the extra `glance`.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import msgspec
import requests
from keystoneauth1 import exceptions

from virtmigrate import errors
from virtmigrate.sources import download
from virtmigrate.sources.base import Check, Checksum, Described, Write
from virtmigrate.units import GiB, MiB

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ENTRY = MiB
"""Bytes that an image's entry may have."""
_UNREACHED = (exceptions.ConnectFailure, exceptions.RetriableConnectionFailure)


class Service(Protocol):
    """What is used of the service's proxy."""

    def get(self, url: str, **options: Any) -> requests.Response:
        """Ask for a path below the service's endpoint."""
        ...


class Connection(Protocol):
    """A connection of openstacksdk; it looks for the service at its first use."""

    @property
    def image(self) -> Service: ...


class GlanceImage:
    """One image of the service. Raises ImageUnavailable when the id is no UUID.

    Arguments:
        connection: its session verifies certificates by what it was given, not by
            image_ca_file. Used by one thread at a time.
    """

    def __init__(
        self, connection: Connection, image_id: str, terms: download.Terms | None = None
    ) -> None:
        self.origin = f"glance:{image_id}"
        self._connection, self._terms = connection, terms or download.Terms()
        if not _ID.fullmatch(image_id):
            self.origin = "glance"
            raise self._unavailable("its id is no UUID")
        self._path = f"/images/{image_id}"

    def described(self) -> Described:
        """Return what the service says of the image now.

        Raises ImageUnavailable, also for one that is not active; ImageRefused for one
        in a container, or without a digest.
        """
        entry = download.patiently(self.origin, self._terms, self._entry, lambda: None)
        if entry.status != "active":
            raise self._unavailable(f"its status is {entry.status}, not active")
        if entry.container_format != "bare":
            raise self._refused(f"it is in a container ({entry.container_format})")
        return Described(
            name=entry.name or self.origin,
            format=entry.disk_format or "unknown",
            size=entry.size,
            checksum=self._checksum(entry),
            min_disk=entry.min_disk * GiB,
            virtual_size=entry.virtual_size,
            locations=entry.stored,
        )

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """See Source.read()."""
        request = download.Download(self.origin, self._data, self._terms)
        request.read(write, check, start)

    # Private

    def _data(self, headers: dict[str, str]) -> requests.Response:
        return self._ask(f"{self._path}/file", headers)

    def _entry(self) -> Entry:
        try:
            with self._ask(self._path, {"Accept": "application/json"}) as answer:
                download.require_ok(answer, self.origin)
                data = answer.raw.read(_ENTRY, decode_content=True)
        except download.BROKEN as e:
            raise download.broken(e) from None
        try:
            return msgspec.json.decode(data, type=Entry)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise self._unavailable(f"its entry cannot be read ({e})") from e

    def _ask(self, path: str, headers: dict[str, str]) -> requests.Response:
        timeout = self._terms.timeout
        try:
            return self._connection.image.get(
                path,
                headers=headers,
                stream=True,
                # It would read the answer for its debug log, and leave nothing of it.
                log=False,
                redirect=False,
                raise_exc=False,
                connect_retries=0,
                timeout=(timeout, timeout),
            )
        except _UNREACHED as e:
            raise download.broken(e) from None
        except exceptions.DiscoveryFailure as e:
            # All that is told of a service that does not answer at its first use.
            raise download.Passing(str(e)) from None
        except exceptions.ClientException as e:
            raise self._unavailable(str(e)) from e

    def _checksum(self, entry: Entry) -> Checksum:
        try:
            if entry.os_hash_algo and entry.os_hash_value:
                return Checksum(entry.os_hash_algo, entry.os_hash_value)
            if entry.checksum:
                return Checksum("md5", entry.checksum)
        except ValueError as e:
            raise self._refused(str(e)) from e
        raise self._refused("the service has no digest of it")

    def _refused(self, reason: str) -> errors.ImageRefused:
        return errors.ImageRefused(image=self.origin, reason=reason)

    def _unavailable(self, reason: str) -> errors.ImageUnavailable:
        return errors.ImageUnavailable(image=self.origin, reason=reason)


class Location(msgspec.Struct):
    """Where the service says that it stores an image."""

    url: str = ""


class Entry(msgspec.Struct):
    """What is used of an image's entry."""

    status: str
    name: str | None = None
    disk_format: str | None = None
    container_format: str | None = None
    size: int | None = None
    virtual_size: int | None = None
    min_disk: int = 0
    """GiB."""
    checksum: str | None = None
    """MD5."""
    os_hash_algo: str | None = None
    os_hash_value: str | None = None
    direct_url: str = ""
    locations: list[Location] = []

    @property
    def stored(self) -> tuple[str, ...]:
        """The places in Ceph clusters, each once. URLs of other stores have secrets."""
        urls = [self.direct_url, *(each.url for each in self.locations)]
        return tuple(dict.fromkeys(url for url in urls if url.startswith("rbd://")))
