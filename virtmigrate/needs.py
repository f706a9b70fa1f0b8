# SPDX-License-Identifier: Apache-2.0
"""What a domain asks of the host that is to run it."""

from typing import TYPE_CHECKING

from virtmigrate import errors, model, xml
from virtmigrate.host import Host

if TYPE_CHECKING:
    import libvirt


class Needs(model.Struct, frozen=True):
    """What a domain asks of the host that is to run it."""

    uuid: str
    name: str
    arch: str
    machine: str
    virt_type: str
    cpu_model: str | None = None
    """A named model; None when any CPU of the host will do."""


def demand(host: Host, needed: Needs, *, is_there: bool = False) -> None:
    """Raise HostError unless a host can run such a domain and has its name free.

    Arguments:
        is_there: the domain itself is on that host now.
    """
    with host.session("asking what it can run") as session:
        conn = session.conn
        _demand_free(host, conn, needed, is_there)
        text = conn.getDomainCapabilities(
            None, needed.arch, needed.machine, needed.virt_type, 0
        )
    if needed.cpu_model and not _usable(text, needed.cpu_model):
        raise errors.HostError(
            host=host.name, reason=f"CPU model {needed.cpu_model} is not usable"
        )


# Private


def _demand_free(
    host: Host, conn: "libvirt.virConnect", needed: Needs, is_there: bool
) -> None:
    for domain in conn.listAllDomains(0):
        if is_there and needed.uuid == domain.UUIDString():
            continue
        if needed.uuid == domain.UUIDString() or needed.name == domain.name():
            raise errors.HostError(
                host=host.name,
                reason=f"it has a domain {domain.name()} ({domain.UUIDString()})",
            )


def _usable(capabilities: str, model_name: str) -> bool:
    root = xml.parse(capabilities)
    for found in root.findall("cpu/mode[@name='custom']/model"):
        if found.text == model_name:
            return found.get("usable") == "yes"
    return False
