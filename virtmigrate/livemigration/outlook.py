# SPDX-License-Identifier: Apache-2.0
"""What a live move would be: how fast the guest writes, and what that makes of it."""

import math
import time

import libvirt

from virtmigrate import node
from virtmigrate.livemigration.domains import Domains
from virtmigrate.livemigration.terms import Forecast
from virtmigrate.units import MiB

_WATCHED = 1
"""Seconds for which the guest's writing to its memory is counted."""
_LINK = 1000.0 * MiB
"""Bytes per second that are taken for the link where no bandwidth limits it."""


def forecast(
    here: node.Node, uuid: str, bandwidth: int, obstacles: tuple[str, ...]
) -> Forecast:
    """Return the outlook of a running instance.

    Arguments:
        bandwidth: bytes per second; 0: no limit.
    """
    memory = here.domains.info(uuid).memory
    dirty = _dirty_rate(Domains(here.host), uuid)
    link = float(bandwidth) or _LINK
    downtime = float(here.options.live_downtime)
    return Forecast(
        memory=memory,
        dirty_rate=dirty,
        link=link,
        seconds=seconds(memory, dirty, link, downtime),
        downtime=min(downtime, memory / link) if dirty < link else math.inf,
        obstacles=obstacles,
    )


def seconds(memory: float, dirty: float, link: float, downtime: float) -> float:
    """Return how long passes over the memory take, until what is left fits.

    Each pass sends what was written during the one before it. Infinite where that
    never becomes less.
    """
    took, left = 0.0, memory
    while left > downtime * link:
        if dirty >= link:
            return math.inf
        took += left / link
        left = min(memory, left / link * dirty)
    return took + left / link


# Private


def _dirty_rate(domains: Domains, uuid: str) -> float:
    """Return the bytes per second that a guest writes to."""
    with domains.host.session("counting what it writes", instance=uuid) as session:
        domain = session.conn.lookupByUUIDString(uuid)
        domain.startDirtyRateCalc(_WATCHED, 0)
        time.sleep(_WATCHED + 0.2)
        found = session.conn.domainListGetStats(
            [domain], libvirt.VIR_DOMAIN_STATS_DIRTYRATE, 0
        )
    mib = found[0][1].get("dirtyrate.megabytes_per_second", 0) if found else 0
    return float(max(0, int(mib))) * MiB
