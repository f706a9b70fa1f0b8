# SPDX-License-Identifier: Apache-2.0
"""The sinks that targets name."""

from pathlib import Path

from virtmigrate import errors, imagecache, node, sinks
from virtmigrate.livesnapshot.cached import CacheSink
from virtmigrate.livesnapshot.terms import Kind, Target


class Places:
    """Opens targets of one host. Safe to share between threads."""

    def __init__(
        self, here: node.Node, caches: imagecache.Caches, service: sinks.Service
    ) -> None:
        self._here = here
        self._caches = caches
        self._service = service

    def sink(self, target: Target, operation: str) -> sinks.Sink:
        """Return a target, to be filled; nothing was done there yet.

        Raises ConfigurationError, ImageNotTaken for what is none.
        """
        if target.kind is Kind.FILE:
            return sinks.FileSink(Path(target.where), operation)
        if target.kind is Kind.SERVICE:
            return self._service(target.where, is_new=target.is_new)
        if target.where not in self._here.backends:
            raise errors.ConfigurationError(
                reason=f"host {self._here.name} has no backend {target.where}; it has "
                + ", ".join(self._here.backends)
            )
        cache = self._caches.of(self._here.backend(target.where))
        return CacheSink(cache, target.name, operation)
