# SPDX-License-Identifier: Apache-2.0
"""A clone made independent: QEMU copies up what it stands on.

    1  into each disk's top layer comes all that it has of others; the guest runs on
    2  the guest stands still for a moment: only then QEMU writes all of its tables
    3  the layer is fsynced, and the configuration names what it still stands on
    4  its record does, too
    5  what it had lent itself is handed on; the lender may merge

Before 4 the record names what is not needed any more, which stays for that: killed
anywhere, the clone is whole, and all of it can be done again. A journal says that the
guest may stand still; finish() lets it go on.
"""

import contextlib
from pathlib import Path

import msgspec
from oslo_log import log as logging

from virtmigrate import domainstate, domainxml, errors, journal, lending, model, node
from virtmigrate.backends import base
from virtmigrate.instance import Power
from virtmigrate.model import Change, Changing, CloneState, Role
from virtmigrate.progress import Progress
from virtmigrate.snapshot.tidying import Tidying
from virtmigrate.snapshot.work import Demand, Work, new_operation

LOG = logging.getLogger(__name__)

_DOING = "detaching"


class Detaching:
    """Detaches clones of this host, under their claims."""

    def __init__(
        self, here: node.Node, demand_no_move: Demand, directory: Path
    ) -> None:
        self._here = here
        self._demand = demand_no_move
        self._directory = directory
        self._pulls = domainstate.States(here.host)

    def run(self, uuid: str, progress: Progress | None = None) -> set[str]:
        """Do it; return the instances that it stood on, and those that inherit from it.

        Raises CloneRefused, CloneError.
        """
        work = Work(self._here, uuid, self._demand)
        found = work.demand_idle(_DOING)
        if found.cloned is not None and found.cloned.state is CloneState.MAKING:
            raise self._error(errors.CloneRefused, uuid, "it is still being made")
        if self._pulls.power(uuid) is Power.PAUSED:
            reason = "it is paused: let it run, or turn it off"
            raise self._error(errors.CloneRefused, uuid, reason)
        if found.snapshots:
            raise self._error(
                errors.CloneRefused,
                uuid,
                "its snapshots stand on the same volumes: delete them first",
            )
        owners = self.lenders(found)
        owing = [ref for ref in found.disks if self._is_owing(found, ref)]
        self._demand_writable(uuid, owing)
        for ref in owing:
            self._detach(work, found, ref, progress or Progress())
        for backend in self._here.up():
            owners |= set(lending.lent(backend, uuid).values())
            with lending.settled(backend, uuid, self._here.options.lock_timeout):
                pass
        LOG.info("instance=%s stands on no other one's volumes", uuid)
        return owners

    def lenders(self, found: model.Instance) -> set[str]:
        """Return the instances whose volumes one's disks stand on."""
        chains = (self._here.backend(r.backend).chain(r.volume) for r in found.disks)
        owners = {volume.owner for chain in chains for volume in chain}
        return owners - {found.uuid, ""}

    def finish(self, log: journal.Journal) -> None:
        """Let a guest go on that a killed process held, under its claim."""
        facts = log.facts("begun")
        assert facts is not None
        with contextlib.suppress(errors.InstanceNotFound):
            self._pulls.unpause(str(facts["held"]))
        log.close()

    def tidy(self, uuid: str) -> None:
        """Merge layers of an instance that nobody needs any more."""
        work = Work(self._here, uuid, self._demand)
        found = work.demand_idle("tidying up")
        if Tidying(work).plan(found):
            change = Change(what=Changing.TIDYING, operation=new_operation())
            Tidying(work).run(work.publish(found, change=change))

    # Private

    def _detach(
        self, work: Work, found: model.Instance, ref: model.DiskRef, progress: Progress
    ) -> None:
        backend = work.backend(ref)
        chain = backend.chain(ref.volume)
        kept = next((v for v in chain if v.role is Role.IMAGE), None)
        keep = None if kept is None else backend.path(kept)
        if not self._copy_up(work, backend, ref, keep, progress):
            raise self._error(
                errors.CloneError,
                found.uuid,
                f"QEMU gave up copying into {ref.volume}: is there room for it? "
                "Nothing is lost; try again",
            )
        self._flush(found.uuid)
        backend.persist(chain[0].pool, chain[0].name)
        below = backend.layers(kept.name) if kept is not None else ()
        layers = (backend.layer(chain[0]), *below)
        text = work.states.xml(found.uuid)
        work.states.define(domainxml.with_disks(text, {ref.target: layers}))
        backing = kept.name if kept is not None else None
        backend.update(msgspec.structs.replace(chain[0], backing=backing, digest=None))

    def _is_owing(self, found: model.Instance, ref: model.DiskRef) -> bool:
        """Tell whether a disk stands on what others have, or stand on, too."""
        backend = self._here.backend(ref.backend)
        between = backend.chain(ref.volume)[1:]
        return not all(
            volume.role is Role.IMAGE or self._is_own(backend, volume, found.uuid)
            for volume in between
        )

    def _demand_writable(self, uuid: str, refs: list[model.DiskRef]) -> None:
        """Refuse disks that a running guest does not write to, but to layers over."""
        targets = [ref.target for ref in refs if ref.transient]
        if targets and not self._pulls.is_off(uuid):
            reason = (
                f"{', '.join(sorted(targets))} is transient, and the guest runs over "
                "it: turn it off, which drops what it wrote there"
            )
            raise self._error(errors.CloneRefused, uuid, reason)

    def _flush(self, uuid: str) -> None:
        """Have QEMU write all that it has of the disks of a guest that runs."""
        if self._pulls.power(uuid) is not Power.RUNNING:
            return
        log = journal.Journal.create(self._directory, new_operation(), held=uuid)
        try:
            self._pulls.pause(uuid)
        finally:
            self.finish(log)

    def _is_own(self, backend: base.Backend, volume: model.Volume, uuid: str) -> bool:
        lent = lending.lent(backend, uuid)
        return volume.owner == uuid and volume.name not in lent

    def _copy_up(
        self,
        work: Work,
        backend: base.Backend,
        ref: model.DiskRef,
        keep: str | None,
        progress: Progress,
    ) -> bool:
        pulls, top = self._pulls, backend.layers(ref.volume)[0].source
        if not pulls.is_off(work.uuid):
            return pulls.pull(work.uuid, ref.target, top, keep, progress)
        arch, chain = domainxml.arch(pulls.xml(work.uuid)), backend.layers(ref.volume)
        with pulls.stand_in(work.uuid, chain, arch) as stand_in:
            return pulls.pull(stand_in, "vda", top, keep, progress)

    def _error(
        self, kind: type[errors.CloneError], uuid: str, reason: str
    ) -> errors.CloneError:
        return kind(instance=uuid, host=self._here.name, reason=reason)
