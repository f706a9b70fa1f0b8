# SPDX-License-Identifier: Apache-2.0
"""What a host still has that should be empty: asked of libvirt, records and kernel."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from virtmigrate import model, node
from virtmigrate.drain.values import Leftovers
from virtmigrate.instance import Power
from virtmigrate.migration.source import Source

_RUNS = (Power.RUNNING, Power.PAUSED, Power.CRASHED)

_INCOMING = (
    model.TransferState.RESERVED,
    model.TransferState.GIVEN,
    model.TransferState.TAKEN,
    model.TransferState.RETURNING,
)
"""Transfers to here that are not over."""


def leftovers(here: node.Node, source: Source, gone: Iterable[str]) -> Leftovers:
    """Return what a host still has; see Mover.leftovers()."""
    domains = here.domains.all()
    running = [name for uuid, name in domains if here.domains.power(uuid) in _RUNS]
    uuids = {*gone, *(uuid for uuid, _ in domains)}
    return Leftovers(
        domains=tuple(sorted(name for _, name in domains)),
        running=tuple(sorted(running)),
        processes=tuple(sorted(_openers(here))),
        operations=(*_departures(source), *_arrivals(here)),
        leases=tuple(sorted(_leases(here, uuids))),
    )


# Private


def _departures(source: Source) -> Iterator[str]:
    for operation, uuid, dest, step in source.open_operations():
        yield f"{operation}: instance {uuid} to {dest}, {step}"


def _arrivals(here: node.Node) -> Iterator[str]:
    for stored in here.mailbox.open_transfers():
        if stored.body.peer == here.name and stored.body.state in _INCOMING:
            yield f"{stored.name}: instance {stored.body.instance} to here"


def _leases(here: node.Node, uuids: Iterable[str]) -> Iterator[str]:
    shared = [each for each in here.up() if each.capabilities.shared]
    for uuid in uuids:
        for backend in shared:
            stored = backend.tenures.find(uuid)
            if stored and stored.body.host == here.name and not stored.body.gone:
                yield f"{uuid} in {backend.name}"


def _openers(here: node.Node) -> Iterator[str]:
    """Yield the programs of this machine that have a file of our own storage open.

    Asked of the kernel: a QEMU that libvirt lost has its disks open, too. Without root
    only programs of the same user are seen.
    """
    places = _places(here)
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        # It may end while it is looked at.
        with contextlib.suppress(OSError):
            files = (str(each.readlink()) for each in (process / "fd").iterdir())
            if any(file.startswith(places) for file in files):
                program = (process / "comm").read_text().strip()
                yield f"{program} ({process.name})"


def _places(here: node.Node) -> tuple[str, ...]:
    """Return the directories whose files are this host's alone."""
    own = [each for each in here.up() if not each.capabilities.shared]
    pools = [pool for each in own for pool in (each.disks, each.incoming)]
    return tuple(sorted({f"{pool.path.rstrip('/')}/" for pool in pools if pool.path}))
