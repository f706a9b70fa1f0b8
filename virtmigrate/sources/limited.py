# SPDX-License-Identifier: Apache-2.0
"""A source that is read no faster than somebody allows."""

from virtmigrate import limit
from virtmigrate.sources.base import Check, Described, Source, Write


class Limited:
    """Another source, held to a bandwidth.

    Arguments:
        limiter: may be shared with other sources.
    """

    def __init__(self, source: Source, limiter: limit.Limiter) -> None:
        self._source = source
        self._limiter = limiter

    @property
    def origin(self) -> str:
        return self._source.origin

    def described(self) -> Described:
        return self._source.described()

    def read(self, write: Write, check: Check, start: int = 0) -> None:
        """See Source.read()."""

        def paced(data: bytes) -> None:
            self._limiter.take(len(data), check)
            write(data)

        self._source.read(paced, check, start)
