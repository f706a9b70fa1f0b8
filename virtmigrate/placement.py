# SPDX-License-Identifier: Apache-2.0
"""Which backend a disk comes to: what a flavor asks for, and where room is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from virtmigrate import errors, node
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.units import format_bytes

BACKEND = "virtmigrate:backend"
"""The extra spec that names a backend."""

TRAITS = "virtmigrate:traits"
"""The extra spec that lists what a backend must be, such as media=ssd, by commas."""


@dataclass(frozen=True)
class Demand:
    """What disks ask of the backend that they come to."""

    backend: str | None = None
    """Its name; None leaves it open."""
    traits: frozenset[str] = frozenset()

    def fits(self, name: str, traits: Iterable[str]) -> bool:
        """Tell whether a backend is what is asked for."""
        return self.backend in (None, name) and self.traits <= set(traits)

    def __str__(self) -> str:
        wanted = [f"named {self.backend}"] if self.backend else []
        if self.traits:
            wanted.append(f"with {', '.join(sorted(self.traits))}")
        return " ".join(["backend", *wanted])


ANY = Demand()


def demand(extra_specs: Mapping[str, object]) -> Demand:
    """Return what the extra specs of a flavor ask for."""
    backend = str(extra_specs.get(BACKEND, "")).strip()
    listed = str(extra_specs.get(TRAITS, "")).split(",")
    traits = frozenset(each.strip() for each in listed if each.strip())
    return Demand(backend or None, traits)


def choose(here: node.Node, wanted: Demand, size: int) -> base.Backend:
    """Return the backend of this host for new raw disks of size bytes in all.

    The first of the configuration that fits and has room; if none has, the one with
    the most, because what was retired there may go. Raises NoBackend.
    """
    fitting = [
        each
        for each in here.up()
        if wanted.fits(each.name, each.settings.traits)
        and DiskFormat.RAW in each.capabilities.formats
    ]
    if not fitting:
        raise errors.NoBackend(
            host=here.name, wanted=str(wanted), size=format_bytes(size)
        )
    room = {each.name: _free(here, each) for each in fitting}
    for each in fitting:
        if room[each.name] >= size:
            return each
    return max(fitting, key=lambda each: room[each.name])


# Private


def _free(here: node.Node, backend: base.Backend) -> int:
    """Return the bytes that may still be promised; -1 when it is down."""
    room = here.room(backend)
    return -1 if room is None else max(0, room.free - backend.settings.reserved)
