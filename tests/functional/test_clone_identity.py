# SPDX-License-Identifier: Apache-2.0
"""Clones of a guest that has an agent: it makes them somebody else, and says so."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from sandbox import identityimage
from tests.functional import cloneworld
from tests.functional.cloneworld import MAC, Ear, new
from tests.functional.conftest import World
from tests.functional.test_agent import wait_for
from tests.functional.twins import dhcp
from virtmigrate import domainxml
from virtmigrate.model import CloneState


def leased(console: Path) -> bool:
    return console.exists() and "LEASE" in console.read_text(errors="replace")


def sh(world: World, instance: Any, script: str) -> str:
    guest = world.a.driver.clones.identities._guest(instance.uuid)  # type: ignore[attr-defined]
    path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
    found = guest.run(["/bin/sh", "-c", f"{path}; {script}"], timeout=60)
    return str(found.out.decode().strip())


@pytest.mark.timeout(900)
def test_somebody_else(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not one frame before, names of their own after; each can be told from all."""
    cloneworld.allow(world.a, clone_identity_timeout=600.0)
    with dhcp(world.a.host, tmp_path_factory.mktemp("dhcp")):
        instance = world.instance(memory_mb=128)
        meta = {"path": str(identityimage.image().path), "disk_format": "raw"}
        vif = {"address": MAC, "type": "bridge", "network": {"bridge": "br0"}}
        world.a.driver.spawn(None, instance, meta, network_info=[vif])
        log = world.a.host.logs / f"qemu/virtmigrate-{instance.uuid}.log"
        wait_for(functools.partial(leased, log), 180)
        agent = "connected"
        wait_for(lambda: domainxml.agent_state(world.a.xml(instance)) == agent, 120)
        ear = Ear(world)
        try:
            twins = new(2)
            found = world.a.driver.clone(None, instance, twins)
            assert [each.state for each in found] == [CloneState.READY] * 2, found
            for each in found:
                assert json.loads(each.report)["ok"] is True
            everybody = [instance, *twins]
            keys = "sha256sum /etc/dropbear/*"
            for script in ("cat /etc/machine-id", "hostname", keys):
                said = {sh(world, each, script) for each in everybody}
                assert len(said) == 3, script
            assert [sh(world, each, "hostname") for each in twins] == [
                each.name for each in twins
            ]
            for each in twins:
                (interface,) = domainxml.interfaces(world.a.xml(each))
                assert interface.bridge == "br0"
                address = sh(world, each, "cat /sys/class/net/eth0/address")
                assert address == interface.mac
                console = world.a.host.logs / f"qemu/virtmigrate-{each.uuid}.log"
                wait_for(functools.partial(leased, console), 180)
        finally:
            ear.close()
