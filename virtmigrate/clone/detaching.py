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
import time
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

_LOOK = 0.2
"""Seconds between two looks at a job."""
_IDLE = 25
"""Looks without a job, after which one that was begun counts as given up."""
_DOING = "detaching"


class Pulls(domainstate.States):
    """Copies layers up into the top of a disk."""

    def pull(
        self, uuid: str, target: str, keep: str | None, progress: Progress
    ) -> bool:
        """Copy into a running domain's top layer all above the layer `keep`.

        Nothing happens when that is so already; can be called again, also while an
        earlier one is at work. Raises Cancelled: the domain is as it was.

        Arguments:
            keep: path of the layer that stays below; None: none does.
        Returns whether it is done; False: QEMU gave up.
        """
        begun, idle = False, 0
        while idle < _IDLE:
            job, chain = self._job_of(uuid, target), self._chain(uuid, target)
            if not job and chain[1:2] == ([keep] if keep else []):
                return True
            idle = 0 if job else idle + begun
            if not job and not begun:
                with self._domain(uuid, f"copying up below {target}") as domain:
                    domain.blockRebase(target, keep, 0, 0)
                begun = True
            self._demand_wanted(uuid, target, progress)
            time.sleep(_LOOK)
        return False

    # Private

    def _demand_wanted(self, uuid: str, target: str, progress: Progress) -> None:
        try:
            progress.check()
        except errors.Cancelled:
            with self._domain(uuid, f"ending the copy below {target}") as domain:
                if domain.blockJobInfo(target, 0):
                    domain.blockJobAbort(target, 0)
            raise


class Detaching:
    """Detaches clones of this host, under their claims."""

    def __init__(
        self, here: node.Node, demand_no_move: Demand, directory: Path
    ) -> None:
        self._here = here
        self._demand = demand_no_move
        self._directory = directory
        self._pulls = Pulls(here.host)

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
        for ref in found.disks:
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
        between = [v for v in chain[1:] if v.role is not Role.IMAGE]
        if all(self._is_own(backend, volume, found.uuid) for volume in between):
            return
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
        pulls = self._pulls
        if not pulls.is_off(work.uuid):
            return pulls.pull(work.uuid, ref.target, keep, progress)
        arch = domainxml.arch(pulls.xml(work.uuid))
        with pulls.stand_in(backend.layers(ref.volume), arch) as stand_in:
            return pulls.pull(stand_in, "vda", keep, progress)

    def _error(
        self, kind: type[errors.CloneError], uuid: str, reason: str
    ) -> errors.CloneError:
        return kind(instance=uuid, host=self._here.name, reason=reason)
