# SPDX-License-Identifier: Apache-2.0
"""A compute service that is killed at a given point of a live move.

Run as a program: `killed_live.py PLAN`, as killed.py is. A point is before each write
to a journal, each change of a volume and of a domain; and, by `during`, so many
seconds after libvirt was asked to migrate.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.functional.killed import Killer, driver
from virtmigrate import instance, journal, storagepool
from virtmigrate.livemigration import domains, steering

POINTS = [
    (journal.Journal, "done"),
    (journal.Journal, "close"),
    (storagepool.Pool, "create_raw"),
    (storagepool.Pool, "write"),
    (storagepool.Pool, "delete"),
    (instance.Domains, "define"),
    (instance.Domains, "undefine"),
    (domains.Domains, "go_on"),
    (instance.Domains, "unpause"),
]


def kill_during(seconds: float) -> None:
    """Be killed so many seconds after libvirt was asked to migrate."""
    migrate = steering.Steering._migrate

    def call(self: steering.Steering) -> Any:
        def end() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=end, daemon=True).start()
        return migrate(self)

    steering.Steering._migrate = call  # type: ignore[method-assign]


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    source, peer = driver(plan["a"]), driver(plan["b"])
    killer = Killer(plan["point"])
    killer.arm_before(POINTS, [])
    if plan["during"]:
        kill_during(plan["during"])
    source.live.migrate(plan["instance"], plan["b"]["values"]["address"])
    print(killer.count)
    source.cleanup_host("")
    peer.cleanup_host("")


if __name__ == "__main__":
    main()
