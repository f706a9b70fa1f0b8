# SPDX-License-Identifier: Apache-2.0
"""Taking over an instance from a host that is down, where its disks are seen here.

In this order, and each step can be done again:

1. All is looked at: what the instance is (by the record beside its disks), that all of
   its disks are seen from here, and that its old host can be kept from writing.
2. The old host is fenced, and the record says that this host has it. From here on the
   old one starts it no more, whatever it remembers.
3. The instance's record is published here, and its domain is defined.
4. It is started, if the caller wants that.
"""

import uuid as uuids
from collections.abc import Iterator

import msgspec
from oslo_log import log as logging

from virtmigrate import domainxml, errors, model, node, storagepool
from virtmigrate.backends import base
from virtmigrate.instance import Power
from virtmigrate.migration import trees
from virtmigrate.migration.plan import NVRAM
from virtmigrate.model import InstanceState, TransferState, VolumeState

LOG = logging.getLogger(__name__)

_OPEN = (
    TransferState.GIVEN,
    TransferState.TAKEN,
    TransferState.SETTLED,
    TransferState.RETURNING,
)
_RUNNABLE = (InstanceState.HERE, InstanceState.ARRIVED)


def recorded(here: node.Node, uuid: str) -> model.Instance:
    """Return an instance as its host had it, by the record beside its disks.

    Raises TakeOverRefused where no backend of this host has one.
    """
    found = _tenures(here, uuid)
    if not found:
        raise _refused(
            here, uuid, "no backend of this host has a record of who may run it"
        )
    # Where an attempt was killed between two backends, one says this host already.
    others = [each for each in found.values() if each.host != here.name]
    return (others or list(found.values()))[0].record


def run(
    here: node.Node, uuid: str, *, power_on: bool = True, host_is_down: bool = False
) -> model.Instance:
    """Take an instance over, and start it; return its record.

    Can be called again. Raises TakeOverRefused: nothing was changed.

    Arguments:
        host_is_down: an operator's word that its host has stopped for certain, for
            disks whose storage cannot see to that.
    """
    with here.claimed(uuid):
        _demand_free(here, uuid)
        wanted = _placed(here, recorded(here, uuid))
        xml = _xml(here, wanted)
        with_xml = msgspec.structs.replace(wanted, domain_xml=xml)
        here.tenures.seize(with_xml, is_down=host_is_down)
        _thaw(here, wanted)
        here.publish_instance(wanted)
        here.domains.define(xml)
        if power_on:
            here.start(uuid)
    LOG.warning("instance=%s taken over by %s", uuid, here.name)
    return wanted


def stop_lost(here: node.Node) -> list[str]:
    """Turn off what another host has taken over; return what is left of it.

    For a host that comes back with guests that nobody could stop. What is in another
    operation, or on storage that is down, is looked at the next time.
    """
    left = []
    # Hosts that share the records have one of an instance: what runs says the rest.
    domains = {uuid for uuid, _ in here.domains.all()}
    for uuid in sorted(domains.union(here.instances.names())):
        try:
            with here.locks.only(f"instance-{uuid}") as is_idle:
                left += _stop_lost(here, uuid) if is_idle else []
        except errors.Error as e:
            LOG.warning("instance=%s not looked at: %s", uuid, e)
    return left


# Private


def _stop_lost(here: node.Node, uuid: str) -> list[str]:
    own = here.own_record(uuid)
    if own is None:
        takers = [] if _is_off(here, uuid) else _takers(here, uuid)
        return _turned_off(here, uuid, "-", takers[0]) if takers else []
    if own.state not in _RUNNABLE:
        return []
    is_down = any(ref.backend in here.down for ref in own.disks)
    if is_down or not here.tenures.concern(own):
        return []
    try:
        here.tenures.demand(own)
        here.tenures.note_late(own, is_off=_is_off(here, uuid))
        return []
    except errors.HeldElsewhere as e:
        return _turned_off(here, uuid, own.operation, str(e.holder))


def _turned_off(here: node.Node, uuid: str, operation: str, holder: str) -> list[str]:
    """Turn a domain off, and say what is left of it."""
    if not _is_off(here, uuid):
        LOG.error("instance=%s is turned off: it is %s's now", uuid, holder)
        here.domains.kill(uuid)
    return [
        f"{operation}: instance {uuid} is {holder}'s now, and off here; "
        "destroy what is left of it on this host"
    ]


def _takers(here: node.Node, uuid: str) -> list[str]:
    """Return the hosts that took an instance from this one, and have it or had it."""
    found = [here.tenures.taker(backend, uuid) for backend in here.up()]
    return [each for each in found if each is not None]


def _is_off(here: node.Node, uuid: str) -> bool:
    return not here.domains.exists(uuid) or here.domains.power(uuid) is Power.OFF


def _refused(here: node.Node, uuid: str, reason: str) -> errors.TakeOverRefused:
    return errors.TakeOverRefused(instance=uuid, host=here.name, reason=reason)


def _tenures(here: node.Node, uuid: str) -> dict[str, model.Tenure]:
    """Return what stands beside an instance's disks, by backend."""
    found = {}
    for backend in here.up():
        if backend.capabilities.shared:
            stored = backend.tenures.find(uuid)
            if stored is not None and not stored.body.gone:
                found[backend.name] = stored.body
    return found


def _demand_free(here: node.Node, uuid: str) -> None:
    """See that no move of it is open here, and that no domain of it runs."""
    own = here.own_record(uuid)
    if own is not None and own.state not in (InstanceState.HERE, InstanceState.GONE):
        raise _refused(
            here,
            uuid,
            f"its record here says {own.state.value}, operation {own.operation}: "
            "confirm or revert that move",
        )
    for stored in here.mailbox.open_transfers():
        if stored.body.instance == uuid and stored.body.state in _OPEN:
            raise _refused(
                here, uuid, f"its move to this host ({stored.name}) is not over"
            )
    power = here.domains.power(uuid) if here.domains.exists(uuid) else Power.OFF
    if power is not Power.OFF:
        reason = f"its domain here is {power.value}; destroy what is left of it here"
        raise _refused(here, uuid, reason)


def _placed(here: node.Node, found: model.Instance) -> model.Instance:
    """Return the instance as it is to be here; TakeOverRefused without all disks."""
    disks = tuple(
        msgspec.structs.replace(ref, backend=_backend_of(here, found, ref))
        for ref in found.disks
    )
    names = zip(found.disks, disks, strict=True)
    backends = {before.backend: now.backend for before, now in names}
    detached = tuple(_detached(here, found))
    change = found.change and trees.change_at_peer(found.change, backends)
    return msgspec.structs.replace(
        found,
        host=here.name,
        state=InstanceState.HERE,
        operation=uuids.uuid4().hex[:16],
        disks=disks,
        snapshots=trees.at_peer(found.snapshots, {}, backends),
        detached=detached,
        change=change,
        peer=None,
        domain_xml=None,
        autostart=False,
    )


def _detached(here: node.Node, found: model.Instance) -> Iterator[model.DiskRef]:
    """Yield the disks that reverts took away, as far as they are seen from here."""
    for ref in found.detached:
        try:
            name = _backend_of(here, found, ref)
        except errors.TakeOverRefused:
            LOG.warning(
                "instance=%s volume=%s, which a revert detached, stays on %s",
                found.uuid,
                ref.volume,
                found.host,
            )
            continue
        yield msgspec.structs.replace(ref, backend=name)


def _backend_of(here: node.Node, found: model.Instance, ref: model.DiskRef) -> str:
    """Return the backend in which this host sees a disk; other hosts may call it
    otherwise."""
    names = sorted(_tenures(here, found.uuid), key=lambda name: name != ref.backend)
    for name in names:
        stored = here.backend(name).volumes.find(ref.volume)
        if stored is not None and stored.body.owner == found.uuid:
            return name
    raise _refused(
        here,
        found.uuid,
        f"its disk {ref.target} ({ref.volume}, in {found.host}'s backend "
        f"{ref.backend}) is not seen from here",
    )


def _thaw(here: node.Node, wanted: model.Instance) -> None:
    """Have its disks usable: its old host may have died while it merged a layer."""
    for name in {ref.backend for ref in wanted.disks}:
        _rename_pools(here.backend(name), wanted.uuid)
    for ref in wanted.disks:
        backend = here.backend(ref.backend)
        found = backend.volumes.read(ref.volume).body
        if found.state in (VolumeState.FROZEN, VolumeState.MERGING):
            usable = msgspec.structs.replace(
                found, state=VolumeState.USABLE, digest=None
            )
            backend.update(usable)


def _rename_pools(backend: base.Backend, uuid: str) -> None:
    """Have records name the pools of this host: another may call the same otherwise."""
    ours = {pool.name.rpartition("-")[2]: pool for pool in _pools(backend)}
    for stored in list(backend.catalog.all(strict=True)):
        volume = stored.body
        pool = ours.get(volume.pool.rpartition("-")[2])
        if volume.owner == uuid and pool is not None and pool.name != volume.pool:
            moved = msgspec.structs.replace(volume, pool=pool.name)
            backend.update(msgspec.structs.replace(moved, path=backend.path(moved)))


def _pools(backend: base.Backend) -> tuple[storagepool.Pool, ...]:
    return backend.incoming, backend.disks


def _xml(here: node.Node, wanted: model.Instance) -> str:
    """Return its old host's XML, with the disks as this host finds them."""
    found = recorded(here, wanted.uuid).domain_xml
    xml = domainxml.without_runtime(str(found))
    xml = domainxml.with_emulator(xml, None)
    if obstacles := domainxml.obstacles(xml):
        raise _refused(here, wanted.uuid, f"its domain cannot be moved: {obstacles}")
    refs = {
        ref.target: here.backend(ref.backend).layers(ref.volume) for ref in wanted.disks
    }
    nvram = refs.pop(NVRAM, None)
    xml = domainxml.with_disks(xml, refs)
    return domainxml.with_nvram(xml, nvram[0].source) if nvram else xml
