# SPDX-License-Identifier: Apache-2.0
"""Why a guest is not heard: what its host, its QEMU and its console say of it."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from tests.functional.conftest import Node

_ASKED = ("info status", "info block", "info block-jobs", "info migrate")
_CPU = "info registers"
_TAIL = 1500
"""Characters of a log that are told."""


def told(node: Node, instance: Any) -> str:
    """Tell all that can be found out now; what cannot says why."""
    said = [f"free: {_said(lambda: _free(node.path))}"]
    with _domain(node, instance) as domain:
        if isinstance(domain, str):
            said.append(domain)
        else:
            said += _of_domain(domain)
    for name in (instance.name, f"virtmigrate-{instance.uuid}"):
        path = node.host.logs / f"qemu/{name}.log"
        said.append(f"{path.name}: …{_said(functools.partial(_tail, path))}")
    return "\n".join(said)


# Private


@contextlib.contextmanager
def _domain(node: Node, instance: Any) -> Iterator["libvirt.virDomain | str"]:
    with node.libvirt() as conn:
        try:
            found = conn.lookupByUUIDString(instance.uuid)
        except libvirt.libvirtError as e:
            found = str(e)
        yield found


def _of_domain(domain: "libvirt.virDomain") -> Iterator[str]:
    yield f"state: {_said(domain.state)}"
    yield f"job: {_said(lambda: domain.jobStats(0))}"
    yield f"disk errors: {_said(domain.diskErrors)}"
    for command in (*_ASKED, _CPU):
        yield f"{command}: {_said(functools.partial(_monitor, domain, command))}"
    # Whether its CPU goes on: another place, or halted again.
    time.sleep(0.5)
    yield f"{_CPU}: {_said(lambda: _monitor(domain, _CPU))}"


def _said(ask: Callable[[], object]) -> str:
    try:
        return str(ask())
    except (libvirt.libvirtError, OSError) as e:
        return repr(e)


def _monitor(domain: "libvirt.virDomain", command: str) -> str:
    flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
    said = str(libvirt_qemu.qemuMonitorCommand(domain, command, flags))
    return said if command != _CPU else "\n".join(said.splitlines()[:8])


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-_TAIL:]


def _free(path: Path) -> str:
    found = os.statvfs(path)
    return f"{found.f_bavail * found.f_frsize} bytes in {path}"
