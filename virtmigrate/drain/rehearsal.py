# SPDX-License-Identifier: Apache-2.0
"""A rehearsal: every way that a plan may use is gone to every target that it uses.

By a tiny instance of its own that boots nothing: it is moved there, runs there, is
given back, and is removed; live moves by one of the plan's guests, with all but the
migration itself. No instance of anybody stands still. What a killed rehearsal leaves is
removed by the next one: it is known by its owner.
"""

import tempfile
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from pathlib import Path

from oslo_log import log as logging

from virtmigrate import census, errors, node, spawning
from virtmigrate.drain.libvirtmover import LibvirtMover
from virtmigrate.drain.values import Instance, Plan, Trial, Way
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

OWNER = "virtmigrate-rehearsal"

_NAMESPACE = uuids.UUID("5d0c6f0e-6a3b-4c19-9a35-7be1d9a7f2c4")
_MEMORY = 32 * MiB
_DISK = 1 * MiB


class Rehearsal:
    """Tries ways on one host. Not safe to share between threads.

    Arguments:
        here: the host.
        spawner: what makes the tiny instance.
        mover: what would move the plan's instances.
        destroy: removes an instance of ours, by its UUID.
    """

    def __init__(
        self,
        here: node.Node,
        spawner: spawning.Spawner,
        mover: LibvirtMover,
        destroy: Callable[[str], object],
    ) -> None:
        self._here = here
        self._spawner = spawner
        self._mover = mover
        self._destroy = destroy

    def run(self, plan: Plan) -> list[Trial]:
        """Try what a plan may use; return how each went.

        Raises HostDraining: the host is drained already.
        """
        self.clear()
        return [self._trial(*use) for use in _uses(plan)]

    def clear(self) -> None:
        """Remove what a killed rehearsal left on this host."""
        for record in census.records(self._here).values():
            if record.owner == OWNER and record.host == self._here.name:
                LOG.warning("instance=%s of a killed rehearsal goes", record.uuid)
                self._remove(record.uuid)

    # Private

    def _trial(self, way: Way, target: str, uuid: str) -> Trial:
        began, failed = time.monotonic(), ""
        try:
            if way is Way.LIVE:
                self._mover.rehearse_live(uuid, target)
            else:
                self._cold(target)
        except errors.HostDraining:
            raise
        except errors.Error as e:
            failed = str(e)
        seconds = round(time.monotonic() - began, 1)
        return Trial(target=target, way=way, seconds=seconds, failed=failed)

    def _cold(self, target: str) -> None:
        # Always the same: a target keeps a record of each that it gave back.
        uuid = str(uuids.uuid5(_NAMESPACE, self._here.name))
        with tempfile.NamedTemporaryFile(prefix="virtmigrate-rehearsal.") as image:
            image.truncate(_DISK)
            wanted = spawning.Wanted(
                uuid=uuid,
                name=f"rehearsal-{uuid[:8]}",
                memory=_MEMORY,
                vcpus=1,
                image=Path(image.name),
                owner=OWNER,
            )
            self._spawner.spawn(wanted)
        canary = Instance(
            uuid=uuid, name=wanted.name, power="running", memory=_MEMORY, policy=()
        )
        try:
            self._mover.rehearse_cold(canary, target)
        except errors.Error:
            # The first error tells more.
            try:
                self._remove(uuid)
            except errors.Error as e:
                LOG.warning("instance=%s of the rehearsal stays for now: %s", uuid, e)
            raise
        self._remove(uuid)

    def _remove(self, uuid: str) -> None:
        self._mover.take_back(uuid)
        self._destroy(uuid)


# Private


def _uses(plan: Plan) -> Iterator[tuple[Way, str, str]]:
    """Yield each way to each target once, with an instance that may go it.

    What is off goes as a cold move does, but that nothing is stopped.
    """
    seen = set()
    for line in plan.lines:
        for rung in line.rungs:
            way = Way.COLD if rung.way is Way.OFFLINE else rung.way
            if rung.target and (way, rung.target) not in seen:
                seen.add((way, rung.target))
                yield way, rung.target, line.instance.uuid
