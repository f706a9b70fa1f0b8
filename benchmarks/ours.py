# SPDX-License-Identifier: Apache-2.0
"""The process that moves disks by this package's engine, when it is told to.

Says READY after its imports, waits for a line, transfers, says DONE, and ends with
its input. It connects inside what is measured, as the other tools do.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtmigrate import (
    host,
    mailbox,
    model,
    peer,
    reading,
    storagepool,
    stream,
    writing,
)
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Proof, Role

READY, DONE = "ready", "done"
INSTANCE = "11111111-2222-3333-4444-555555555555"
GRACE = 2.0
TUNING = stream.Tuning()
STREAMS = TUNING.workers
"""Streams to the peer at once: its libvirtd may grow by a limit for each."""


@dataclass(frozen=True)
class Task:
    """What to do, as the benchmark says it."""

    verb: str
    peer_uri: str
    pool: str
    """At the peer; volumes of `copy` get the files' names."""
    disks: list[str]
    operation: str
    """Of `move`, in the names of its volumes."""
    base: str | None = None
    """The file below the disks, which are qcow2 then."""
    digest: dict[str, Any] | None = None
    """Of the base, as its record has it."""


def incoming(name: str, operation: str) -> str:
    """Return what a disk is called while it is on its way."""
    return f"{name}.{operation}"


def copy(task: Task, there: host.Host) -> None:
    """Move the disks as fresh volumes, and verify nothing."""
    pool = storagepool.Pool(there, task.pool)
    with stream.Mover(TUNING) as mover:
        for path in map(Path, task.disks):
            size = path.stat().st_size
            pool.create_raw(path.name, size)
            target = writing.VolumeTarget(pool, path.name, size)
            mover.copy(reading.FileSource(path, size), target)


def move(task: Task, there: host.Host) -> None:
    """Move the disks as a migration does, with all that the peer's receiver helps.

    What the peer has is not sent, and what it has then is proven.
    """
    other = peer.Peer(there, mailbox.of(there, GRACE))
    card = other.card().backends[0]
    transfer = other.reserve(_transfer(task, there, card), {card.name: card})
    with tempfile.TemporaryDirectory() as kept, stream.Mover(TUNING) as mover:
        for volume in transfer.volumes:
            if volume.held:
                continue
            known = other.prepare(
                task.operation, card, volume, Path(kept) / volume.name
            )
            source = reading.FileSource(Path(volume.source), volume.length)
            target = other.target(task.operation, card, volume, TUNING.stretch)
            sent = mover.copy(source, target, known)
            found = other.verify(task.operation, card, volume, mover, Proof.FULL)
            if found.root() != sent.root():
                raise ValueError(f"the copy of {volume.source} differs")


VERBS: dict[str, Callable[[Task, host.Host], None]] = {"copy": copy, "move": move}


def main() -> None:
    """Do the task that the command line holds, once told to."""
    task = Task(**json.loads(sys.argv[1]))
    print(READY, flush=True)
    sys.stdin.readline()
    with host.Host(task.peer_uri) as there:
        VERBS[task.verb](task, there)
        print(DONE, flush=True)
        # The memory of this process is looked at before it ends.
        sys.stdin.read()
        if task.verb == "move":
            peer.Peer(there, mailbox.of(there, GRACE)).forget(task.operation)


# Private


def _transfer(task: Task, there: host.Host, card: model.BackendCard) -> model.Transfer:
    volumes = [_volume(task, card, Path(path)) for path in task.disks]
    if task.base is not None:
        volumes.insert(0, _image(task, card, Path(task.base)))
    return model.Transfer(
        operation=task.operation,
        request="benchmark",
        instance=INSTANCE,
        source="alpha",
        peer=there.name,
        state=model.TransferState.RESERVED,
        generation=0,
        volumes=tuple(volumes),
        created=time.time(),
    )


def _volume(task: Task, card: model.BackendCard, path: Path) -> model.TransferVolume:
    size = path.stat().st_size
    return model.TransferVolume(
        name=incoming(path.name, task.operation),
        backend=card.name,
        source=str(path),
        target=path.name,
        role=Role.ROOT,
        format=DiskFormat.QCOW2 if task.base else DiskFormat.RAW,
        size=size,
        length=size,
        room=size,
        backing=_image(task, card, Path(task.base)).name if task.base else None,
    )


def _image(task: Task, card: model.BackendCard, path: Path) -> model.TransferVolume:
    size = path.stat().st_size
    return model.TransferVolume(
        name=incoming(path.name, task.operation),
        backend=card.name,
        source=str(path),
        target=path.name,
        role=Role.IMAGE,
        format=DiskFormat.RAW,
        size=size,
        length=size,
        room=size,
        digest=model.Digest(**(task.digest or {})),
    )


if __name__ == "__main__":
    main()
