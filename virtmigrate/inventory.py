# SPDX-License-Identifier: Apache-2.0
"""What a host has and what of it is used, in Nova's terms."""

from typing import Any

from virtmigrate import node, xml
from virtmigrate.units import GiB


def resources(here: node.Node) -> dict[str, Any]:
    """Return the dict of Nova's get_available_resource: memory MiB, disk GiB."""
    with here.host.session("counting resources") as session:
        conn = session.conn
        _model, memory_mb, cpus, *_ = conn.getInfo()
        capabilities = xml.parse(conn.getCapabilities())
        active = [domain.info() for domain in conn.listAllDomains(1)]
        version, hypervisor = conn.getVersion(), conn.getType()
    room = here.files.disks.room()
    arch = capabilities.findtext("host/cpu/arch") or "x86_64"
    return {
        "vcpus": cpus,
        "vcpus_used": sum(vcpus for _s, _max, _mem, vcpus, _t in active),
        "memory_mb": memory_mb,
        "memory_mb_used": sum(most for _s, most, _mem, _v, _t in active) // 1024,
        "local_gb": room.capacity // GiB,
        "local_gb_used": (room.capacity - room.free) // GiB,
        "disk_available_least": here.files.room() // GiB,
        "hypervisor_type": hypervisor,
        "hypervisor_version": version,
        "hypervisor_hostname": here.name,
        "cpu_info": capabilities.findtext("host/cpu/model") or arch,
        "supported_instances": [(arch, here.options.virt_type, "hvm")],
        "numa_topology": None,
    }
