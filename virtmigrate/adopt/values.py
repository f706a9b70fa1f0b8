# SPDX-License-Identifier: Apache-2.0
"""What an adoption is given, and what it plans."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from virtmigrate import domainxml, errors, model, node
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role


class AdoptionRefused(errors.InstanceError):
    """Something is left open; nothing was touched."""

    msg = "adopting {instance} on {host} is refused; nothing was touched:\n{reason}"


@dataclasses.dataclass(frozen=True)
class Given:
    """What the operator says; the XML says the rest."""

    chains: Mapping[str, tuple[domainxml.Layer, ...]] = dataclasses.field(
        default_factory=dict
    )
    """Whole chains by disk target, top first."""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Virtual sizes in bytes, by label: "vda", "vda[1]" for the layer below."""
    private_chain: bool = False
    """Layers below, and CD images, are this instance's alone."""
    owner: str | None = None
    """The compute service; None is ours."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One volume to be recorded."""

    label: str
    name: str
    """Of the file, and so of the record."""
    path: str
    format: DiskFormat
    role: Role
    owner: str
    """UUID of the instance, "" for what is never removed."""
    size: int | None
    """None: measured when its pool is there."""
    backing: str | None = None
    pool: str | None = None
    """None: a pool will be defined."""

    @property
    def directory(self) -> str:
        return str(PurePath(self.path).parent)


@dataclasses.dataclass(frozen=True)
class Adoption:
    """What is, or was, done."""

    uuid: str
    xml: str
    owner: str
    chains: dict[str, tuple[domainxml.Layer, ...]]
    volumes: tuple[Planned, ...]
    """Each disk's chain, top first."""
    refs: tuple[model.DiskRef, ...]
    notes: tuple[str, ...]
    """What keeps it from being moved as it is."""


def label(target: str, depth: int) -> str:
    """Return what a layer is called: "vda", "vda[1]" below it."""
    return f"{target}[{depth}]" if depth else target


def refused(here: node.Node, uuid: str, problems: Iterable[str]) -> AdoptionRefused:
    """Return the error that lists all problems."""
    reason = "\n".join(f"- {problem}" for problem in problems)
    return AdoptionRefused(instance=uuid, host=here.name, reason=reason)
