# SPDX-License-Identifier: Apache-2.0
"""A compute service that is killed at a given point of a change of snapshots.

Run as a program: `killed_snapshot.py PLAN`, a JSON file with the settings of the
node, what to do, and at which of the points the process kills itself. Points are
before each publishing of a record, each volume that is made or removed, and each change
of a domain; and in the middle of those changes that last. Without a point it counts
them, and prints how many there are.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.functional import killed
from virtmigrate import domainstate, instance, merging, record, storagepool
from virtmigrate.backends import making, rbd
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.snapshot import Return, Wanted, flattening

POINTS: list[killed.Point] = [
    (record.Store, "publish"),
    (record.Store, "remove"),
    (storagepool.Pool, "create_overlay"),
    (making.Making, "_delete"),
    (instance.Domains, "define"),
    (instance.Domains, "start"),
    (instance.Domains, "kill"),
    (instance.Domains, "pause"),
    (instance.Domains, "unpause"),
    (instance.Domains, "restore_from"),
    (domainstate.States, "restore_with"),
    (domainstate.States, "revert_inside"),
    (domainstate.States, "drop_inside"),
    (merging.Merges, "stand_in"),
    (merging, "_pivot"),
    (rbd.RbdBackend, "keep_state"),
    (rbd.RbdBackend, "restore_state"),
    (rbd.RbdBackend, "drop_state"),
]
LASTING: list[killed.Point] = [
    (domainstate.States, "freeze"),
    (domainstate.States, "keep_inside"),
    (instance.Domains, "save_to"),
    (merging, "_commit"),
    (merging, "_pull"),
]


def act(driver: VirtMigrateDriver, uuid: str, action: dict[str, Any]) -> None:
    """Do what a plan says."""
    snapshots = driver.snapshots
    if "create" in action:
        snapshots.create(uuid, msgspec.convert(action["create"], Wanted))
    elif "revert" in action:
        snapshots.revert(uuid, msgspec.convert(action["revert"], Return))
    elif "flatten" in action:
        with snapshots._work(uuid) as work:
            flattening.Flattening(work).pull(action["flatten"])
    else:
        snapshots.delete(uuid, **action["delete"])


def main() -> None:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes())
    driver = killed.driver(plan["node"])
    killer = killed.Killer(plan["point"])
    killer.arm_before(POINTS, LASTING)
    act(driver, plan["instance"], plan["action"])
    killer.end()
    print(killer.count)


if __name__ == "__main__":
    main()
