# SPDX-License-Identifier: Apache-2.0
"""What a guest without a system would do, done for it."""

import json
from typing import Any

import libvirt_qemu

from tests.functional.conftest import Node, World
from tests.functional.sides import Side
from virtmigrate.units import KiB, MiB

OFFSET = 2 * MiB
LENGTH = 64 * KiB


def write(
    node: Node | Side, instance: Any, byte: int, offset: int = OFFSET, disk: int = 0
) -> None:
    """Have QEMU write a block to a disk, as the guest would."""
    device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
    line = f'qemu-io -d {device} "write -f -P {byte} {offset} 64k"'
    command = {
        "execute": "human-monitor-command",
        "arguments": {"command-line": line},
    }
    with node.libvirt() as conn:
        domain = conn.lookupByUUIDString(instance.uuid)
        said = libvirt_qemu.qemuMonitorCommand(domain, json.dumps(command), 0)
    assert "error" not in json.loads(said)["return"].lower(), said


def byte(world: World, instance: Any, offset: int = OFFSET, target: str = "vda") -> int:
    """Return what a block holds, by qemu-img."""
    found = world.read(world.a, instance, target)[offset : offset + LENGTH]
    assert len(set(found)) == 1
    return found[0]


def power(node: Node | Side, instance: Any, wanted: str) -> None:
    if wanted == "off":
        node.driver.power_off(instance)
    elif wanted == "paused":
        node.driver.pause(instance)
