# SPDX-License-Identifier: Apache-2.0
"""Making a live clone somebody else, before its first packet.

    what = identity.obstacles(source, timeout=60)     # before anything: refuse
    before = identity.read(source, timeout=60)        # just before its memory is saved
    ...                                               # restored, off the network
    report = identity.change(clone, wanted, before, siblings, limits=limits)
    ...                                               # report.ok: on the network

A clone of which this raised, or whose report is not ok, stays off the network.
"""

from collections.abc import Collection, Sequence

from virtmigrate.identity import asking, changing, hooks, steps
from virtmigrate.identity.agentguest import AgentGuest as AgentGuest
from virtmigrate.identity.asking import PROVEN as PROVEN
from virtmigrate.identity.guest import Guest as Guest
from virtmigrate.identity.guest import Result as Result
from virtmigrate.identity.guest import System as System
from virtmigrate.identity.hooks import Moment as Moment
from virtmigrate.identity.model import Identities as Identities
from virtmigrate.identity.model import Interface as Interface
from virtmigrate.identity.model import Limits as Limits
from virtmigrate.identity.model import Report as Report
from virtmigrate.identity.model import State as State
from virtmigrate.identity.model import Step as Step
from virtmigrate.identity.model import Wanted as Wanted
from virtmigrate.identity.model import decode as decode
from virtmigrate.identity.model import hostname as hostname


def obstacles(
    guest: Guest, *, timeout: float, proven: Collection[str] = PROVEN
) -> list[str]:
    """Ask a source what could not be made unique in its clones.

    Arguments:
        timeout: seconds for all of it.
        proven: systems on which every step is, as `ID-VERSION_ID` of os-release.

    Returns lines `name: reason`; empty when there is nothing. A name, given to
    change() as a risk, lets a clone be made that stays off the network.

    Raises InstanceNotFound, and what Host.session() raises. Nothing is changed.
    """
    return asking.obstacles(guest, steps.every(), proven, timeout)


def read(guest: Guest, *, timeout: float) -> Identities:
    """Read who a guest is.

    Arguments:
        timeout: seconds for all of it.

    Raises GuestFailed; nothing is changed.
    """
    return asking.read(guest, steps.every(), timeout)


def change(
    guest: Guest,
    wanted: Wanted,
    source: Identities,
    siblings: Sequence[Identities],
    *,
    limits: Limits,
    risk: frozenset[str] = frozenset(),
) -> Report:
    """Make a clone somebody else, read that back, and compare it.

    Arguments:
        guest: the clone, running and off the network.
        source: what was read of it before its memory was saved.
        siblings: the same of all other clones of that state, from their reports or
            read anew.
        risk: names of steps that may fail; "agent": that nobody in the guest answers,
            and so nothing is changed. The report is then not ok.

    Raises IdentityFailed: the clone has some identities of its own and some of its
    source, and has to stay off the network. It can be changed again.
    """
    every = steps.every()
    if asking.AGENT in risk and not asking.answers(guest, limits.step):
        return changing.nothing(every, risk)
    return changing.Work(guest, wanted, limits, risk).run(every, source, siblings)


def tell(guest: Guest, moment: Moment, *, limits: Limits) -> tuple[str, ...]:
    """Run the guest's own hooks, and return their names; see `hooks`.

    change() does that for Moment.CLONE. Raises HookFailed, GuestFailed.
    """
    return hooks.run(guest, moment, limits)


def identities(report: Report) -> Identities:
    """Return who a clone is, by its report: for its siblings to be compared with."""
    return Identities({k: v for step in report.steps for k, v in step.after.items()})
