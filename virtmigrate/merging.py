# SPDX-License-Identifier: Apache-2.0
"""Layers of a disk, merged by QEMU: the guest's, or one that runs for that only."""

import contextlib
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Sequence

import libvirt

from virtmigrate import domainxml, errors
from virtmigrate.instance import STAND_IN, Domains
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

_LOOK = 0.2
"""Seconds between two looks at a job."""
_SOON = 0.01
"""The same at first: most layers are small, and merged before a look is due."""
_IDLE = 8
"""Looks without a job, after which a merge that was begun counts as given up."""
_READY = 300
"""Looks at one that only has to be ended, after which it counts so, too: a minute."""
_CALL = 24 * 3600.0
"""Seconds that a stand-in may live."""
_STAND_IN_MEMORY = 32 * MiB
"""No guest ever uses it."""


class Merges(Domains):
    """Merges layers of one host's domains. Safe to share between threads."""

    def merge(
        self,
        uuid: str,
        target: str,
        top: str,
        base: str,
        told: Callable[[], None] | None = None,
        progress: Progress | None = None,
    ) -> bool:
        """Write a layer of a running domain's disk into the one below it.

        Where it is the top the guest writes to the other one from then on. The layer
        itself stays. Nothing happens when that is so already; can be called again.

        Arguments:
            top, base: paths.
            told: has others know that the lower one is the disk, where they have to
                before the guest writes to it: it stands still meanwhile. On failure it
                stays paused, until the next call.
            progress: told how far it is. A wish to cancel ends the job as long as the
                layer has more: Cancelled, and it is needed still.
        Returns whether it is done; False: QEMU gave up, or the disk has neither of
        them, and the layer is still needed.
        """
        is_begun, idle, ready, wait = False, 0, 0, _SOON
        follower = _Follower(f"merging a layer of {target}", progress)
        while idle < _IDLE and ready < _READY:
            job, chain = self._job_of(uuid, target), self._chain(uuid, target)
            if top not in chain and not job:
                # In another disk's chain, or in none, it is not merged.
                return base in chain
            # libvirt may have to learn yet that a job has ended well.
            idle = 0 if job else idle + is_begun
            if not job and not is_begun:
                self._begin(uuid, target, top, base, is_active=chain[0] == top)
                is_begun = True
            elif chain[0] == top and job and job["cur"] == job["end"] > 0:
                ready += 1
                if told is None or self._stands_still(uuid, target):
                    if told is not None:
                        told()
                        told = None
                    with self._domain(uuid, f"ending the merge of {target}") as domain:
                        _pivot(domain, target)
            elif not ready:
                self._follow_job(uuid, target, job, follower)
            time.sleep(wait)
            wait = min(2 * wait, _LOOK)
        return False

    def pull(
        self, uuid: str, target: str, top: str, base: str | None, progress: Progress
    ) -> bool:
        """Write into a started domain's top layer all that it stands on.

        Nothing happens when that is so already; can be called again.

        Arguments:
            top: path of the layer.
            base: path of what is to stay below it; None: nothing.

        Returns whether it is done; False: QEMU gave up, or the disk is another one.
        """
        is_begun, idle, wait = False, 0, _SOON
        follower = _Follower(f"flattening {target}", progress)
        while idle < _IDLE:
            job, chain = self._job_of(uuid, target), self._chain(uuid, target)
            if not job and chain[:1] != [top]:
                return False
            if not job and chain[1:2] == ([base] if base else []):
                return True
            idle = 0 if job else idle + is_begun
            if not job and not is_begun:
                with self._domain(uuid, f"flattening {target}") as domain:
                    _pull(domain, target, base)
                is_begun = True
            self._follow_job(uuid, target, job, follower)
            time.sleep(wait)
            wait = min(2 * wait, _LOOK)
        return False

    def flush(self, uuid: str) -> None:
        """Have QEMU write down what it holds back of a running domain's disks.

        It does so when it stops, and by no call of libvirt's: its CPUs stand still for
        that. QEMU 7.2 does so at the end of a merge, and not of a pull. Killed in
        between, the guest stays paused.
        """
        self.pause(uuid)
        self.unpause(uuid)

    @contextlib.contextmanager
    def stand_in(
        self, owner: str, chain: Sequence[domainxml.Layer], arch: str
    ) -> Iterator[str]:
        """Run a domain without a guest that has a disk, and yield its UUID.

        So that QEMU does to the layers of a guest that is off what it does to those
        of a running one, and nothing but this chain is believed. It ends with the
        connection, if not before. One that a killed libvirtd left has these layers
        open yet: it ends now.

        Arguments:
            owner: UUID of the instance, which the caller has claimed.
        """
        uuid, name = str(uuids.uuid4()), f"{STAND_IN}{owner}"
        self._end_named(name)
        text = _stand_in_xml(uuid, name, chain, arch)
        flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
        with self.host.session("opening layers of a disk", timeout=_CALL) as session:
            session.conn.createXML(text, flags)
            try:
                yield uuid
            finally:
                self.kill(uuid)

    # Private

    def _end_named(self, name: str) -> None:
        with self.host.session(f"looking for {name}") as session:
            found = [
                domain.UUIDString()
                for domain in session.conn.listAllDomains(0)
                if domain.name() == name
            ]
        for uuid in found:
            self.kill(uuid)

    def _follow_job(
        self, uuid: str, target: str, job: dict[str, int], follower: "_Follower"
    ) -> None:
        """Say how far a job is; end it, and raise Cancelled, if that is wished."""
        try:
            follower.look(job)
        except errors.Cancelled:
            with self._domain(uuid, f"giving up a job on {target}") as domain:
                domain.blockJobAbort(target, 0)
            raise

    def _stands_still(self, uuid: str, target: str) -> bool:
        """Have the guest paused; tell whether all that it wrote is in both layers."""
        self.pause(uuid)
        job = self._job_of(uuid, target)
        return bool(job) and job["cur"] == job["end"]

    def _chain(self, uuid: str, target: str) -> list[str]:
        for disk in domainxml.disks(self.live_xml(uuid)):
            if disk.target == target:
                return [layer.source for layer in disk.chain]
        return []

    def _job_of(self, uuid: str, target: str) -> dict[str, int]:
        with self._domain(uuid, f"looking at the merge of {target}") as domain:
            return dict(domain.blockJobInfo(target, 0))

    def _begin(
        self, uuid: str, target: str, top: str, base: str, *, is_active: bool
    ) -> None:
        with self._domain(uuid, f"merging a layer of {target}") as domain:
            _commit(domain, target, top, base, is_active=is_active)


# Private


class _Follower:
    """Tells how far one block job is. Not safe to share."""

    def __init__(self, phase: str, progress: Progress | None) -> None:
        self._phase = phase
        self._progress = progress
        self._done = self._total = 0

    def look(self, job: dict[str, int]) -> None:
        """Tell what a job has done; it may have more to do than before. Cancelled."""
        if self._progress is None or not job:
            return
        if job["end"] != self._total:
            self._total, self._done = job["end"], 0
            self._progress.phase(self._phase, self._total)
        self._progress.advance(max(0, job["cur"] - self._done))
        self._done = max(self._done, job["cur"])


def _commit(
    domain: "libvirt.virDomain", target: str, top: str, base: str, *, is_active: bool
) -> None:
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if is_active else 0
    domain.blockCommit(target, base, None if is_active else top, 0, flags)


def _pull(domain: "libvirt.virDomain", target: str, base: str | None) -> None:
    domain.blockRebase(target, base, 0, 0)


def _pivot(domain: "libvirt.virDomain", target: str) -> None:
    # It refuses while the last blocks are on their way.
    with contextlib.suppress(libvirt.libvirtError):
        domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)


def _stand_in_xml(
    uuid: str, name: str, chain: Sequence[domainxml.Layer], arch: str
) -> str:
    return domainxml.build(
        domainxml.Domain(
            uuid=uuid,
            name=name,
            memory=_STAND_IN_MEMORY,
            vcpus=1,
            virt_type="qemu",
            machine="q35",
            arch=arch,
            disks=(domainxml.Disk(target="vda", chain=tuple(chain)),),
        )
    )
