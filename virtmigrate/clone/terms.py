# SPDX-License-Identifier: Apache-2.0
"""What is asked of clones, and what becomes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from virtmigrate import domainxml
from virtmigrate.model import CloneState

NO_AGENT = "agent"
"""Name of the risk that nobody in the guest makes it somebody else."""


@dataclass(frozen=True)
class New:
    """One clone as the caller wants it."""

    uuid: str
    name: str
    interfaces: tuple[domainxml.Interface, ...] = ()
    """In the order of the source's; none: plugged in as those are, with new MACs."""


@dataclass(frozen=True)
class Wanted:
    """Clones of one instance."""

    source: str
    """UUID of an instance of this host."""
    new: tuple[New, ...]
    risk: frozenset[str] = frozenset()
    """Names of what need not be made unique: such a clone stays off the network."""
    by: str = ""
    """The request or the user."""


@dataclass(frozen=True)
class Outcome:
    """What became of one clone that was asked for."""

    uuid: str
    state: CloneState | None
    """None: it failed, and nothing of it is left."""
    report: str = ""
    """What was done to it and read back: JSON."""
    reason: str = ""
    """Why it failed, or is kept off the network."""


Values = Mapping[str, str]
"""What was read from a guest, by name of the identity."""


@dataclass(frozen=True)
class Changed:
    """What making a guest somebody else came to."""

    values: Values
    """Read back afterwards."""
    report: str
    """All steps, as JSON."""
    unproven: tuple[str, ...] = ()
    """Names of identities that were not changed, by the caller's risk."""


@dataclass(frozen=True)
class Self:
    """Who a clone is to be, as its guest is told."""

    uuid: str
    name: str
    macs: tuple[tuple[str, str], ...] = field(default=())
    """(old, new) of each interface."""


class Identities(Protocol):
    """Who makes guests somebody else, from inside."""

    def obstacles(self, uuid: str) -> list[str]:
        """Return what in a running guest cannot be made unique, as `name: reason`."""

    def read(self, uuid: str) -> Values:
        """Return what identities a running guest has."""

    def change(
        self,
        uuid: str,
        wanted: Self,
        source: Values,
        siblings: Sequence[Values],
        risk: frozenset[str],
    ) -> Changed:
        """Make a running guest somebody else, read it back, and compare it.

        Raises an error of ours where it is not proven to differ from its source and
        all siblings.
        """
