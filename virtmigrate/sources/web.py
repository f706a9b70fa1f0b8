# SPDX-License-Identifier: Apache-2.0
"""Images on web servers: by HTTPS, or by HTTP, and with a digest always.

The URL may have secrets: neither what stands before its @ nor its query is shown.
Nothing is taken from the environment: no proxy, no .netrc.
"""

import functools
import urllib.parse

import requests

from virtmigrate import errors
from virtmigrate.sources import download
from virtmigrate.sources.base import Check, Checksum, Described, Write

_REDIRECTS = 5


class WebFile:
    """A file at a URL. Raises ImageUnavailable when the URL is none, or has no host.

    Arguments:
        url: https://... or http://...
        checksum: a strong one; a server's word proves nothing.
    """

    def __init__(
        self,
        url: str,
        fmt: str,
        checksum: Checksum,
        terms: download.Terms | None = None,
        min_disk: int = 0,
    ) -> None:
        self.origin = f"{shown(url)}#{checksum.algorithm}={checksum.hex}"
        self._url, self._format, self._checksum = url, fmt, checksum
        self._terms, self._min_disk = terms or download.Terms(), min_disk
        if checksum.is_weak:
            reason = f"{checksum.algorithm} does not prove what a server sends"
            raise errors.ImageRefused(image=self.origin, reason=reason)
        _require_web(url, self.origin)

    def described(self) -> Described:
        """Return what was declared, and the size that the server tells, if it does."""
        name = urllib.parse.urlsplit(self._url).path.rpartition("/")[2]
        return Described(
            name or self.origin,
            self._format,
            self._size,
            self._checksum,
            self._min_disk,
        )

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """See Source.read()."""
        with _session() as session:
            request = functools.partial(self._ask, session, "GET")
            download.Download(self.origin, request, self._terms).read(
                write, check, start
            )

    # Private

    @functools.cached_property
    def _size(self) -> int | None:
        with _session() as session:
            return download.patiently(
                self.origin, self._terms, lambda: self._told(session), lambda: None
            )

    def _told(self, session: requests.Session) -> int | None:
        try:
            with self._ask(session, "HEAD", {"Accept-Encoding": "identity"}) as answer:
                length = answer.headers.get("Content-Length", "")
                is_told = answer.status_code == requests.codes.ok and length.isdecimal()
                return int(length) if is_told else None
        except download.BROKEN as e:
            raise download.broken(e) from None

    def _ask(
        self, session: requests.Session, method: str, headers: dict[str, str]
    ) -> requests.Response:
        url, timeout = self._url, self._terms.timeout
        for _ in range(_REDIRECTS + 1):
            answer = session.request(
                method,
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(timeout, timeout),
                verify=self._terms.ca_file or True,
            )
            if not answer.is_redirect:
                return answer
            answer.close()
            url = self._followed(url, answer.headers["Location"])
        reason = f"it was sent elsewhere more than {_REDIRECTS} times"
        raise errors.ImageUnavailable(image=self.origin, reason=reason)

    def _followed(self, url: str, location: str) -> str:
        following = urllib.parse.urljoin(url, location)
        _require_web(following, self.origin)
        if url.startswith("https:") and not following.startswith("https:"):
            reason = f"it was sent from https to {shown(following)}"
            raise errors.ImageUnavailable(image=self.origin, reason=reason)
        return following


def shown(url: str) -> str:
    """Return a URL without what may be secret: user, password, query, fragment."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "a URL that cannot be read"
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


# Private


def _require_web(url: str, origin: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        is_web = (
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        )
    except ValueError:
        is_web = False
    if not is_web:
        reason = "only URLs with https:// or http:// are fetched"
        raise errors.ImageUnavailable(image=origin, reason=reason)


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    return session
