# SPDX-License-Identifier: Apache-2.0
"""Transient disks: which ones are, what that forbids, and what is left of them.

Declaring one changes a word in the instance's record; starts do the rest (scratch.py).
"""

from collections.abc import Callable, Iterable, Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, scratch
from virtmigrate.instance import Power
from virtmigrate.model import InstanceState, Role
from virtmigrate.snapshottree import Memory

LOG = logging.getLogger(__name__)

_FIXED = (Role.CONFIG, Role.NVRAM)
_OURS = (InstanceState.HERE, InstanceState.ARRIVED)


def declare(
    here: node.Node,
    uuid: str,
    target: str,
    demand_no_move: Callable[[str], None],
    *,
    transient: bool,
) -> None:
    """Have a disk of an instance that is off be transient from its next start on, or
    be written to again; nothing happens when it is so.

    Can be called again: the record is changed first, and the next start goes by it.
    Raises TransientRefused, InvalidState: nothing was changed.

    Arguments:
        demand_no_move: raises InvalidState while a move of an instance is open here.
    """
    with here.claimed(uuid):
        here.demand_settled(uuid)
        demand_no_move(uuid)
        found = here.entitled(uuid)
        demand(here, uuid, {target}, _writable(found))
        refusal = _refusal(here, found, target, transient=transient)
        if refusal is not None:
            raise errors.TransientRefused(
                instance=uuid,
                host=here.name,
                target=target,
                wanted="transient" if transient else "permanent",
                reason=refusal,
            )
        here.scratch.drop(uuid)
        disks = tuple(
            msgspec.structs.replace(ref, transient=transient)
            if ref.target == target
            else ref
            for ref in found.disks
        )
        _publish(here, found, disks)
    LOG.info("instance=%s disk=%s transient=%s", uuid, target, transient)


def demand(
    here: node.Node, uuid: str, wanted: Iterable[str], writable: set[str]
) -> None:
    """Raise TransientRefused for targets that are no disk its guest writes to."""
    for target in sorted(set(wanted) - writable):
        raise errors.TransientRefused(
            instance=uuid,
            host=here.name,
            target=target,
            wanted="transient",
            reason=f"its guest writes to {', '.join(sorted(writable))} only",
        )


def marked(
    disks: tuple[model.DiskRef, ...], targets: frozenset[str]
) -> tuple[model.DiskRef, ...]:
    """Return new disks of which those are transient."""
    return tuple(
        msgspec.structs.replace(ref, transient=ref.target in targets) for ref in disks
    )


def burdens(here: node.Node, record: model.Instance) -> list[str]:
    """Return why a guest that runs, or is saved, could not go on at another host.

    What it wrote to a transient disk is needed for that. A cold move drops it.
    """
    return [
        f"disk {ref.target} is transient, and what its guest wrote lies in backend "
        f"{backend.name}, which only {here.name} has: move it cold, which drops that"
        for ref in scratch.transient(record)
        if not (backend := here.scratch.place(ref)).capabilities.shared
    ]


def settle(here: node.Node, demand_no_move: Callable[[str], None]) -> list[str]:
    """Remove layers whose guests are off; return what else is wrong, and why.

    What is in another operation is looked at the next time.
    """
    left: list[str] = []
    owners = {volume.owner for _, volume in here.scratch.all()}
    for uuid in sorted(owners | set(here.instances.names())):
        try:
            with here.locks.only(f"instance-{uuid}") as is_idle:
                if is_idle:
                    left += _settle(here, uuid, uuid in owners, demand_no_move)
        except errors.InvalidState as e:
            LOG.debug("instance=%s its layers stay: %s", uuid, e)
        except errors.Error as e:
            LOG.warning("instance=%s its layers are not looked at: %s", uuid, e)
    return left


def amiss(here: node.Node, volume: model.Volume) -> Iterator[str]:
    """Yield what does not fit of a layer over a transient disk."""
    over = volume.transient
    if over is None:
        return
    below = here.backends.get(over.backend)
    if below is None or below.volumes.find(over.volume) is None:
        yield f"it stands on {over.volume} in {over.backend}, which has no record"


# Private


def _writable(found: model.Instance) -> set[str]:
    return {ref.target for ref in found.disks if ref.role not in _FIXED}


def _refusal(
    here: node.Node, found: model.Instance, target: str, *, transient: bool
) -> str | None:
    """Return why a disk cannot be declared so now; None if it can."""
    power = here.domains.power(found.uuid)
    if power is not Power.OFF:
        return f"the guest is {power.value}: turn it off first"
    if found.change is not None:
        return f"its snapshots are not settled: {found.change.what.value}"
    if not transient:
        return None
    for disk in domainxml.disks(here.domains.xml(found.uuid)):
        if disk.target == target and disk.readonly:
            return "its configuration says that it is read-only"
    for each in found.snapshots:
        holds = any(disk.target == target for disk in each.disks)
        if holds or each.memory is not Memory.NONE:
            what = "holds it" if holds else "has memory, which fits what is on it"
            return f"snapshot {each.name} {what}: delete that first"
    return None


def _publish(
    here: node.Node, found: model.Instance, disks: tuple[model.DiskRef, ...]
) -> None:
    """Publish the record, then have the domain's configuration say so, too."""
    changed = msgspec.structs.replace(found, disks=disks)
    here.tenures.amend(changed)
    here.publish_instance(changed)
    targets = [ref.target for ref in scratch.transient(changed)]
    text = here.domains.xml(found.uuid)
    here.domains.define(domainxml.with_transient(text, targets))


def _settle(
    here: node.Node,
    uuid: str,
    has_layers: bool,
    demand_no_move: Callable[[str], None],
) -> list[str]:
    stored = here.instances.find(uuid)
    record = stored.body if stored else None
    if record is None:
        # Destroyed, or moved away.
        here.scratch.drop(uuid)
        return []
    if record.host != here.name or record.state not in _OURS:
        return []
    if has_layers:
        here.tenures.demand(record)
        demand_no_move(uuid)
        here.scratch.drop(uuid)
    return list(_trouble(here, record))


def _trouble(here: node.Node, record: model.Instance) -> Iterator[str]:
    """Yield what a human has to see to, of an instance that runs."""
    refs = scratch.transient(record)
    if not refs or here.domains.power(record.uuid) not in (Power.RUNNING, Power.PAUSED):
        return
    live = domainxml.disks(here.domains.live_xml(record.uuid))
    sources = {disk.target: disk.chain[0].source for disk in live if disk.chain}
    tops, failed = here.scratch.tops(record), here.domains.disk_errors(record.uuid)
    for ref in refs:
        top = tops.get(ref.target)
        if top is None or sources.get(ref.target) != top.source:
            yield (
                f"instance {record.uuid}: it was started without virtmigrate, and "
                f"transient disk {ref.target} is read-only for it: turn it off, and "
                "start it here"
            )
        elif ref.target in failed:
            yield (
                f"instance {record.uuid}: the layer of transient disk {ref.target} "
                f"cannot take more ({failed[ref.target]}: transient_limit_mib, or its "
                "storage): the guest stands still; turn it off, which drops the layer"
            )
