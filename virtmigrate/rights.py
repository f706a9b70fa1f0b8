# SPDX-License-Identifier: Apache-2.0
"""What the record of who may run an instance says of one host.

Rules over values; tenure.py finds the records and changes them.
"""

import msgspec

from virtmigrate import model


def may_take(found: model.Tenure, host: str) -> bool:
    """Tell whether a host may make it its own without taking it from somebody."""
    if found.gone:
        return host not in found.lost
    return host in (found.host, found.peer)


def has(found: model.Tenure | None, host: str) -> bool:
    """Tell whether it is a host's, be it on its way to a peer."""
    return found is not None and found.host == host and not found.gone


def has_alone(found: model.Tenure | None, host: str) -> bool:
    """Tell whether it is a host's, and nobody else may take it."""
    return found is not None and has(found, host) and found.peer is None


def taken(
    before: model.Tenure | None,
    host: str,
    record: model.Instance,
    *,
    clients: tuple[str, ...] | None = (),
    by_force: bool = False,
) -> model.Tenure:
    """Return the record by which a host has it.

    Arguments:
        before: the one until now.
        by_force: those that have it do not know, and may come back.
    """
    lost = set(before.lost) if before else set()
    if before and by_force and not before.gone:
        lost |= {before.host, before.peer or before.host}
    return model.Tenure(
        host=host, record=record, clients=clients, lost=tuple(sorted(lost - {host}))
    )


def without(found: model.Tenure, host: str) -> model.Tenure:
    """Return the record once a host has nothing of the instance any more."""
    if has(found, host):
        found = msgspec.structs.replace(found, gone=True, peer=None, clients=())
    lost = tuple(each for each in found.lost if each != host)
    return msgspec.structs.replace(found, lost=lost)


def is_needed(found: model.Tenure) -> bool:
    """Tell whether the record still gives somebody a right, or keeps somebody off."""
    return not found.gone or bool(found.lost)
