# SPDX-License-Identifier: Apache-2.0
"""What a receiver does for a source, each verb within what the transfer allows.

Nothing in a request is believed: the volume has to be one of a transfer that is in
this host's mailbox and open, named after the operation, in the incoming area, a
plain file, and no larger than the transfer says.
"""

import contextlib
import re
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import blake3
from oslo_log import log as logging

from virtmigrate import (
    card,
    door,
    errors,
    manifest,
    model,
    node,
    progress,
    reading,
    request,
    reservation,
    stream,
)
from virtmigrate.backends import base, keeping, terms
from virtmigrate.model import TransferState, VolumeState
from virtmigrate.request import Request, Verb
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}")
_ASIDE = re.compile(r".+-r[0-9a-f]{8}\.([0-9a-f]{16})")

ACTIONS = (Verb.FINISH, Verb.GIVE_BACK, Verb.EXPECT, Verb.ARRIVE, Verb.CALL_OFF)
"""Verbs that are done by what the host's owner hands in."""

Action = Callable[[model.Transfer], object]


class Refused(Exception):
    """The request asks for what the transfer does not allow, or what is not there."""


class Work(Protocol):
    """What an errand tells while it works. Safe to share between threads."""

    def advance(self, count: int) -> None:
        """Say that so many bytes more were looked at."""

    def is_stopped(self) -> bool:
        """Tell whether nobody waits for it any more."""

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Mark a wait during which nothing advances, and that is alive all the same."""


class _Told(progress.Progress):
    """Progress that an errand's work is told of, and that it ends."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def check(self) -> None:
        if self._work.is_stopped():
            raise errors.Cancelled

    def advance(self, done: int, *, sent: int = 0) -> None:
        super().advance(done, sent=sent)
        self._work.advance(done)


@dataclass(frozen=True)
class Outcome:
    """What an answer says."""

    found: manifest.Manifest | None = None
    """What is proven of the volume."""
    name: str = ""
    size: int = 0
    digest: model.Digest | None = None
    """Of what is named, where nothing of it was read."""
    durable: bool = False
    after: Callable[[], object] | None = None
    """What is left to do once the answer is written."""


@dataclass(frozen=True)
class _Errand:
    """One request with all that belongs to it."""

    request: Request
    transfer: model.Transfer
    backend: base.Backend
    work: Work

    def volume(self) -> model.TransferVolume:
        """Return the transfer's volume that the request names; Refused without one."""
        name = self.request.volume
        if not _PLAIN.fullmatch(name) or not name.endswith(
            f".{self.request.operation}"
        ):
            raise Refused("the name is none of this operation's")
        for volume in self.transfer.volumes:
            if volume.name == name and not volume.shared and not volume.held:
                end = self.request.offset + self.request.size
                if end > reservation.sent_size(volume):
                    raise Refused("the transfer's volume is smaller")
                return volume
        raise Refused("the transfer has no such volume")


class Errands:
    """Does errands on one host. Safe to share between threads.

    Arguments:
        workers: threads that read one volume.
        actions: what the host's owner lets sources do besides, by upper floors.
    """

    def __init__(
        self,
        here: node.Node,
        workers: int = 2,
        actions: Mapping[Verb, Action] = types.MappingProxyType({}),
    ) -> None:
        self._here = here
        self._workers = workers
        self._actions = actions

    def perform(self, wanted: Request, work: Work) -> Outcome:
        """Do what is asked; can be called again with the same request.

        Raises Refused, errors.Error, Cancelled when the work was stopped.
        """
        verbs: dict[Verb, Callable[[_Errand], Outcome]] = {
            Verb.VERIFY: self._verify,
            Verb.GROW: self._grow,
            Verb.IMPORT: self._import,
            Verb.HOLD: self._hold,
            Verb.RELEASE: self._release,
            Verb.REUSE: self._reuse,
            Verb.RECLAIM: self._reclaim,
        }
        transfer = self._transfer(wanted)
        if wanted.verb in ACTIONS:
            return self._act(wanted.verb, transfer, work)
        backend = self._place(wanted, transfer)
        return verbs[wanted.verb](_Errand(wanted, transfer, backend, work))

    # Private: verbs

    def _act(self, verb: Verb, transfer: model.Transfer, work: Work) -> Outcome:
        action = self._actions.get(verb)
        if action is None:
            raise Refused("no driver runs here to do that, or accept_moves is off")
        with work.waiting():
            action(transfer)
        return Outcome()

    def _verify(self, errand: _Errand) -> Outcome:
        wanted, name = errand.request, errand.volume().name
        blocks = None
        if wanted.sample:
            count = manifest.Manifest(wanted.size).count
            blocks = request.sampled(count, wanted.sample, wanted.seed)
        found, durable = self._survey(errand, errand.backend, name, blocks)
        return Outcome(found, durable=durable)

    def _grow(self, errand: _Errand) -> Outcome:
        volume = errand.volume()
        # The source may have made it anew.
        self._demand_asked(errand)
        errand.backend.grow(volume.name, errand.request.size)
        return Outcome()

    def _import(self, errand: _Errand) -> Outcome:
        wanted, name = errand.request, errand.volume().name
        if errand.backend.capabilities.streams:
            raise Refused("streams reach this backend: it takes no pieces")
        numbers = range(request.PIECES)
        if wanted.piece not in {request.piece_name(name, n) for n in numbers}:
            raise Refused("the piece is none of this volume's")
        if wanted.size > request.PIECE_LIMIT:
            raise Refused(f"a piece has at most {request.PIECE_LIMIT} bytes")
        # The source may have made it anew.
        self._demand_asked(errand)
        end = wanted.offset + wanted.size
        with self._here.files.arrived(wanted.piece) as piece:
            if piece.size < wanted.size:
                raise Refused(f"the piece has only {piece.size} bytes")
            target = errand.backend.target(name, end)
            with piece.source, target.writer(end, lambda: None) as writer:
                for start in range(0, wanted.size, MiB):
                    until = min(start + MiB, wanted.size)
                    data = piece.source.read(start, until) or bytes(until - start)
                    writer.write(wanted.offset + start, data)
                    errand.work.advance(until - start)
        return Outcome()

    def _hold(self, errand: _Errand) -> Outcome:
        wanted, backend = errand.request, errand.backend
        until = time.time() + min(wanted.lease, request.LEASE_LIMIT)
        hold = model.Hold(operation=wanted.operation, until=until)
        if wanted.format is None:
            image = backend.images.known_as(wanted.root, door.RULES)
        else:
            image = keeping.Image(wanted.root, wanted.format, wanted.size)
        name = backend.images.hold(image, hold) if image and image.root else None
        if image is None or name is None or not _PLAIN.fullmatch(name):
            # A name that is not plain fits in no answer.
            raise Refused("there is no such image")
        digest = backend.volumes.read(name).body.digest
        return Outcome(name=name, size=image.size, digest=digest)

    def _release(self, errand: _Errand) -> Outcome:
        names = {volume.backend for volume in errand.transfer.volumes}
        for name in sorted({*names, errand.request.backend} - {""}):
            images = self._backend(name).images
            images.release(errand.request.operation, errand.request.root)
        return Outcome()

    def _reuse(self, errand: _Errand) -> Outcome:
        volume, instance = errand.volume(), errand.transfer.instance
        with contextlib.ExitStack() as stack:
            with errand.work.waiting():
                stack.enter_context(self._here.claimed(instance))
            # The transfer may have ended while the instance was another's.
            self._transfer(errand.request)
            for retired in reversed(errand.backend.retired(instance)):
                if _is_like(retired, volume):
                    outcome = self._reuse_one(errand, retired)
                    if outcome is not None:
                        return outcome
        raise Refused("nothing is left of this disk")

    def _reuse_one(self, errand: _Errand, retired: model.Volume) -> Outcome | None:
        backend = errand.backend
        with backend.claims.of(retired.name) as is_ours:
            kept = backend.manifest(retired.name) if is_ours else None
            if kept is None:
                return None
            aside = aside_name(errand.request)
            try:
                found = self._switch(errand, retired, kept, aside)
            except errors.Cancelled:
                # Who asks again finds it there.
                if not self._is_asked(errand.request):
                    backend.incoming.delete(aside)
                raise
            except Exception:
                backend.incoming.delete(aside)
                raise
        if found is None:
            return None
        # Until the answer is written a repeated request finds its way by the record.
        return Outcome(found, after=lambda: backend.remove(retired.name))

    def _switch(
        self,
        errand: _Errand,
        retired: model.Volume,
        kept: manifest.Manifest,
        aside: str,
    ) -> manifest.Manifest | None:
        """Make a retired volume the incoming one, and return what it holds.

        The source may have gone on without it, and made the incoming volume anew:
        all is done under another name, but for the last step.
        """
        backend, wanted, work = errand.backend, errand.request, errand.work
        self._demand_asked(errand)
        with work.waiting():
            state = backend.set_aside(retired, aside, wanted.volume, wanted.size)
        if state is terms.Reuse.GONE:
            return None
        if state is terms.Reuse.MOVED:
            found = kept.fitted(wanted.size)
        else:
            is_switched = state is terms.Reuse.SWITCHED
            name = wanted.volume if is_switched else aside
            found, _ = self._survey(errand, backend, name)
        if state is not terms.Reuse.SWITCHED:
            self._demand_asked(errand)
            backend.switch(aside, wanted.volume)
        return found

    def _reclaim(self, errand: _Errand) -> Outcome:
        # The source says how much it lacks; this host knows better.
        backend, box = errand.backend, self._here.mailbox
        room = reservation.Room(
            box, card.of(backend, self._here.files), backend.incoming
        )
        wanted = min(errand.request.size, room.missing(errand.transfer))

        def enough(freed: int) -> bool:
            errand.work.advance(1)
            if errand.work.is_stopped():
                raise errors.Cancelled
            return freed >= wanted

        freed = errand.backend.reclaim(enough, last=errand.transfer.instance)
        return Outcome(size=freed)

    # Private

    def _transfer(self, wanted: Request) -> model.Transfer:
        stored = self._here.mailbox.transfers.find(wanted.operation)
        if stored is None or stored.body.operation != wanted.operation:
            raise Refused("there is no such transfer")
        state = stored.body.state
        in_any = (Verb.RELEASE, *ACTIONS)
        if state is not TransferState.RESERVED and wanted.verb not in in_any:
            raise Refused(f"the transfer is {state.value}")
        return stored.body

    def _demand_asked(self, errand: _Errand) -> None:
        """Raise Cancelled when nobody waits any more; Refused as _transfer()."""
        self._transfer(errand.request)
        if errand.work.is_stopped() or not self._is_asked(errand.request):
            raise errors.Cancelled

    def _is_asked(self, wanted: Request) -> bool:
        """Tell whether the request lies in the mailbox still."""
        name = request.request_name(wanted.operation, wanted.number)
        try:
            data = self._here.mailbox.pool.read(name, limit=request.HEAD)
            return request.decode(data, name) == wanted
        except (ValueError, errors.ShortTransfer, errors.VolumeNotFound):
            return False

    def _place(self, wanted: Request, transfer: model.Transfer) -> base.Backend:
        """Return the backend in which something is wanted."""
        found = [v.backend for v in transfer.volumes if v.name == wanted.volume]
        name = found[0] if found else wanted.backend
        # Without any the volume is refused, by its name.
        return self._backend(name) if name else self._here.files

    def _backend(self, name: str) -> base.Backend:
        backend = self._here.backends.get(name)
        if backend is None:
            raise Refused("there is no such backend")
        return backend

    def _survey(
        self,
        errand: _Errand,
        backend: base.Backend,
        name: str,
        blocks: Sequence[int] | None = None,
    ) -> tuple[manifest.Manifest, bool]:
        """Read all or some of an incoming volume; tell if it was fsynced before."""
        work, size = errand.work, errand.request.size
        # Of a sample, no more than its blocks.
        ahead = manifest.block_size_for(size) if blocks else reading.WINDOW
        tuning = stream.Tuning(self._workers)
        with (
            backend.arrived(name, ahead) as found,
            stream.Mover(tuning, progress=_Told(work)) as mover,
        ):
            if found.size != size:
                raise Refused(f"it has {found.size} bytes and not {size}")
            with work.waiting():
                durable = found.flush()
            return mover.survey(found.source, blocks), durable


def aside_name(wanted: Request) -> str:
    """Return the name under which a retired volume is made what a request wants.

    Another request has another one; it ends as all names of the operation do.
    """
    own = blake3.blake3(wanted.nonce.encode()).hexdigest(length=4)
    disk = wanted.volume.removesuffix(f".{wanted.operation}")
    return f"{disk}-r{own}.{wanted.operation}"


def aside_operation(name: str) -> str | None:
    """Return the operation in such a name; None for any other."""
    found = _ASIDE.fullmatch(name)
    return found[1] if found else None


# Private


def _is_like(retired: model.Volume, volume: model.TransferVolume) -> bool:
    """Tell whether a retired volume was the same disk, or the same layer of it."""
    same = retired.name.rpartition(".")[0] == volume.name.rpartition(".")[0]
    return (
        same
        and retired.state is VolumeState.RETIRED
        and retired.format is volume.format
    )
