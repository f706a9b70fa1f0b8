# SPDX-License-Identifier: Apache-2.0
"""A compute service that is killed at a given point of making clones, or of detaching.

Run as a program: `killed_clone.py PLAN`, as killed_snapshot.py. Points are before each
step of the journal, each publishing of a record, each volume that is made or removed,
each writing of a head of memory, and each change of a domain or of its links.
"""

import sys
import types
from pathlib import Path
from typing import Any

import msgspec

from tests.functional import cloneworld, killed
from virtmigrate import domainstate, instance, journal, record, storagepool
from virtmigrate.backends import making
from virtmigrate.clone import apart, memory
from virtmigrate.driver import VirtMigrateDriver

POINTS: list[killed.Point] = [
    (journal.Journal, "done"),
    (journal.Journal, "close"),
    (record.Store, "publish"),
    (record.Store, "remove"),
    (storagepool.Pool, "create_overlay"),
    (making.Making, "_delete"),
    (instance.Domains, "define"),
    (instance.Domains, "undefine"),
    (instance.Domains, "kill"),
    (instance.Domains, "unpause"),
    (instance.Domains, "restore_from"),
    (memory, "_write"),
    (apart.Apart, "hold"),
    (apart.Apart, "release"),
    (domainstate.States, "stand_in"),
]
LASTING: list[killed.Point] = [
    (domainstate.States, "freeze"),
    (domainstate.States, "pull"),
]


def act(driver: VirtMigrateDriver, plan: dict[str, Any]) -> None:
    """Do what a plan says."""
    if "detach" in plan:
        driver.clones.detach(plan["detach"])
        return
    driver.clones.identities = cloneworld.Fake(fails=plan["fails"])
    guest = types.SimpleNamespace(uuid=plan["instance"])
    new = [types.SimpleNamespace(**each) for each in plan["new"]]
    driver.clone(None, guest, new)


def main() -> None:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes())
    driver = killed.driver(plan["node"])
    killer = killed.Killer(plan["point"])
    killer.arm_before(POINTS, LASTING)
    act(driver, plan)
    killer.end()
    print(killer.count)


if __name__ == "__main__":
    main()
