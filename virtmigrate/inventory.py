# SPDX-License-Identifier: Apache-2.0
"""What a host has and what of it is used, in Nova's terms."""

from dataclasses import dataclass, replace
from typing import Any

from virtmigrate import draining, node, storagepool, xml
from virtmigrate.backends import base
from virtmigrate.units import GiB


@dataclass(frozen=True)
class Storage:
    """Room that one or more backends take their volumes from. Sizes are bytes."""

    id: str
    """The same for all backends, on any host, that take from it."""
    shared: bool
    """Other hosts may take from it, too."""
    backends: tuple[str, ...]
    capacity: int
    free: int
    reserved: int
    """What is left free."""
    traits: frozenset[str]

    @property
    def usable(self) -> int:
        return max(0, self.free - self.reserved)

    def all_reserved(self) -> "Storage":
        """Return it as that of a host which takes no new instances."""
        return replace(self, reserved=self.capacity)


def storage(here: node.Node) -> list[Storage]:
    """Return the storage of a host, each once, however many backends lie in it.

    What is down is left out.
    """
    by_id: dict[str, list[base.Backend]] = {}
    rooms: dict[str, storagepool.Room] = {}
    for backend in here.up():
        room = here.room(backend)
        if room is not None:
            id = backend.storage()
            by_id.setdefault(id, []).append(backend)
            rooms[id] = room
    stores = [_storage(id, found, rooms[id]) for id, found in by_id.items()]
    if draining.is_draining(here.mailbox):
        return [each if each.shared else each.all_reserved() for each in stores]
    return stores


def resources(here: node.Node) -> dict[str, Any]:
    """Return the dict of Nova's get_available_resource: memory MiB, disk GiB.

    Storage that other hosts see, too, is not this host's own: see storage(). What
    `reserved` says, in the terms of placement, is all of it while the host is drained.
    """
    with here.host.session("counting resources") as session:
        conn = session.conn
        _model, memory_mb, cpus, *_ = conn.getInfo()
        capabilities = xml.parse(conn.getCapabilities())
        active = [domain.info() for domain in conn.listAllDomains(1)]
        version, hypervisor = conn.getVersion(), conn.getType()
    own = [each for each in storage(here) if not each.shared]
    arch = capabilities.findtext("host/cpu/arch") or "x86_64"
    local = sum(each.capacity for each in own) // GiB
    closed = draining.is_draining(here.mailbox)
    return {
        "draining": closed,
        "reserved": {
            "VCPU": cpus if closed else 0,
            "MEMORY_MB": memory_mb if closed else 0,
            "DISK_GB": local if closed else 0,
        },
        "vcpus": cpus,
        "vcpus_used": sum(vcpus for _s, _max, _mem, vcpus, _t in active),
        "memory_mb": memory_mb,
        "memory_mb_used": sum(most for _s, most, _mem, _v, _t in active) // 1024,
        "local_gb": local,
        "local_gb_used": sum(each.capacity - each.free for each in own) // GiB,
        "disk_available_least": max((each.usable for each in own), default=0) // GiB,
        "hypervisor_type": hypervisor,
        "hypervisor_version": version,
        "hypervisor_hostname": here.name,
        "cpu_info": capabilities.findtext("host/cpu/model") or arch,
        "supported_instances": [(arch, here.options.virt_type, "hvm")],
        "numa_topology": None,
    }


# Private


def _storage(id: str, backends: list[base.Backend], room: storagepool.Room) -> Storage:
    return Storage(
        id=id,
        shared=any(each.capabilities.shared for each in backends),
        backends=tuple(each.name for each in backends),
        capacity=room.capacity,
        free=room.free,
        reserved=max(each.settings.reserved for each in backends),
        traits=frozenset(trait for each in backends for trait in each.settings.traits),
    )
