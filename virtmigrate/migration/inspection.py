# SPDX-License-Identifier: Apache-2.0
"""An instance as it is: its domain, and whether that is what the records say.

Looked at for the plan, again before the guest is stopped, and once more when it is
off: sending its disks ahead may have taken hours, and others can use its domain.
"""

from collections.abc import Mapping

import msgspec

from virtmigrate import domainxml, errors, model, node
from virtmigrate.instance import Power

MOVABLE = (Power.RUNNING, Power.PAUSED, Power.OFF)

NVRAM = "nvram"
"""Target of the reference to the UEFI variables, which are no disk."""


def inspect(here: node.Node, record: model.Instance) -> model.Instance:
    """Return an instance's record with all that is needed to put it back.

    Raises MigrationRefused when it cannot be carried, or its domain uses other
    volumes than its record has.
    """
    uuid = record.uuid
    xml = here.domains.xml(uuid)
    found = [*domainxml.obstacles(xml), *here.domains.burdens(uuid)]
    if found:
        raise _refused(uuid, "it cannot be carried: " + "; ".join(found))
    power = here.domains.power(uuid)
    if power not in MOVABLE:
        raise _refused(uuid, f"it is {power.value}")
    demand_recorded(here, record, xml)
    if power is not Power.OFF:
        live, tops = here.domains.live_xml(uuid), here.scratch.tops(record)
        demand_recorded(here, record, live, tops)
    return msgspec.structs.replace(
        record,
        domain_xml=xml,
        power=power.value,
        autostart=here.domains.autostart(uuid),
    )


def demand_recorded(
    here: node.Node,
    record: model.Instance,
    xml: str,
    tops: Mapping[str, domainxml.Layer] | None = None,
) -> None:
    """See that a domain uses what the records say, all of it, and no more.

    Arguments:
        tops: layers over transient disks, by target; there are some while it runs.
    """
    recorded = {ref.target: ref for ref in record.disks}
    for disk in domainxml.disks(xml):
        if disk.chain:
            ref = recorded.pop(disk.target, None)
            if ref is None:
                raise _refused(record.uuid, f"disk {disk.target} has no record")
            top = (tops or {}).get(ref.target) or _top(here, ref)
            _demand_same(record.uuid, disk, top)
    nvram = recorded.pop(NVRAM, None)
    _demand_nvram(record.uuid, _top(here, nvram) if nvram else None, xml)
    if recorded:
        raise _refused(record.uuid, f"the domain has no disk {', '.join(recorded)}")


# Private


def _top(here: node.Node, ref: model.DiskRef) -> domainxml.Layer:
    return here.backend(ref.backend).layers(ref.volume)[0]


def _demand_same(uuid: str, disk: domainxml.FoundDisk, top: domainxml.Layer) -> None:
    found = disk.chain[0]
    if (found.source, found.fmt) != (top.source, top.fmt):
        raise _refused(
            uuid,
            f"disk {disk.target} is {found.source} as {found.fmt}, and its record says "
            f"{top.source} as {top.fmt}",
        )


def _demand_nvram(uuid: str, layer: domainxml.Layer | None, xml: str) -> None:
    firmware = domainxml.firmware(xml)
    path = firmware.nvram if firmware else None
    recorded = layer.source if layer else None
    if path != recorded:
        raise _refused(uuid, f"its NVRAM is {path}, and its record says {recorded}")


def _refused(uuid: str, reason: str) -> errors.MigrationRefused:
    return errors.MigrationRefused(instance=uuid, reason=reason)
