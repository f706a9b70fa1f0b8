# SPDX-License-Identifier: Apache-2.0
"""Clones: an instance becomes several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from virtmigrate import errors, mapping
from virtmigrate.clone import New, Outcome, Wanted
from virtmigrate.face import base


class Clones(base.Base):
    """Clones the instances of one host."""

    def clone(
        self,
        context: Any,
        instance: Any,
        new_instances: Sequence[Any],
        network_info: Mapping[str, Any] | None = None,
        risk: Iterable[str] = (),
        **_: object,
    ) -> tuple[Outcome, ...]:
        """Make clones of an instance of this host, on this host; it goes on.

        Of a running one with its memory, where `enable_live_clone` says so; one that is
        off is cloned as it is, and the clones are off. A clone that fails leaves
        nothing, the others go on. Raises CloneRefused: nothing was touched.

        Arguments:
            new_instances: with `uuid` and `name` each, of the source's project.
            network_info: by UUID of a clone, as spawn() takes it, in the order of the
                source's interfaces; without, plugged in as those are, with new MACs.
            risk: names of what need not be made unique in the guests; such clones run,
                and stay off the network.
        """
        self._demand_project(instance, new_instances)
        plugged = network_info or {}
        new = tuple(
            New(
                uuid=each.uuid,
                name=each.name,
                interfaces=mapping.interfaces(plugged.get(each.uuid)),
            )
            for each in new_instances
        )
        wanted = Wanted(
            source=instance.uuid,
            new=new,
            risk=frozenset(risk),
            by=str(getattr(context, "request_id", None) or "-"),
        )
        return self.clones.clone(wanted, self._progress())

    def detach_clone(self, context: object, instance: Any, **_: object) -> None:
        """Give a clone all that it has of other instances' volumes; it runs on."""
        self.clones.detach(instance.uuid, self._progress())

    # Private

    def _demand_project(self, instance: Any, new_instances: Sequence[Any]) -> None:
        """Refuse what would give one project what another has in memory."""
        project = getattr(instance, "project_id", None)
        for each in new_instances:
            if getattr(each, "project_id", None) != project:
                raise errors.CloneRefused(
                    instance=instance.uuid,
                    host=self.node.name,
                    reason=f"clone {each.uuid} is of another project, which would get "
                    "all that this one has in memory",
                )
