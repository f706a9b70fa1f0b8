# SPDX-License-Identifier: Apache-2.0
"""A compute service that is killed at a given point of a move.

Run as a program: `killed.py PLAN`, a JSON file with the settings of both nodes,
what to do, and at which of the points the process kills itself. A point is
before and after each write to a journal, each change of a volume, and each
change of a domain. Without a point it counts them, and prints how many there are.
"""

import json
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oslo_config import cfg

from virtmigrate import conf as options
from virtmigrate import instance, journal, storagepool
from virtmigrate.driver import VirtMigrateDriver

Point = tuple[Any, str]
"""A class or a module, and the name of what is called there."""

POINTS: list[Point] = [
    (journal.Journal, "done"),
    (journal.Journal, "close"),
    (storagepool.Pool, "create_raw"),
    (storagepool.Pool, "create_overlay"),
    (storagepool.Pool, "write"),
    (storagepool.Pool, "delete"),
    (instance.Domains, "define"),
    (instance.Domains, "undefine"),
    (instance.Domains, "start"),
    (instance.Domains, "stop"),
    (instance.Domains, "kill"),
    (instance.Domains, "save_to"),
    (instance.Domains, "restore_from"),
]


DURING = 0.05
"""Seconds that a call goes on in libvirt before its caller is killed."""


class Killer:
    """Counts points; at the chosen one the process ends as by a power cut."""

    def __init__(self, point: int) -> None:
        self.count = 0
        self._point = point
        self._timer: threading.Timer | None = None

    def reach(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            # The peer's receiver, whose turn comes when it comes.
            return
        self.count += 1
        if self.count == self._point:
            _die()

    def arm(self) -> None:
        for owner, name in POINTS:
            setattr(owner, name, self._wrapped(getattr(owner, name)))

    def arm_before(self, points: list[Point], during: list[Point]) -> None:
        """Kill before a call only: what is after it is before the next one.

        Arguments:
            during: calls that may be killed while libvirt is at them, too.
        """
        for owner, name in [*points, *during]:
            lasts = (owner, name) in during
            setattr(owner, name, self._preceded(getattr(owner, name), lasts))

    def end(self) -> None:
        """Wait for a kill that is on its way."""
        if self._timer is not None:
            self._timer.join()

    def _wrapped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.reach()
            result = method(*args, **kwargs)
            self.reach()
            return result

        return call

    def _preceded(self, method: Callable[..., Any], lasts: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.reach()
            if lasts:
                self.count += 1
            if lasts and self.count == self._point:
                self._timer = threading.Timer(DURING, _die)
                self._timer.start()
            return method(*args, **kwargs)

        return call


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def driver(settings: dict[str, Any]) -> VirtMigrateDriver:
    if "config" in settings:
        made = VirtMigrateDriver(conf=options.load(Path(settings["config"])))
        made.init_host(settings["values"]["address"])
        return made
    conf = cfg.ConfigOpts()
    conf(args=[], default_config_files=[])
    options.register(conf)
    for name, value in settings["values"].items():
        conf.set_override(name, value, options.GROUP)
    for name, value in settings["backend"].items():
        conf.set_override(name, value, "local")
    made = VirtMigrateDriver(conf=conf)
    made.init_host(settings["values"]["address"])
    return made


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    source = driver(plan["a"])
    peer = source if plan["b"] == plan["a"] else driver(plan["b"])
    guest = types.SimpleNamespace(uuid=plan["instance"], name="guest")
    flavor = types.SimpleNamespace(**plan["flavor"])
    killer = Killer(plan["point"])
    killer.arm()
    ticket = source.migrate_disk_and_power_off(
        None, guest, plan["b"]["values"]["address"], flavor
    )
    peer.finish_migration(None, None, guest, ticket, None)
    if plan["then"] == "confirm":
        source.confirm_migration(None, None, guest)
    else:
        peer.destroy(None, guest)
        source.finish_revert_migration(None, guest)
    peer.settle()
    print(killer.count)


if __name__ == "__main__":
    main()
