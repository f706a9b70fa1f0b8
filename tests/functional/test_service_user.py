# SPDX-License-Identifier: Apache-2.0
"""All of it as an unprivileged user in group libvirt, QEMU as a user of its own."""

import grp
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import Sandbox
from tests.functional.conftest import Node, World, digest
from tests.functional.test_kills import settings
from virtmigrate.units import MiB


@pytest.fixture
def service(box: Sandbox, tmp_path: Path) -> Iterator[World]:
    pair = tuple(box.add_host(f"svc{n}", service_user=True) for n in (1, 2))
    world = World(pair, box, tmp_path, volume_gid=group(), volume_mode="0660")  # type: ignore[arg-type]
    yield world
    world.close()
    for host in pair:
        box.remove_host(host.name)


def group() -> int:
    return grp.getgrnam("libvirt").gr_gid


@pytest.mark.parametrize("then", ["confirm", "revert"])
def test_as_a_service_user(service: World, box: Sandbox, then: str) -> None:
    instance = service.spawn(service.a, service.image(4 * MiB))
    before = digest(service.a.disk(instance))
    plan = {
        "a": as_user(service.a, box),
        "b": as_user(service.b, box),
        "instance": instance.uuid,
        "flavor": vars(instance.flavor),
        "point": 0,
        "then": then,
    }
    path = box.home / "plan.json"
    path.write_text(json.dumps(plan))
    path.chmod(0o644)
    argv = [sys.executable, "-m", "tests.functional.killed", str(path)]
    done = subprocess.run(
        box.command(argv, user=True), capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    on = service.b if then == "confirm" else service.a
    assert on.state_of(instance) == "running"
    assert digest(on.disk(instance)) == before
    assert on.disk(instance).parent.name == "disks"


def as_user(node: Node, box: Sandbox) -> dict[str, object]:
    """The node's settings with a state directory that the user may write."""
    found = settings(node)
    found["values"]["state_path"] = str(box.home / f"state-{node.host.name}")
    return found
