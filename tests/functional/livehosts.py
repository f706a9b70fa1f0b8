# SPDX-License-Identifier: Apache-2.0
"""A guest that beats, two hosts it can run on, and somebody who watches both."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt
import pytest

from sandbox import guest as guests
from tests.functional import silence
from tests.functional.conftest import Node, World

_LOOK = 0.05


def accept(world: World, **more: object) -> None:
    """Let both hosts take moves, and live ones end soon where they stall."""
    for node in (world.a, world.b):
        node.overrides = {"accept_moves": True, **more}
        node.new_driver()


def between(world: World, request: pytest.FixtureRequest, **more: object) -> World:
    """Let both hosts see one directory, or have one each, as the parameter says.

    The second is left out but with --full: what is tested hardly differs by it.
    """
    if request.param == "apart" and not request.config.getoption("--full"):
        pytest.skip("with --full")
    if request.param == "shared":
        world.share()
    accept(world, **more)
    return world


def console(node: Node, instance: Any) -> Path:
    return node.host.logs / f"qemu/virtmigrate-{instance.uuid}.log"


def numbers(node: Node, instance: Any) -> list[int]:
    """The beats of a guest on one host."""
    path = console(node, instance)
    return [beat.number for beat in guests.beats(path)] if path.exists() else []


def wait_for(node: Node, instance: Any, count: int, timeout: float = 90.0) -> None:
    """Wait until a guest beat so often on a host; else tell what is to know of it."""
    deadline = time.monotonic() + timeout
    while len(numbers(node, instance)) < count:
        if time.monotonic() > deadline:
            raise AssertionError(
                f"no {count} beats on {node.host.name}: {silence.told(node, instance)}"
            )
        time.sleep(0.2)


def beating(world: World) -> Any:
    """A guest that runs on the first host, and beats."""
    instance = world.spawn(world.a, guests.image().path, memory_mb=128)
    wait_for(world.a, instance, 2)
    return instance


def expect_no_beat_lost(world: World, instance: Any) -> None:
    """All beats of both hosts follow each other; its disk has all records, once."""
    before, after = numbers(world.a, instance), numbers(world.b, instance)
    assert before and after
    found = before + after
    assert found == list(range(found[0], found[0] + len(found)))
    assert len(guests.boots(console(world.a, instance))) == 1
    assert guests.boots(console(world.b, instance)) == []


def verified(world: World, node: Node, instance: Any) -> guests.CounterLog:
    """What the guest's records on its disk say, once it is off."""
    world.tmp.joinpath("guest-view").unlink(missing_ok=True)
    world.read(node, instance)
    return guests.verify(world.tmp / "guest-view")


@dataclass
class Watcher:
    """Looks at both hosts all the time."""

    both: list[str] = field(default_factory=list)
    """Looks at which the guest ran on both."""
    looks: int = 0


@contextlib.contextmanager
def watching(world: World, instance: Any) -> Iterator[Watcher]:
    """Watch that a guest never runs on two hosts.

    Two looks at the first host, with one at the second between them: whatever runs at
    both ends of that on the first, and on the second in between, runs on both.
    """
    watcher, stop = Watcher(), threading.Event()

    def look() -> None:
        while not stop.wait(_LOOK):
            first = running(world.a, instance)
            if first and running(world.b, instance) and running(world.a, instance):
                watcher.both.append(f"{time.time():.2f}")
            watcher.looks += 1

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watcher
    finally:
        stop.set()
        thread.join(20)


def running(node: Node, instance: Any) -> bool:
    """Tell whether a QEMU of the guest runs its CPUs; asked of QEMU's own monitor.

    Not of libvirt's state alone: its libvirtd may be killed, and the guest go on.
    """
    with contextlib.suppress(libvirt.libvirtError), node.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        return bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)
    return False


def qemu(node: Node) -> int:
    """The pid of the one QEMU of a host."""
    (pid,) = node.host.qemu_pids()
    return pid


def settle(world: World, rounds: int = 3) -> list[str]:
    """Settle both hosts, as time does; return what is left."""
    left: list[str] = []
    for _ in range(rounds):
        left = [*world.a.driver.settle(), *world.b.driver.settle()]
        if not left:
            break
    return left


def end(world: World, instance: Any) -> None:
    """Remove it wherever it is."""
    for node in (world.a, world.b):
        with contextlib.suppress(Exception):
            node.driver.destroy(None, instance)


def run(argv: list[str]) -> None:
    subprocess.run(argv, check=True, timeout=60)
