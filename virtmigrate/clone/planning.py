# SPDX-License-Identifier: Apache-2.0
"""What clones will be: planned and refused before anything is touched."""

from collections.abc import Iterator
from dataclasses import dataclass

from virtmigrate import domainstate, domainxml, errors, model, node
from virtmigrate.clone import making, rules
from virtmigrate.clone.terms import NO_AGENT, Identities, Values, Wanted
from virtmigrate.instance import Power
from virtmigrate.model import CloneState
from virtmigrate.snapshot.work import new_operation


@dataclass(frozen=True)
class Plan:
    """What clones will be, before anything is touched."""

    source: model.Instance
    is_live: bool
    twins: tuple[making.Twin, ...]
    values: Values
    """The identities of the source."""
    obstacles: tuple[str, ...]
    """Names of what will not be made unique, by the caller's risk."""


class Planner:
    """Plans clones of one instance of this host."""

    def __init__(self, here: node.Node, identities: Identities) -> None:
        self._here = here
        self._states = domainstate.States(here.host)
        self._identities = identities

    def plan(self, wanted: Wanted) -> Plan:
        """Return what would be done; CloneRefused with all reasons at once."""
        source = self._here.entitled(wanted.source)
        power = self._states.power(source.uuid)
        is_live = power in (Power.RUNNING, Power.PAUSED)
        text = (
            self._states.secure_xml(source.uuid)
            if is_live
            else self._states.xml(source.uuid)
        )
        reasons = list(self._amiss(wanted, source, power, text))
        if reasons:
            raise self._refused(source, "; ".join(reasons))
        ends = domainxml.interfaces(text)
        obstacles = self._obstacles(wanted, power)
        values: Values = {}
        if power is Power.RUNNING and NO_AGENT not in obstacles:
            values = self._identities.read(source.uuid)
        twins = tuple(making.twin(new, new_operation(), ends) for new in wanted.new)
        return Plan(source, is_live, twins, values, obstacles)

    # Private

    def _amiss(
        self, wanted: Wanted, source: model.Instance, power: Power, text: str
    ) -> Iterator[str]:
        options = self._here.options
        if power in (Power.SAVED, Power.CRASHED):
            yield f"it is {power.value}: start it, or turn it off"
        elif power is not Power.OFF and not options.enable_live_clone:
            yield "clones of running instances are not allowed (enable_live_clone)"
        if source.cloned and source.cloned.state is not CloneState.READY:
            yield f"it is a clone itself, and {source.cloned.state.value}"
        if not 1 <= len(wanted.new) <= options.max_clones:
            yield (
                f"{len(wanted.new)} clones are asked for, not 1 to "
                f"{options.max_clones} (max_clones)"
            )
        yield from self._names(wanted)
        yield from rules.of_disks(self._here, source)
        yield from rules.of_domain(source, text)
        yield from self._interfaces(wanted, domainxml.interfaces(text))
        if power in (Power.RUNNING, Power.PAUSED):
            room = self._here.files.room()
            if room < source.memory:
                yield (
                    f"its memory needs {source.memory} bytes, and backend "
                    f"{self._here.files.name} has room for {room}"
                )

    def _names(self, wanted: Wanted) -> Iterator[str]:
        for what in ("uuid", "name"):
            named = [str(getattr(new, what)) for new in wanted.new]
            if len(set(named)) != len(named):
                yield f"two clones have the same {what}"
        if wanted.source in {new.uuid for new in wanted.new}:
            yield "a clone has the UUID of its source"

    def _interfaces(
        self, wanted: Wanted, source: tuple[domainxml.Interface, ...]
    ) -> Iterator[str]:
        macs = [each.mac.lower() for new in wanted.new for each in new.interfaces]
        macs += [each.mac.lower() for each in source]
        if len(set(macs)) != len(macs):
            yield "a MAC is used twice"
        for new in wanted.new:
            if new.interfaces and len(new.interfaces) != len(source):
                yield (
                    f"clone {new.uuid} is given {len(new.interfaces)} interfaces, and "
                    f"the source has {len(source)}"
                )
            for each in new.interfaces:
                if each.kind is domainxml.InterfaceKind.OVS:
                    yield f"interface {each.mac}: not onto Open vSwitch"

    def _obstacles(self, wanted: Wanted, power: Power) -> tuple[str, ...]:
        """Return what of a running guest stays as it is; CloneRefused."""
        if power is Power.OFF:
            return ()
        found = (
            self._identities.obstacles(wanted.source)
            if power is Power.RUNNING
            else [f"{NO_AGENT}: a paused guest does not answer"]
        )
        named = {line.partition(":")[0]: line for line in found}
        left = [named[name] for name in sorted(named.keys() - wanted.risk)]
        if left:
            raise self._refused(
                self._here.entitled(wanted.source),
                "its clones could not be told from it, because of: "
                f"{'; '.join(left)}. Name what you take the risk of; such clones stay "
                "off the network",
            )
        return tuple(sorted(named))

    def _refused(self, source: model.Instance, reason: str) -> errors.CloneRefused:
        return errors.CloneRefused(
            instance=source.uuid, host=self._here.name, reason=reason
        )
