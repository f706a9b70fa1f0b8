# SPDX-License-Identifier: Apache-2.0
"""Whether a guest is somebody else than others."""

from collections.abc import Sequence

from virtmigrate.identity import model

NOT_COMPARED = frozenset({"clock"})
"""Groups that are read back, and may be the same in many guests."""


def shared(
    mine: model.Identities, others: Sequence[model.Identities]
) -> dict[str, str]:
    """Return the identities that another has, too, with the value they share.

    Values of one group are compared whatever their names: an address that moved to
    another interface is the same address.
    """
    found = {}
    for name, value in sorted(mine.values.items()):
        group = model.group_of(name)
        if group in NOT_COMPARED:
            continue
        if any(value in other.group(group) for other in others):
            found[name] = value
    return found


def of_step(values: model.Identities, step: str) -> dict[str, str]:
    """Return what belongs to one step."""
    return {
        name: value
        for name, value in values.values.items()
        if model.group_of(name) == step
    }
