# SPDX-License-Identifier: Apache-2.0
"""One compute service of two on a shared directory, in a hurry; it may be killed.

Run as a program: `racer.py CONFIG BACKEND PEER SEED IMAGE...`. Each line on stdin is
one round; each is answered by a line that says what was done. What instances it made,
and which it began to destroy, it notes in a file before and after, for who comes after
a kill.
"""

import json
import random
import sys
import types
import uuid
from pathlib import Path
from typing import Any

from virtmigrate import conf, errors
from virtmigrate.driver import VirtMigrateDriver


class Racer:
    def __init__(
        self, config: str, backend: str, peer: str, seed: str, *images: str
    ) -> None:
        loaded = conf.load(Path(config))
        self.driver = VirtMigrateDriver(conf=loaded)
        self.here = str(loaded["virtmigrate"].address)
        self.driver.init_host(self.here)
        self.backend = backend
        self.peer = peer
        self.random = random.Random(seed)
        self.images = images

    def turn(self) -> str:
        act = self.random.choice(
            [self.spawn, self.spawn, self.destroy, self.prune, self.settle, self.move]
        )
        try:
            return f"{act.__name__} {act()}"
        except (errors.Error, errors.MigrationError) as e:
            return f"{act.__name__} refused {type(e).__name__}: {e}"

    def spawn(self) -> str:
        path = self.random.choice(self.images)
        made = types.SimpleNamespace(
            uuid=str(uuid.uuid4()),
            name=f"race-{uuid.uuid4().hex[:8]}",
            flavor=flavor(self.backend),
        )
        meta = {"id": Path(path).name, "path": path, "disk_format": "raw"}
        self.driver.spawn(None, made, meta, power_on=False)
        return f"{made.uuid} {Path(path).name}"

    def destroy(self) -> str:
        chosen = self.any()
        if chosen is None:
            return "nothing"
        print(json.dumps(["begins", chosen.uuid]), flush=True)
        self.driver.destroy(None, chosen, None)
        return str(chosen.uuid)

    def prune(self) -> str:
        self.driver.manage_image_cache(None)
        return "done"

    def settle(self) -> str:
        return str(len(self.driver.settle()))

    def move(self) -> str:
        chosen = self.any()
        if chosen is None:
            return "nothing"
        ticket = self.driver.migrate_disk_and_power_off(
            None, chosen, self.peer, None, None
        )
        operation = self.driver.node.instances.read(chosen.uuid).body.operation
        assert ticket
        self.driver.peer(self.peer).finish(operation)
        self.driver.confirm_migration(None, None, chosen, None)
        return str(chosen.uuid)

    def any(self) -> Any:
        """An instance that is here, and at rest."""
        here = self.driver.node
        found = []
        for name in here.instances.names():
            record = here.own_record(name)
            if record is not None and record.state.value in ("here", "arrived"):
                found.append(record)
        return self.random.choice(found) if found else None


def flavor(backend: str) -> Any:
    return types.SimpleNamespace(
        memory_mb=64,
        vcpus=1,
        root_gb=0,
        ephemeral_gb=0,
        extra_specs={"virtmigrate:backend": backend},
    )


def main() -> None:
    racer = Racer(*sys.argv[1:])
    print(json.dumps(["ready"]), flush=True)
    for _ in sys.stdin:
        print(json.dumps(["done", racer.turn()]), flush=True)
    racer.driver.cleanup_host(racer.here)


if __name__ == "__main__":
    main()
