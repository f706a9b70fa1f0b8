# SPDX-License-Identifier: Apache-2.0
"""A compute service that is killed at a given point of making an image.

Run as a program: `killed_image.py PLAN`, a JSON file with the settings of the node,
where the image goes, and at which of the points the process kills itself. Without a
point it counts them, and prints how many there are.
"""

import sys
from pathlib import Path

import msgspec

from tests.functional import killed
from virtmigrate import domainstate, journal, merging, record, sinks, storagepool
from virtmigrate.backends import making
from virtmigrate.instance import Domains
from virtmigrate.livesnapshot import Target, Wanted, cached, packing
from virtmigrate.sinks import glance

POINTS: list[killed.Point] = [
    (journal.Journal, "done"),
    (journal.Journal, "close"),
    (record.Store, "publish"),
    (storagepool.Pool, "create_overlay"),
    (making.Making, "_delete"),
    (Domains, "define"),
    (merging, "_pivot"),
    *(
        (sink, name)
        for sink in (sinks.FileSink, glance.GlanceSink, cached.CacheSink)
        for name in ("begin", "prove", "publish")
    ),
]
LASTING: list[killed.Point] = [
    (domainstate.States, "freeze"),
    (merging, "_commit"),
    (sinks.FileSink, "take"),
    (glance.GlanceSink, "take"),
    (cached.CacheSink, "take"),
    (packing.Packer, "_run"),
]


def main() -> None:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes())
    driver = killed.driver(plan["node"])
    killer = killed.Killer(plan["point"])
    killer.arm_before(POINTS, LASTING)
    target = msgspec.convert(plan["target"], Target)
    driver.saves.save(plan["instance"], Wanted(target=target, **plan["options"]))
    killer.end()
    print(killer.count)


if __name__ == "__main__":
    main()
