# SPDX-License-Identifier: Apache-2.0
"""What a guest is, and whether it can be made somebody else: asked of the source."""

import time
from collections.abc import Collection, Sequence

from virtmigrate import errors
from virtmigrate.identity import model, steps
from virtmigrate.identity.guest import Guest, System, Timed

PROVEN = ("debian-12",)
"""Systems on which every step was proven with real guests."""

AGENT = "agent"
SYSTEM = "system"


def obstacles(
    guest: Guest,
    every: Sequence[steps.Step],
    proven: Collection[str],
    timeout: float,
) -> list[str]:
    """Return what is not proven, as `name: reason`; names are those that are risked."""
    until = time.monotonic() + timeout
    try:
        system = guest.system(timeout=timeout)
    except errors.GuestFailed as e:
        return [f"{AGENT}: {e}"]
    found = [*_of_system(system, proven)]
    if not _runs_commands(guest, until, found):
        return found
    for step in every:
        try:
            problem = step.obstacle(Timed(guest, _left(until)))
        except errors.GuestFailed as e:
            problem = str(e)
        if problem:
            found.append(f"{step.name}: {problem}")
    return found


def answers(guest: Guest, timeout: float) -> bool:
    """Tell whether somebody in the guest can be asked."""
    try:
        guest.system(timeout=timeout)
    except errors.GuestFailed:
        return False
    return True


def read(guest: Guest, every: Sequence[steps.Step], timeout: float) -> model.Identities:
    """Return all identities of a guest."""
    asked = Timed(guest, timeout)
    found: dict[str, str] = {}
    for step in every:
        found |= step.read(asked)
    return model.Identities(found)


# Private


def _of_system(system: System, proven: Collection[str]) -> list[str]:
    told = f"{system.id}-{system.version}"
    if told in proven:
        return []
    shown = "".join(c if c.isprintable() else " " for c in system.name or told)
    if system.id == "mswindows":
        why = "its SID and its machine account would stay the source's"
    else:
        why = f"the steps are proven on {', '.join(sorted(proven))}"
    return [f"{SYSTEM}: {shown} ({told}): {why}"]


def _runs_commands(guest: Guest, until: float, found: list[str]) -> bool:
    """Tell whether there is a shell to work with; if not, say so."""
    try:
        result = guest.run(["/bin/sh", "-c", "exit 7"], timeout=_left(until))
    except errors.GuestFailed as e:
        found.append(f"{AGENT}: it runs no commands: {e}")
        return False
    if result.code != _SEVEN:
        found.append(f"{AGENT}: its shell ends with {result.code} instead of {_SEVEN}")
    return result.code == _SEVEN


_SEVEN = 7


def _left(until: float) -> float:
    return max(1.0, until - time.monotonic())
