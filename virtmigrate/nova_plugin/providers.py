# SPDX-License-Identifier: Apache-2.0
"""What placement is told of a host: inventory, and traits of its backends."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import nova.conf
from nova.compute import utils
from oslo_log import log as logging

from virtmigrate.inventory import Storage
from virtmigrate.units import GiB

CONF = nova.conf.CONF
LOG = logging.getLogger(__name__)

TRAIT = "CUSTOM_VIRTMIGRATE_"
"""What the names of our traits begin with; all others are left alone."""


def inventory(
    resources: Mapping[str, Any],
    storage: Sequence[Storage],
    provider_tree: Any,
    ratios: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Return the inventory of a compute node in placement's terms.

    Storage that other hosts have, too, is not this node's: it is counted once, at a
    sharing provider that the operator makes. Only where there is neither that nor any
    storage of its own is it counted here, on each host, with a warning.
    """
    found = {
        "VCPU": _entry(resources["vcpus"], CONF.reserved_host_cpus, ratios["VCPU"]),
        "MEMORY_MB": _entry(
            resources["memory_mb"], CONF.reserved_host_memory_mb, ratios["MEMORY_MB"]
        ),
    }
    size = disk_size(storage, is_shared=provider_tree.has_sharing_provider("DISK_GB"))
    if size:
        reserved = utils.convert_mb_to_ceil_gb(CONF.reserved_host_disk_mb)
        found["DISK_GB"] = _entry(size, min(reserved, size), ratios["DISK_GB"])
    return found


def disk_size(storage: Sequence[Storage], *, is_shared: bool) -> int:
    """Return the GiB that a compute node itself has.

    Arguments:
        is_shared: a sharing provider of disks belongs to the node.
    """
    own = sum(each.capacity for each in storage if not each.shared)
    if not own and not is_shared:
        own = sum(each.capacity for each in storage)
        if own:
            LOG.warning(
                "Shared storage is counted at each host: make a sharing provider of "
                "DISK_GB (docs/nova.md)"
            )
    return own // GiB


def set_traits(provider_tree: Any, nodename: str, storage: Sequence[Storage]) -> None:
    """Give a node the traits of its backends, and take away those of former ones."""
    wanted = {each for place in storage for each in traits(place)}
    ours = {
        each for each in provider_tree.data(nodename).traits if each.startswith(TRAIT)
    }
    provider_tree.remove_traits(nodename, *(ours - wanted))
    provider_tree.add_traits(nodename, *(wanted - ours))


def traits(place: Storage) -> set[str]:
    """Return the traits of a storage: its backends by name, and what they are."""
    words = [f"BACKEND_{name}" for name in place.backends]
    return {TRAIT + _word(each) for each in [*words, *place.traits]}


# Private


def _entry(total: int, reserved: int, ratio: float) -> dict[str, Any]:
    return {
        "total": total,
        "reserved": reserved,
        "min_unit": 1,
        "max_unit": total,
        "step_size": 1,
        "allocation_ratio": ratio,
    }


def _word(text: str) -> str:
    """Return a word as placement takes it: media=ssd is MEDIA_SSD."""
    return re.sub(r"[^A-Z0-9_]", "_", text.upper())
