# SPDX-License-Identifier: Apache-2.0
"""Peers whose image caches are asked before an image's source.

The peer is asked by the image's key, which its source and its digest there make, and
holds it by a lease meanwhile. For that the operation has a transfer without volumes in
the peer's mailbox; what a killed one leaves of it the peer gives up after reclaim_age.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from oslo_log import log as logging

from virtmigrate import (
    __version__,
    assistance,
    errors,
    model,
    node,
    peer,
    peers,
    reading,
)

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """An image that a peer holds for us."""

    peer: str
    source: reading.Source
    """Its bytes, raw."""
    root: str
    """Of the manifest of these bytes, as the peer recorded it."""


class Neighbours:
    """The peers that are asked. Safe to share between threads."""

    def __init__(self, here: node.Node) -> None:
        self._here = here
        self._names = [n for n in here.options.image_peers if n != here.name]

    @contextlib.contextmanager
    def holding(
        self, key: str, operation: str, check: assistance.Check
    ) -> Iterator[Found | None]:
        """Yield the image of a key, as the first peer has it that has it.

        None where no peer has it, or none that has it answers. What is held is given
        up in the end. Raises what check does.
        """
        with contextlib.ExitStack() as stack:
            opened = peers.Peers(self._here)
            stack.callback(opened.close)
            yield self._first(stack, opened, key, operation, check)

    # Private

    def _first(
        self,
        stack: contextlib.ExitStack,
        opened: peers.Peers,
        key: str,
        operation: str,
        check: assistance.Check,
    ) -> Found | None:
        for name in self._names:
            check()
            try:
                found = self._ask(stack, opened.get(name), key, operation, check)
            except errors.Error as e:
                LOG.warning("peer=%s does not tell whether it has %s: %s", name, key, e)
                continue
            if found is not None:
                return found
        return None

    def _ask(
        self,
        stack: contextlib.ExitStack,
        other: peer.Peer,
        key: str,
        operation: str,
        check: assistance.Check,
    ) -> Found | None:
        card = other.card()
        if card.release != __version__:
            # Its door may have other rules.
            LOG.info("peer=%s has release %s: not asked", other.name, card.release)
            return None
        stack.enter_context(self._introduced(other, operation))
        for backend in card.backends:
            if backend.pieces:
                # libvirt reads nothing there.
                continue
            answer = other.find_image(operation, key, backend.name, check)
            if answer is not None and answer.name and answer.digest is not None:
                stack.callback(_leave, other.release, operation, backend.name)
                source = other.image(backend, answer.name, answer.size)
                return Found(other.name, source, answer.digest.root)
        return None

    @contextlib.contextmanager
    def _introduced(self, other: peer.Peer, operation: str) -> Iterator[None]:
        """Have a transfer at a peer, so that its receiver listens."""
        transfer = model.Transfer(
            operation=operation,
            request="",
            instance=operation,
            source=self._here.name,
            peer=other.name,
            state=model.TransferState.RESERVED,
            generation=0,
            volumes=(),
            created=time.time(),
        )
        try:
            other.transfers.publish(operation, transfer)
            yield
        finally:
            _leave(other.forget, operation)


# Private


def _leave(call: Callable[..., object], *args: str) -> None:
    """Take away what is left at a peer, or leave it to the peer."""
    try:
        call(*args)
    except errors.Error as e:
        LOG.warning("operation=%s: the peer clears up by itself: %s", args[0], e)
