# SPDX-License-Identifier: Apache-2.0
"""A drain that is killed at a given point; see killed.py.

Run as a program: `killed_drain.py PLAN`. Its moves run in threads, one at a time.
"""

import json
import sys
from pathlib import Path

from tests.functional import killed
from virtmigrate.cli import halves


class Killer(killed.Killer):
    """Counts in every thread: this process serves no peers."""

    def reach(self) -> None:
        self.count += 1
        if self.count == self._point:
            killed._die()


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    for side in ("a", "b"):
        plan[side]["values"]["receiver"] = False
    source, peer = killed.driver(plan["a"]), killed.driver(plan["b"])
    killer = Killer(plan["point"])
    killer.arm_before(killed.POINTS, [])
    source.start_draining()
    mover = source.libvirt_mover({peer.node.name: halves.Driven(peer)})
    with source.drain(mover) as drain:
        drain.run()
    print(killer.count)


if __name__ == "__main__":
    main()
