# SPDX-License-Identifier: Apache-2.0
"""One image from its source into a backend: staged, checked at the door, filled in.

What lies in staging has passed nothing yet, and is read by the door alone.
"""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import (
    door,
    errors,
    filling,
    manifest,
    model,
    neighbours,
    node,
    reading,
    slots,
    sources,
    staging,
)
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role, VolumeState
from virtmigrate.progress import Progress
from virtmigrate.rollback import Rollback
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

_PLAIN = ("raw", "iso")
"""Formats whose bytes are the disk's."""

_EXCERPT = 2 * MiB


class Fetcher:
    """Fills one slot of a backend."""

    def __init__(
        self,
        here: node.Node,
        backend: base.Backend,
        near: neighbours.Neighbours,
    ) -> None:
        self._here = here
        self._backend = backend
        self._neighbours = near
        self._limits = door.Limits.configured(here.conf)

    def fetch(
        self,
        claim: slots.Claim,
        source: sources.Source,
        described: sources.Described,
        progress: Progress,
    ) -> model.Volume:
        """Return the image, published in its slot; on failure nothing of it stays.

        Raises ImageRefused, ImageNotFetched, NoSpace, Cancelled, slots.Lost.
        """

        def check() -> None:
            progress.check()
            claim.demand()

        with staging.opened(self._here, claim.operation) as place, Rollback() as undo:
            work = _Work(claim, source, described, place, undo, progress, check)
            image = self._shared(work) or self._near(work) or self._brought(work)
            claim.fill(image.name)
            undo.commit()
            return image

    # Private

    def _shared(self, work: "_Work") -> model.Volume | None:
        """Return the image, if its service keeps it raw in this very storage.

        It is read once, for its checksum, its digest and the door.
        """
        described = work.described
        checksum, size = described.checksum, described.size
        if described.format not in _PLAIN or checksum is None or not size:
            return None
        self._demand_size(work, size)
        volume = self._volume(work, f"{checksum.algorithm}:{checksum.hex}", size)
        filler = filling.Filler(self._here, self._backend)
        filler.reserve(volume, work.undo)
        if not self._backend.share(described.locations, volume):
            return None
        return filler.proven(volume, self._reviewed(volume, size, checksum, work))

    def _near(self, work: "_Work") -> model.Volume | None:
        """Return the image, if it comes from a peer's cache.

        Whatever fails there is a warning, and its source is asked. Only what has a
        strong checksum has the same key on two hosts, and is the same.
        """
        checksum = work.described.checksum
        if checksum is None or checksum.is_weak:
            return None
        claim = work.claim
        with self._neighbours.holding(claim.key, claim.operation, work.check) as found:
            if found is None or not self._is_fit(found.source.size, work.described):
                return None
            try:
                return self._copied(found, checksum, work)
            except errors.Error as e:
                LOG.warning("image=%s not from %s: %s", claim.key, found.peer, e)
                return None

    def _is_fit(self, size: int, described: sources.Described) -> bool:
        """Tell whether a volume of a peer has the size that it would have here."""
        is_plain = described.format in _PLAIN
        length = described.size if is_plain else described.virtual_size
        expected = filling.aligned(self._backend, length or size)
        return size == expected and size <= filling.aligned(
            self._backend, self._limits.max_size
        )

    def _copied(
        self, found: neighbours.Found, checksum: sources.Checksum, work: "_Work"
    ) -> model.Volume:
        """Copy an image from a peer; on failure nothing of it stays."""
        described, size = work.described, found.source.size
        volume = self._volume(work, f"{checksum.algorithm}:{checksum.hex}", size)
        filler = filling.Filler(self._here, self._backend)
        with Rollback() as undo:
            work.progress.phase(f"copying from {found.peer}", size)
            copied = filler.copied(volume, found.source, undo, work.progress)
            if copied.root() != found.root:
                raise errors.VerificationFailed(
                    volume=volume.name,
                    host=found.peer,
                    found=copied.root(),
                    expected=found.root,
                )
            if described.format in _PLAIN and described.size:
                self._reviewed(volume, described.size, checksum, work)
            image = filler.proven(volume, copied)
            undo.commit()
        work.undo.add(f"remove {image.name}", lambda: self._backend.remove(image.name))
        LOG.info("image=%s came from peer=%s", work.source.origin, found.peer)
        return image

    def _reviewed(
        self,
        volume: model.Volume,
        size: int,
        checksum: sources.Checksum,
        work: "_Work",
    ) -> manifest.Manifest:
        """Read a raw image where it lies; return its manifest.

        Raises ImageRefused unless it is what was promised, and passes the door.
        """
        work.progress.phase("reading where it is stored", volume.size)
        excerpt = work.place / "excerpt"
        with self._backend.arrived(volume.name) as arrived:
            found, read = reviewed(arrived.source, size, checksum, excerpt, work)
        if read != checksum.hex:
            raise errors.ImageRefused(
                image=work.source.origin,
                reason=f"its {checksum.algorithm} is {read}, and {checksum.hex} is "
                "promised",
            )
        door.inspect(excerpt, work.described.format, self._limits, work.check)
        return found

    def _brought(self, work: "_Work") -> model.Volume:
        """Download the image, have it checked, and fill it in."""
        came, described, progress = work.place / "image", work.described, work.progress
        checksum = self._download(
            work.claim.key, work.source, described, came, progress, work.check
        )
        progress.phase("checking at the door")
        found = door.inspect(came, described.format, self._limits, work.check)
        raw, length = came, came.stat().st_size
        if found.format not in _PLAIN:
            raw, length = work.place / "raw", found.virtual_size
            progress.phase("converting", length)
            door.convert(came, found.format, raw, length, self._limits, work.check)
            came.unlink()
        progress.phase("filling", length)
        volume = self._volume(work, checksum, length)
        filler = filling.Filler(self._here, self._backend)
        return filler.filled(
            volume, reading.FileSource(raw, length), work.undo, progress
        )

    def _demand_size(self, work: "_Work", size: int) -> None:
        if size > self._limits.max_size:
            raise errors.ImageRefused(
                image=work.source.origin,
                reason=f"it has {size} bytes, and {self._limits.max_size} are allowed",
            )

    def _download(
        self,
        key: str,
        source: sources.Source,
        described: sources.Described,
        path: Path,
        progress: Progress,
        check: Callable[[], None],
    ) -> str:
        """Write what the source gives to a file with holes; return its checksum."""
        progress.phase("fetching", described.size or 0)
        with staging.explained(self._here), path.open("xb") as file:
            staging.demand_room(path.parent, described.size or 0, self._here.name)

            def write(data: bytes) -> None:
                if any(data):
                    file.write(data)
                else:
                    file.seek(len(data), 1)
                progress.advance(len(data), sent=len(data))

            received = sources.verified(
                source, write, check, max_size=self._limits.max_size
            )
            file.truncate(received.size)
        if slots.key_of(source.origin, source.described()) != key:
            raise errors.SourceChanged(
                volume=source.origin, reason="it became another image meanwhile"
            )
        return f"{received.checksum.algorithm}:{received.checksum.hex}"

    def _volume(self, work: "_Work", checksum: str, length: int) -> model.Volume:
        """Return the image's record, as it is before there is anything of it."""
        claim, described, pool = work.claim, work.described, self._backend.incoming
        name = f"image-{claim.key[:8]}.{claim.operation}"
        return model.Volume(
            name=name,
            pool=pool.name,
            path=pool.volume_path(name),
            format=DiskFormat.RAW,
            role=Role.IMAGE,
            size=filling.aligned(self._backend, length),
            state=VolumeState.INCOMPLETE,
            owner="",
            operation=claim.operation,
            origin=self._here.name,
            image=model.Origin(
                key=claim.key,
                source=work.source.origin,
                name=described.name,
                format=described.format,
                checksum=checksum,
                min_disk=described.min_disk,
                rules=door.RULES,
                checked=time.time(),
                used=time.time(),
            ),
        )


@dataclass(frozen=True)
class _Work:
    """One fetch."""

    claim: slots.Claim
    source: sources.Source
    described: sources.Described
    place: Path
    undo: Rollback
    progress: Progress
    check: Callable[[], None]


def recheck(
    here: node.Node, backend: base.Backend, image: model.Volume, progress: Progress
) -> str:
    """Return what is wrong with an image's bytes, "" if nothing is.

    Raises StorageError where it cannot be read or staged.
    """
    progress.phase("reading", image.size)
    with _read(here, image), here.mover(progress) as mover:
        found = mover.survey(backend.source(image, image.size))
    if image.digest is None or found.digest() != image.digest:
        return f"its bytes are not those of its record (root {found.root()})"
    if image.image is None or image.image.format not in _PLAIN:
        # What was converted is a guest's own, whatever it looks like.
        return ""
    progress.phase("checking at the door")
    with staging.opened(here, uuid.uuid4().hex[:16]) as place:
        with _read(here, image):
            _copied(here, backend.source(image, image.size), place / "image")
        try:
            door.inspect(
                place / "image", image.image.format, door.Limits.configured(here.conf)
            )
        except errors.ImageRefused as e:
            return str(e)
    return ""


# Private


def reviewed(
    source: reading.Source,
    size: int,
    checksum: sources.Checksum,
    excerpt: Path,
    work: _Work,
) -> tuple[manifest.Manifest, str]:
    """Read an image in order; return its manifest, and its checksum.

    Arguments:
        size: bytes that the checksum is of.
        excerpt: gets its first and its last bytes, at their places: what any format
            is told by.
    """
    found = manifest.Manifest(source.size)
    digest = hashlib.new(checksum.algorithm, usedforsecurity=False)
    with source, excerpt.open("xb") as file:
        for index in range(found.count):
            work.check()
            start, end = found.span(index)
            data = source.read(start, end) or bytes(end - start)
            found[index] = manifest.digest_of(data)
            part = data[: max(0, size - start)]
            digest.update(part)
            if start < _EXCERPT or end > size - _EXCERPT:
                file.seek(start)
                file.write(part)
            work.progress.advance(end - start)
        file.truncate(size)
    return found, digest.hexdigest()


def _copied(here: node.Node, source: reading.Source, path: Path) -> None:
    with source, contextlib.ExitStack() as stack:
        with staging.explained(here):
            file = stack.enter_context(path.open("xb"))
        for start in range(0, source.size, MiB):
            data = source.read(start, min(start + MiB, source.size))
            with staging.explained(here):
                if data:
                    file.seek(start)
                    file.write(data)
                    file.flush()
        with staging.explained(here):
            file.truncate(source.size)


@contextlib.contextmanager
def _read(here: node.Node, image: model.Volume) -> Iterator[None]:
    """Say that an image's bytes cannot be read."""
    try:
        yield
    except OSError as e:
        raise errors.StorageError(
            host=here.name,
            pool=image.pool,
            reason=f"image {image.name} cannot be read: {e.strerror}",
        ) from e
