# SPDX-License-Identifier: Apache-2.0
"""A compute service that is killed at a given point of what it does to an instance
with a transient disk.

Run as a program: `killed_transient.py PLAN`, a JSON file with the settings of the node,
what to do, and at which of the points the process kills itself: before each publishing
of a record, each volume that is made or removed, and each change of a domain; and while
libvirt starts one. Without a point it counts them, and prints how many there are.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.functional import killed
from virtmigrate import instance, qcow2, record, wire
from virtmigrate.backends import making
from virtmigrate.driver import VirtMigrateDriver

POINTS: list[killed.Point] = [
    (record.Store, "publish"),
    (record.Store, "remove"),
    (qcow2, "blank"),
    (wire, "download"),
    (making.Making, "_delete"),
    (instance.Domains, "define"),
    (instance.Domains, "undefine"),
    (instance.Domains, "start"),
    (instance.Domains, "stop"),
    (instance.Domains, "kill"),
    (instance.Domains, "forbid_autostart"),
]
LASTING: list[killed.Point] = [
    (making.Making, "_create_scratch"),
    (instance.Domains, "start_with"),
    (instance.Domains, "save"),
]

Act = Callable[[VirtMigrateDriver, types.SimpleNamespace], object]

ACTIONS: dict[str, Act] = {
    "start": lambda driver, guest: driver.power_on(None, guest, None),
    "settle": lambda driver, guest: driver.settle(),
    "soft": lambda driver, guest: driver.reboot(None, guest, None, "SOFT"),
    "hard": lambda driver, guest: driver.reboot(None, guest, None, "HARD"),
    "suspend": lambda driver, guest: driver.suspend(None, guest),
    "resume": lambda driver, guest: driver.resume(None, guest),
    "on": lambda driver, guest: driver.set_transient(guest.uuid, "vda", transient=True),
    "off": lambda driver, guest: driver.set_transient(
        guest.uuid, "vda", transient=False
    ),
    "destroy": lambda driver, guest: driver.destroy(None, guest),
}


def main() -> None:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes())
    node, guest = plan["node"], types.SimpleNamespace(uuid=plan["instance"])
    # It has no system that would hear.
    node["values"]["shutdown_timeout"] = 1
    killer = killed.Killer(plan["point"])
    if plan["action"] == "settle":
        # It settles when it begins, too.
        killer.arm_before(POINTS, LASTING)
    driver = killed.driver(node)
    if plan["action"] != "settle":
        killer.arm_before(POINTS, LASTING)
    ACTIONS[plan["action"]](driver, guest)
    killer.end()
    print(killer.count)


if __name__ == "__main__":
    main()
