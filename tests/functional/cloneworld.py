# SPDX-License-Identifier: Apache-2.0
"""What tests of clones share: guests that count, new instances, who changes them."""

import dataclasses
import subprocess
import sys
import types
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sandbox import guest as guests
from tests.functional.conftest import Node, World
from tests.functional.test_agent import wait_for
from virtmigrate import errors
from virtmigrate.clone.terms import NO_AGENT, Changed, Self, Values
from virtmigrate.units import MiB

RISK = (NO_AGENT,)
MAC = "52:54:00:0a:0b:0c"


class Fake:
    """Says what a guest's identities are, without a guest: clones are told so.

    What is not told has its source's.
    """

    def __init__(
        self,
        *obstacles: str,
        fails: Sequence[str] = (),
        heard: Callable[[], set[str]] = set,
    ) -> None:
        self.asked: list[tuple[str, Self, Values, list[Values]]] = []
        self.heard: list[set[str]] = []
        """What was on the network when each was asked for."""
        self._hear = heard
        self._obstacles = list(obstacles)
        self._fails = fails

    def obstacles(self, uuid: str) -> list[str]:
        return self._obstacles

    def read(self, uuid: str) -> Values:
        return {"machine-id": f"of {uuid}"}

    def change(
        self,
        uuid: str,
        wanted: Self,
        source: Values,
        siblings: Sequence[Values],
        risk: frozenset[str],
    ) -> Changed:
        self.heard.append(self._hear())
        self.asked.append((uuid, wanted, dict(source), list(siblings)))
        if wanted.name in self._fails:
            raise errors.CloneError(instance=uuid, host="-", reason="as it was told")
        unproven = tuple(sorted(risk & set(self._obstacles)))
        return Changed(self.read(uuid), f'{{"name": "{wanted.name}"}}', unproven)


def allow(node: Node, identities: object | None = None, **more: object) -> None:
    """Let a node clone running instances."""
    node.overrides |= {"enable_live_clone": True, **more}
    restart(node, identities)


def restart(node: Node, identities: object | None = None) -> None:
    node.new_driver()
    if identities is not None:
        node.driver.clones.identities = identities  # type: ignore[assignment]


def new(count: int, **more: object) -> list[Any]:
    return [
        types.SimpleNamespace(
            uuid=str(uuid.uuid4()), name=f"clone-{uuid.uuid4().hex[:6]}", **more
        )
        for _ in range(count)
    ]


@dataclasses.dataclass
class Counting:
    """A real guest that counts on its disk, and what is seen of it."""

    world: World
    instance: Any

    @property
    def console(self) -> Path:
        name = f"qemu/virtmigrate-{self.instance.uuid}.log"
        return self.world.a.host.logs / name

    def beats(self) -> list[int]:
        if not self.console.exists():
            return []
        return [beat.number for beat in guests.beats(self.console)]

    def expect_it_counts(self) -> None:
        """It goes on, one by one, from where it was."""
        before = len(self.beats())
        wait_for(lambda: len(self.beats()) > before + 1, 90)
        found = self.beats()
        assert found == list(range(found[0], found[0] + len(found)))

    def expect_whole(self) -> int:
        """All that it wrote to its disk is there, in one boot; turns it off."""
        self.world.a.driver.power_off(self.instance)
        path = self.world.tmp / f"seen-{self.instance.uuid}"
        path.write_bytes(self.world.read(self.world.a, self.instance))
        log = guests.verify(path)
        path.unlink()
        assert log.problems == []
        assert log.boots == 1
        assert log.last >= self.beats()[-1]
        return log.last


def counting(world: World, *, mac: str = "") -> Counting:
    """A guest of the sandbox's image, with an interface if a MAC is given."""
    # With less its kernel does not boot.
    instance = world.instance(memory_mb=96)
    meta = {"path": str(guests.image().path), "disk_format": "raw"}
    vif = {"address": mac, "type": "bridge", "network": {"bridge": "br0"}}
    plugged = [vif] if mac else None
    world.a.driver.spawn(None, instance, meta, network_info=plugged)
    found = Counting(world, instance)
    wait_for(lambda: len(found.beats()) > 1, 120)
    return found


def dummy(world: World, *, mac: str = "", size: int = 4 * MiB, **flavor: int) -> Any:
    """A guest without a system, that runs: what it wrote is written for it."""
    instance = world.instance(**flavor)
    meta = {"path": str(world.image(size)), "disk_format": "raw"}
    vif = {"address": mac, "type": "bridge", "network": {"bridge": "br0"}}
    world.a.driver.spawn(None, instance, meta, network_info=[vif] if mac else None)
    return instance


LISTEN = """
import socket, sys
found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
found.bind(("br0", 0))
print("listening", flush=True)
while True:
    frame = found.recv(65535)
    print(frame[6:12].hex(":"), frame[12:14].hex(), flush=True)
"""


class Ear:
    """Hears every frame on a host's bridge, until it is closed."""

    def __init__(self, world: World) -> None:
        where = ["nsenter", "--target", str(world.a.host.pid), "--net"]
        argv = [*where, sys.executable, "-c", LISTEN]
        self._path = world.tmp / "frames"
        self._program = subprocess.Popen(
            argv,
            stdout=self._path.open("w"),
            stdin=subprocess.DEVNULL,
        )
        wait_for(lambda: "listening" in self._path.read_text(), 30)

    def senders(self) -> set[str]:
        """Return the MACs of guests that sent anything; hosts have others."""
        lines = self._path.read_text().splitlines()[1:]
        found = {line.partition(" ")[0] for line in lines}
        return {each for each in found if each.startswith("52:54:00")}

    def close(self) -> None:
        self._program.kill()
        self._program.wait()
