# SPDX-License-Identifier: Apache-2.0
"""Records: what we know, written by us, never guessed.

A record is a small raw volume `NAME.rec.GENERATION`. Publishing is creating the
next generation exclusively (libvirt creates raw files with O_EXCL), writing it
and reading it back. The highest valid generation counts, so a torn write
leaves the older one. The same step is a compare-and-swap between hosts:

- Of two that create one generation, libvirt lets one win.
- A generation that exists and is not valid may still be in the making.
  Readers take the one before. A publisher waits `grace` seconds for it, then
  passes over it to the next number.
- A publisher that needed more than half of `grace` may have been passed over,
  so it publishes once more, with the next number, and that decides.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import blake3
import msgspec

from virtmigrate import errors, storagepool
from virtmigrate.units import KiB, MiB, round_up

SCHEMA = 1
"""The newest schema that this release writes."""

READS = (1,)
"""All schemas that this release reads."""

MAX_SIZE = 8 * MiB
_MAGIC = b"virtmigrate-record"

_TRIES = 5
"""Times that a record is published again because its storage was slow."""

_BLOCK = 4 * KiB
_KEPT_BACK = 32 * MiB
"""Bytes that may be free on storage that takes no more."""
_SEAL = 67
"""Bytes of a record besides its head line and its payload: line ends and a digest."""

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True)
class Stored(Generic[T]):
    """A record as it was found."""

    name: str
    generation: int
    body: T


def encode(body: msgspec.Struct, name: str, generation: int) -> bytes:
    """Return the bytes of a record, padded to whole blocks, with its own digest."""
    payload = msgspec.json.encode(body)
    header = f" {SCHEMA} {generation} {len(payload)} {name}\n".encode()
    return _sealed(_MAGIC + header + payload)


def decode(data: bytes, kind: type[T], name: str, generation: int) -> T:
    """Return the body of a record.

    Raises ValueError when the bytes are not this record, whole; TooNew when a
    newer release wrote them.
    """
    head, newline, rest = data.partition(b"\n")
    fields = head.split(b" ", 4)
    if not newline or len(fields) != 5 or fields[0] != _MAGIC:
        raise ValueError("it does not begin like a record")
    schema, number, length = (_number(field) for field in fields[1:4])
    if schema > max(READS):
        raise TooNew(schema)
    if data != _sealed(head + newline + rest[:length]):
        raise ValueError("its digest does not match")
    if schema not in READS:
        raise ValueError(f"schema {schema} is not read any more")
    if number != generation or fields[4] != name.encode():
        raise ValueError("it was written under another name")
    return msgspec.json.decode(rest[:length], type=kind)


def is_volume_name(volume: str) -> bool:
    """Tell whether a volume of this name is a generation of a record."""
    return any(_parse_all([volume]))


def length_of(head: bytes) -> int:
    """Return how long the record is that begins so; 0 when none does.

    Of a record in a volume that is longer than it.
    """
    line, newline, _ = head.partition(b"\n")
    fields = line.split(b" ", 4)
    if not newline or len(fields) != 5 or fields[0] != _MAGIC:
        return 0
    try:
        return round_up(len(line) + _number(fields[3]) + _SEAL, _BLOCK)
    except ValueError:
        return 0


class TooNew(Exception):
    def __init__(self, schema: int) -> None:
        self.schema = schema
        super().__init__(f"schema {schema}")


class Store(Generic[T]):
    """Records of one kind in one pool. Safe to share between threads.

    Arguments:
        pool: where they lie.
        kind: the structure of their bodies.
        grace: seconds after which a record in the making is held for dead; the
            same for all that publish in this pool.
    """

    def __init__(
        self, pool: storagepool.Pool, kind: type[T], *, grace: float = 10.0
    ) -> None:
        self.pool = pool
        self._kind = kind
        self._grace = grace

    def find(self, name: str) -> Stored[T] | None:
        """Return the newest valid record of this name, or None if there is none.

        Raises RecordBroken when generations were written and none is valid,
        RecordTooNew when a newer release wrote the newest.
        """
        generations = self._generations(name)
        while generations:
            for generation in reversed(generations):
                stored = self.load(name, generation)
                if stored is not None:
                    return stored
            listed, generations = generations, self._generations(name)
            # What was removed or pruned since it was listed is not broken.
            if generations == listed:
                if all(self._is_unborn(name, each) for each in listed):
                    return None
                # One that was being written may be whole by now.
                for generation in reversed(listed):
                    stored = self.load(name, generation)
                    if stored is not None:
                        return stored
                raise errors.RecordBroken(
                    **self._where(name), reason=f"generations {listed}, none valid"
                )
        return None

    def read(self, name: str) -> Stored[T]:
        """Return the newest valid record; RecordMissing when there is none."""
        stored = self.find(name)
        if stored is None:
            raise errors.RecordMissing(**self._where(name))
        return stored

    def names(self) -> list[str]:
        """Return the names of all records in the pool, of whatever kind."""
        return sorted(self.newest())

    def newest(self) -> dict[str, int]:
        """Return the newest generation of each name, valid or not, by one listing."""
        return dict(sorted(_parse_all(self.pool.names())))

    def load(self, name: str, generation: int) -> Stored[T] | None:
        """Return one generation; None when it is not there, or not valid.

        Raises RecordTooNew.
        """
        try:
            data = self.pool.read(_volume(name, generation), limit=MAX_SIZE)
            body = decode(data, self._kind, name, generation)
        except TooNew as e:
            raise errors.RecordTooNew(
                **self._where(name), schema=e.schema, known=max(READS)
            ) from e
        except (ValueError, errors.VolumeNotFound, errors.ShortTransfer):
            return None
        return Stored(name, generation, body)

    def still(self, stored: Stored[T]) -> Stored[T] | None:
        """Return a record as it stands there now, if it is the newest of its name yet.

        None where it may not be: find() tells. Costs two looks at single volumes. What
        is published has the next number, and the older ones go first: so the one that
        is there, and has no next one, is the newest. Raises RecordTooNew.
        """
        if self.pool.has(_volume(stored.name, stored.generation + 1)):
            return None
        return self.load(stored.name, stored.generation)

    def stamp(self) -> int | None:
        """Return what is another one as soon as a record changes.

        None while one may be in the making, or where that cannot be told.
        """
        return self.pool.stamp(self._grace)

    def publish(self, name: str, body: T, *, after: int = 0) -> Stored[T]:
        """Make body the newest record of this name, if `after` is the newest now.

        Raises RecordConflict when somebody else published; the record is then
        theirs. DiskFull, or StorageError, when it could not be written whole: the one
        before it counts.
        """
        for _ in range(_TRIES):
            generation = self._next(name, after)
            stored = Stored(name, generation, body)
            began = time.monotonic()
            if not self._write(stored):
                raise self._conflict(name, after)
            if time.monotonic() - began < self._grace / 2:
                break
            after = generation
        else:
            raise errors.StorageError(
                host=self.pool.host.name,
                pool=self.pool.name,
                reason=f"record {name}: writing it took longer than "
                f"{self._grace / 2:g} s, {_TRIES} times; it may be written. Raise "
                "record_grace, on all hosts that share this storage",
            )
        if self._generations(name)[-1:] != [generation]:
            raise self._conflict(name, after)
        return stored

    def follow(self, stored: Stored[T], body: T) -> Stored[T]:
        """Publish the generation after one that was read, with the fewest calls.

        That it is created exclusively, and is the newest then, decides. For where a
        guest stands still meanwhile. Raises RecordConflict.
        """
        began = time.monotonic()
        made = Stored(stored.name, stored.generation + 1, body)
        if not self._write(made):
            # Perhaps one that a killed process never wrote.
            return self.publish(stored.name, body, after=stored.generation)
        if time.monotonic() - began >= self._grace / 2:
            return self.publish(stored.name, body, after=made.generation)
        # What was read may be older than what others published, and pruned.
        if self._generations(stored.name)[-1:] != [made.generation]:
            raise self._conflict(stored.name, stored.generation)
        return made

    def prune(self, name: str) -> None:
        """Remove all generations but the newest valid one and its predecessor."""
        stored = self.find(name)
        if stored is None:
            return
        older = [g for g in self._generations(name) if g < stored.generation]
        for generation in older[:-1]:
            self.pool.delete(_volume(name, generation))

    def remove(self, name: str, *, until: int | None = None) -> None:
        """Remove the record, the newest generation last, so that none revives.

        Arguments:
            until: the last generation that goes; what was published since then stays.
        """
        for generation in self._generations(name):
            if until is None or generation <= until:
                self.pool.delete(_volume(name, generation))

    def written(self, stored: Stored[T]) -> float:
        """Return when a record was written, by its host's clock; 0 if it is gone."""
        return self.pool.written(_volume(stored.name, stored.generation))

    # Private

    def _where(self, name: str) -> dict[str, str]:
        return {"host": self.pool.host.name, "pool": self.pool.name, "record": name}

    def _conflict(self, name: str, expected: int) -> errors.RecordConflict:
        found = self._generations(name)[-1:]
        return errors.RecordConflict(
            **self._where(name), expected=expected, found=found or "none"
        )

    def _generations(self, name: str) -> list[int]:
        # Of what may be very many only these are taken apart.
        found = _parse_all([n for n in self.pool.names() if n.startswith(name)])
        return sorted(
            generation for found_name, generation in found if found_name == name
        )

    def _is_unborn(self, name: str, generation: int) -> bool:
        """Tell whether a generation was created and never written.

        Its first block is written last, so one that holds nothing but zeros there
        was never published.
        """
        try:
            data = self.pool.read(_volume(name, generation), limit=MAX_SIZE)
        except errors.VolumeNotFound:
            return True
        except (ValueError, errors.ShortTransfer):
            return False
        return not any(data[:_BLOCK])

    def _next(self, name: str, after: int) -> int:
        """Return the number to publish; wait for what is in the making.

        Each generation has `grace` seconds of its own from when it was first
        seen, and the look that finds it unfinished begins after them: a maker
        that needed less than half of them is never passed over.
        """
        waited_for, deadline = after, 0.0
        while True:
            expired = time.monotonic() >= deadline
            if self._valid_generation(name) != after:
                raise self._conflict(name, after)
            top = max(self._generations(name), default=0)
            if top <= after or (top == waited_for and expired):
                return max(top, after) + 1
            if top != waited_for:
                waited_for, deadline = top, time.monotonic() + self._grace
            time.sleep(min(0.2, self._grace / 10))

    def _valid_generation(self, name: str) -> int:
        """Return the newest valid generation, 0 when there is none."""
        try:
            stored = self.find(name)
        except errors.RecordBroken:
            return 0
        return stored.generation if stored else 0

    def _write(self, stored: Stored[T]) -> bool:
        """Create and fill the generation; False when another one has it."""
        volume = _volume(stored.name, stored.generation)
        data = encode(stored.body, stored.name, stored.generation)
        try:
            self.pool.create_raw(volume, len(data))
            if data[_BLOCK:]:
                self.pool.write(volume, data[_BLOCK:], offset=_BLOCK)
            self.pool.write(volume, data[:_BLOCK])
            if self.pool.read(volume, limit=MAX_SIZE) == data:
                return True
        except (errors.VolumeExists, errors.VolumeNotFound):
            # Somebody else made it, or passed over ours and pruned it.
            return False
        except errors.NoSpace:
            self._drop_torn(volume)
            raise
        self._drop_torn(volume)
        raise self._torn(stored.name, len(data))

    def _torn(self, name: str, length: int) -> errors.StorageError:
        """Return why a record that we alone have made does not hold what we wrote.

        libvirt says that an upload went well, also where the storage was full (9.0).
        """
        where = {"host": self.pool.host.name, "pool": self.pool.name}
        room = self.pool.room()
        reason = (
            f"record {name} could not be written ({length} bytes, and {room.free} are "
            "free). The one before it counts: make room, then do it again"
        )
        # What a file system keeps back for itself counts as free (ext4: 2 %, 5 %).
        if room.free < max(room.capacity // 20, _KEPT_BACK):
            return errors.DiskFull(**where, reason=reason)
        return errors.StorageError(**where, reason=reason)

    def _drop_torn(self, volume: str) -> None:
        """Remove a generation of ours that is not whole: others would wait for it."""
        with contextlib.suppress(errors.Error):
            self.pool.delete(volume)


def _volume(name: str, generation: int) -> str:
    return f"{name}.rec.{generation}"


def _parse_all(names: list[str]) -> Iterator[tuple[str, int]]:
    for volume in names:
        name, dot, number = volume.rpartition(".rec.")
        if dot and re.fullmatch("[1-9][0-9]*", number):
            yield name, int(number)


def _sealed(text: bytes) -> bytes:
    data = text + b"\n" + blake3.blake3(text).hexdigest().encode() + b"\n"
    return data.ljust(round_up(len(data), _BLOCK), b"\0")


def _number(field: bytes) -> int:
    if not field.isdigit() or len(field) > 18:
        raise ValueError("its header holds no numbers")
    return int(field)
