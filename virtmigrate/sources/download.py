# SPDX-License-Identifier: Apache-2.0
"""Reading an image over HTTP: tried again, and gone on with where it was.

How a request is made is the caller's; here is what becomes of its answer. An attempt
that brought new bytes starts the time for retries anew. Bytes that were handed on are
not handed on again: the rest is asked for, and where a server sends all again, what is
known is passed over. That both are of one version, the digest tells in the end.
"""

import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import requests
import tenacity
import urllib3
from oslo_config import cfg
from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.sources.base import CHUNK, Check, Write

LOG = logging.getLogger(__name__)

BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    urllib3.exceptions.HTTPError,
)
"""What a connection that broke raises."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 5.0
_SLOWEST = 1024
"""Bytes per second below which a server counts as one that does not answer."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

T = TypeVar("T")


@dataclass(frozen=True)
class Terms:
    """How patient a download is, and whom it trusts."""

    timeout: float = 30.0
    """Seconds to connect, to answer, and between two pieces."""
    retry_seconds: float = 120.0
    """Seconds without any new byte for which it is tried again."""
    ca_file: str | None = None
    """Certificates to verify by; None for those of requests."""

    @classmethod
    def configured(cls, conf: cfg.ConfigOpts) -> "Terms":
        """Return what an operator set."""
        group = conf["virtmigrate"]
        return cls(
            timeout=group.image_source_timeout,
            retry_seconds=group.image_retry_timeout,
            ca_file=group.image_ca_file,
        )


class Passing(Exception):
    """What may be over when it is tried again; its text names no secret."""


class Download:
    """One image that is being read.

    Arguments:
        request: asks for the image with more headers, and returns the open answer.
    """

    def __init__(
        self,
        origin: str,
        request: Callable[[dict[str, str]], requests.Response],
        terms: Terms,
    ) -> None:
        self._origin, self._request, self._terms = origin, request, terms
        self._position = 0

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """See Source.read()."""
        self._position = start
        patiently(
            self._origin,
            self._terms,
            lambda: self._attempt(write, check),
            check,
            lambda: self._position,
        )

    # Private

    def _attempt(self, write: Write, check: Check) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        check()
        with self._asked(headers) as response:
            if self._is_all(response):
                return
            skip = self._offset(response)
            for data in _pieces(response, self._terms.timeout):
                check()
                fresh = data[skip:]
                skip -= len(data) - len(fresh)
                if fresh:
                    write(fresh)
                    self._position += len(fresh)

    def _asked(self, headers: dict[str, str]) -> requests.Response:
        try:
            return self._request(headers)
        except BROKEN as e:
            raise broken(e) from None

    def _is_all(self, response: requests.Response) -> bool:
        """Tell whether nothing is left: it broke right at the end."""
        if response.status_code != requests.codes.requested_range_not_satisfiable:
            return False
        return response.headers.get("Content-Range") == f"bytes */{self._position}"

    def _offset(self, response: requests.Response) -> int:
        """Return how many bytes of the answer are known already."""
        if response.status_code == requests.codes.ok:
            return self._position
        if response.status_code != requests.codes.partial_content:
            fail(response.status_code, self._origin)
        found = _RANGE.match(response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != self._position:
            raise self._unavailable("it sent another part than was asked for")
        return 0

    def _unavailable(self, reason: str) -> errors.ImageUnavailable:
        return errors.ImageUnavailable(image=self._origin, reason=reason)


def patiently(
    origin: str,
    terms: Terms,
    attempt: Callable[[], T],
    check: Check,
    position: Callable[[], int] = lambda: 0,
) -> T:
    """Try until it works, or brought nothing new for too long.

    Arguments:
        position: how far it is. An attempt that brings less than a chunk counts as
            one that brought nothing.

    Raises ImageUnavailable, and what attempt raises but Passing.
    """
    patience = _Patience(terms.retry_seconds, position)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Passing),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE),
        stop=patience.is_over,
        sleep=lambda seconds: _pause(seconds, check),
        before_sleep=lambda state: _tell(origin, state),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except Passing as e:
        raise errors.ImageUnavailable(image=origin, reason=e) from None


def broken(error: BaseException) -> Passing:
    """Return what happened, without the URL that the library's own text has."""
    cause = _certificate_error(error)
    if cause is not None:
        return Passing(f"its certificate is refused: {cause.verify_message}")
    return Passing(f"the connection failed ({type(error).__name__})")


def require_ok(response: requests.Response, origin: str) -> None:
    """Raise Passing or ImageUnavailable for an answer that is none."""
    if response.status_code != requests.codes.ok:
        fail(response.status_code, origin)


def fail(status: int, origin: str) -> NoReturn:
    """Raise what a status means: Passing, or ImageUnavailable."""
    if status in _PASSING:
        raise Passing(f"it answered {status}")
    raise errors.ImageUnavailable(image=origin, reason=f"it answered {status}")


# Private


class _Patience:
    def __init__(self, seconds: float, position: Callable[[], int]) -> None:
        self._seconds, self._position = seconds, position
        self._since, self._from = time.monotonic(), position()

    def is_over(self, _: tenacity.RetryCallState) -> bool:
        """Tell, at a failure, whether to give up."""
        now, position = time.monotonic(), self._position()
        if position - self._from >= CHUNK:
            self._since, self._from = now, position
        return now - self._since >= self._seconds


def _pieces(response: requests.Response, timeout: float) -> Iterator[bytes]:
    """Yield what comes as it comes. Raises Passing when it ends early, or drips."""
    began, count = time.monotonic(), 0
    while True:
        try:
            data = response.raw.read1(CHUNK, decode_content=False)
        except BROKEN as e:
            raise broken(e) from None
        if not data:
            return
        yield data
        count += len(data)
        now = time.monotonic()
        if now - began > timeout:
            if count < timeout * _SLOWEST:
                raise Passing(f"it sends less than {_SLOWEST} bytes per second")
            began, count = now, 0


def _certificate_error(
    error: BaseException | None,
) -> ssl.SSLCertVerificationError | None:
    seen = 0
    while error is not None and seen < 16:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        inner = [each for each in error.args if isinstance(each, BaseException)]
        reason = getattr(error, "reason", None)
        inner += [reason] if isinstance(reason, BaseException) else []
        error, seen = (inner[0] if inner else error.__context__), seen + 1
    return None


def _pause(seconds: float, check: Check) -> None:
    never, deadline = threading.Event(), time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        check()
        never.wait(min(left, 0.2))


def _tell(origin: str, state: tenacity.RetryCallState) -> None:
    outcome = state.outcome
    error = outcome.exception() if outcome else "?"
    LOG.warning("image=%s is tried again: %s", origin, error)
