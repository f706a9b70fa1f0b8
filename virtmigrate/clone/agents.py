# SPDX-License-Identifier: Apache-2.0
"""Clones made somebody else by the agents of their guests."""

import re
import time
from collections.abc import Sequence

from oslo_log import log as logging

from virtmigrate import domainxml, errors, identity
from virtmigrate.clone.terms import Changed, Self, Values
from virtmigrate.host import Host

LOG = logging.getLogger(__name__)

_LOOK = 0.2
"""Seconds between two looks for an agent."""
_LONGEST = 63
"""Characters of a hostname."""


class Agents:
    """Asks the agents of one host's guests. Safe to share between threads.

    Arguments:
        timeout: seconds for all that one guest is asked at once.
    """

    def __init__(self, host: Host, timeout: float) -> None:
        self._host = host
        self._timeout = timeout

    def obstacles(self, uuid: str) -> list[str]:
        return identity.obstacles(self._guest(uuid), timeout=self._timeout)

    def read(self, uuid: str) -> Values:
        return identity.read(self._guest(uuid), timeout=self._timeout).values

    def change(
        self,
        uuid: str,
        wanted: Self,
        source: Values,
        siblings: Sequence[Values],
        risk: frozenset[str],
    ) -> Changed:
        self._await_agent(uuid)
        report = identity.change(
            self._guest(uuid),
            identity.Wanted(
                name=_hostname(wanted),
                uuid=wanted.uuid,
                interfaces=tuple(identity.Interface(*pair) for pair in wanted.macs),
            ),
            identity.Identities(dict(source)),
            [identity.Identities(dict(each)) for each in siblings],
            limits=identity.Limits(step=min(60.0, self._timeout), whole=self._timeout),
            risk=risk,
        )
        if not report.ok and not report.unproven:
            raise errors.CloneError(
                instance=uuid,
                host=self._host.name,
                reason="its report does not say that it is somebody else",
            )
        return Changed(
            identity.identities(report).values,
            report.encode().decode(),
            report.unproven,
        )

    # Private

    def _guest(self, uuid: str) -> identity.AgentGuest:
        return identity.AgentGuest(self._host, uuid)

    def _await_agent(self, uuid: str) -> None:
        """Wait until the agent has found its end again; what it is asked says why not.

        The port of a restored guest is another one, and the agent has to open it.
        """
        deadline = time.monotonic() + self._timeout
        while not self._is_connected(uuid) and time.monotonic() < deadline:
            time.sleep(_LOOK)

    def _is_connected(self, uuid: str) -> bool:
        with self._host.session("looking for an agent", instance=uuid) as session:
            text = session.conn.lookupByUUIDString(uuid).XMLDesc(0)
        return domainxml.agent_state(text) == "connected"


# Private


def _hostname(wanted: Self) -> str:
    """Return what a guest is called whose instance may have any name."""
    name = re.sub("[^A-Za-z0-9-]+", "-", wanted.name).strip("-")
    return name[:_LONGEST].strip("-") or f"clone-{wanted.uuid}"
