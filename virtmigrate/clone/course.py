# SPDX-License-Identifier: Apache-2.0
"""One call for clones, from the snapshot of the source to guests that are others.

    1  the source's disks and memory are frozen; it goes on at once
    2  each clone: record, layers over the frozen disks, domain
    3  each clone: the memory's head is made its own, it is restored, stands still
    4  the memory's head is what it was
    5  each clone: goes on off the network, becomes somebody else, joins the network
    6  the snapshot goes; what clones stand on stays

The journal has the head before it is changed, and which clones are done. clear() makes
an end of whatever was left, after a success, a failure or a kill: it puts the head
back, takes away clones that are not done, and the snapshot.
"""

import base64
from typing import Any

import msgspec
from oslo_log import log as logging

from virtmigrate import domainstate, errors, journal, model, node
from virtmigrate import snapshot as snapshots
from virtmigrate.clone import apart, configuration, making
from virtmigrate.clone.memory import Memory
from virtmigrate.clone.planning import Plan
from virtmigrate.clone.terms import Changed, Identities, Outcome, Self, Values, Wanted
from virtmigrate.model import CloneState
from virtmigrate.progress import Progress
from virtmigrate.rollback import Rollback
from virtmigrate.snapshot import Kind
from virtmigrate.snapshot import Memory as Kept
from virtmigrate.snapshottree import Snapshot, find

LOG = logging.getLogger(__name__)

_NETWORK = "network"
"""Name of the risk that is left where a clone was not let onto its network."""


class Course:
    """One call for clones. All clones are claimed by the caller; the source is not.

    It is from its snapshot on until its memory's head is put back.
    """

    def __init__(
        self,
        here: node.Node,
        known: snapshots.Snapshots,
        identities: Identities,
        progress: Progress,
    ) -> None:
        self._here = here
        self._snapshots = known
        self._identities = identities
        self._progress = progress
        self._states = domainstate.States(here.host)
        self._apart = apart.Apart(here.host, here.options.clone_apart_network)
        self._failed: dict[str, Exception] = {}

    def run(self, wanted: Wanted, plan: Plan, log: journal.Journal) -> list[Outcome]:
        """Make the clones; what becomes of each is returned.

        Raises what taking the snapshot raises: there is no clone then.
        """
        if plan.source.disks and plan.twins[0].interfaces:
            self._apart.ensure()
        asked = self._asked(wanted, plan, log)
        with self._snapshots.held(wanted.source, asked, self._progress) as taken:
            log.done("snapshot", id=taken.id)
            source = self._here.entitled(wanted.source)
            maker = making.Making(
                self._here, self._apart, source, taken, is_live=plan.is_live
            )
            for twin in plan.twins:
                self._tried(twin, lambda twin=twin: maker.prepare(twin))
            if plan.is_live:
                self._restore(plan, maker, taken, log)
        return [self._finish(twin, wanted, plan, log) for twin in plan.twins]

    def clear(self, log: journal.Journal) -> None:
        """Make an end of a call; can be called again. Then its journal is gone.

        The caller has claimed the clones, and not the source. Raises InstanceBusy where
        that is in another operation: all that is left stays for the next call.
        """
        facts = log.facts("begun")
        assert facts is not None
        if log.has("head") and not log.has("whole"):
            with self._here.claimed(str(facts["source"])):
                self._put_back(log)
        for uuid, operation in facts["new"]:
            self.undo(uuid, operation)
        self._drop_snapshot(str(facts["source"]), _name(log))
        log.close()

    def undo(self, uuid: str, operation: str) -> None:
        """Take a clone away that is still being made; no other is touched."""
        self._here.forget_unborn(uuid)
        found = self._here.own_record(uuid)
        cloned = found.cloned if found else None
        if cloned is None or cloned.operation != operation:
            return
        if cloned.state is CloneState.MAKING:
            self._states.kill(uuid)
            self._states.undefine(uuid)
            self._here.remove_instance(uuid)
            LOG.info("clone=%s of instance=%s undone", uuid, cloned.source)

    # Private

    def _asked(
        self, wanted: Wanted, plan: Plan, log: journal.Journal
    ) -> snapshots.Wanted:
        return snapshots.Wanted(
            _name(log),
            kind=Kind.CHECKPOINT if plan.is_live else Kind.DISK,
            memory=Kept.EXTERNAL if plan.is_live else Kept.NONE,
            description="made for clones; it goes when they are made",
            by=wanted.by,
            timeout=float(self._here.options.clone_memory_timeout),
        )

    def _drop_snapshot(self, uuid: str, name: str) -> None:
        """Delete the snapshot of a call; can be called again.

        Raises CloneError while it is neither taken nor undone, which settling comes to
        first.
        """
        found = self._here.own_record(uuid)
        made = found.change.snapshot if found and found.change else None
        if made is not None and made.name == name:
            raise errors.CloneError(
                instance=uuid,
                host=self._here.name,
                reason=f"its snapshot {name} was cut short: `virtmigrate host settle` "
                "goes on with it",
            )
        if found is not None and find(found.snapshots, name) is not None:
            self._snapshots.delete(uuid, name)

    def _tried(self, twin: making.Twin, step: Any) -> None:
        """Do a step of one clone, unless an earlier one failed; undo it if it fails."""
        uuid = twin.new.uuid
        if uuid in self._failed:
            return
        try:
            self._progress.check()
            step()
        except errors.Cancelled:
            raise
        except Exception as e:
            # Of one guest: it keeps no other from being made.
            LOG.exception("clone=%s failed", uuid)
            self._failed[uuid] = e
            self.undo(uuid, twin.operation)

    def _restore(
        self,
        plan: Plan,
        maker: making.Making,
        taken: Snapshot,
        log: journal.Journal,
    ) -> None:
        volume = self._here.files.volumes.read(taken.memory_volume).body
        memory = Memory(self._here, volume)
        head = memory.head()
        log.done("head", volume=volume.name, data=base64.b64encode(head).decode())
        with Rollback() as undo:
            # While nobody else may start from it, or take it elsewhere.
            undo.add("put the memory's head back", lambda: self._put_back(log))
            for twin in plan.twins:
                self._tried(twin, lambda twin=twin: maker.restore(twin, memory, head))
            undo.commit()
        self._put_back(log)

    def _put_back(self, log: journal.Journal) -> None:
        """Make the memory's head what it was, if its volume is there still.

        The caller has claimed the source.
        """
        begun, head = log.facts("begun"), log.facts("head")
        assert begun is not None and head is not None
        stored = self._here.files.volumes.find(head["volume"])
        if stored is not None and stored.body.owner == begun["source"]:
            memory = Memory(self._here, stored.body)
            if memory.exists():
                memory.write(base64.b64decode(head["data"]))
        log.done("whole")

    def _finish(
        self, twin: making.Twin, wanted: Wanted, plan: Plan, log: journal.Journal
    ) -> Outcome:
        """Have a clone be somebody else, and say what became of it."""
        uuid = twin.new.uuid
        self._tried(twin, lambda: self._become(twin, wanted, plan))
        if uuid in self._failed:
            return Outcome(uuid, None, reason=str(self._failed[uuid]))
        found = self._here.entitled(uuid).cloned
        assert found is not None
        return Outcome(uuid, found.state, found.report, ", ".join(found.unproven))

    def _become(self, twin: making.Twin, wanted: Wanted, plan: Plan) -> None:
        uuid = twin.new.uuid
        if not plan.is_live:
            self._connect(twin, is_live=False)
            self._publish(uuid, CloneState.READY, Changed({}, "{}"))
            return
        self._states.unpause(uuid)
        changed = self._changed(twin, wanted, plan)
        if changed.unproven:
            self._publish(uuid, CloneState.APART, changed)
            return
        self._connect(twin, is_live=True)
        self._publish(uuid, CloneState.READY, changed)

    def _changed(self, twin: making.Twin, wanted: Wanted, plan: Plan) -> Changed:
        uuid = twin.new.uuid
        who = Self(uuid, twin.new.name, tuple(twin.macs.items()))
        if plan.obstacles and not plan.values:
            return Changed({}, "{}", plan.obstacles)
        changed = self._identities.change(
            uuid, who, plan.values, self._kin(plan.source, uuid), wanted.risk
        )
        unproven = tuple(sorted({*changed.unproven, *plan.obstacles}))
        return Changed(changed.values, changed.report, unproven)

    def _kin(self, source: model.Instance, uuid: str) -> list[Values]:
        """Return what was read from other clones of the source, and of its source."""
        parents = {source.uuid}
        if source.cloned is not None:
            parents.add(source.cloned.source)
        found = []
        for name in self._here.instances.names():
            stored = self._here.instances.find(name)
            cloned = stored.body.cloned if stored else None
            if name != uuid and cloned is not None and cloned.source in parents:
                found.append(dict(cloned.identities))
        return [each for each in found if each]

    def _connect(self, twin: making.Twin, *, is_live: bool) -> None:
        """Let a clone onto its networks, now and at every start from now on."""
        uuid = twin.new.uuid
        if is_live and twin.interfaces:
            self._apart.release(uuid, twin.interfaces)
        text = self._states.xml(uuid)
        self._states.define(configuration.plugged(text, twin.interfaces))

    def _publish(self, uuid: str, state: CloneState, changed: Changed) -> None:
        found = self._here.entitled(uuid)
        assert found.cloned is not None
        cloned = msgspec.structs.replace(
            found.cloned,
            state=state,
            report=changed.report,
            identities=tuple(sorted(changed.values.items())),
            unproven=changed.unproven,
        )
        self._here.publish_instance(msgspec.structs.replace(found, cloned=cloned))
        LOG.info("clone=%s of instance=%s is %s", uuid, cloned.source, state.value)


# Private


def _name(log: journal.Journal) -> str:
    """Return what the snapshot of a call is called."""
    return f"clone-{log.operation}"
