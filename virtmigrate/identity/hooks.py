# SPDX-License-Identifier: Apache-2.0
"""The guest's own programs, which are told of its cloning.

They are the executable files of one directory in the guest, run in the order of their
names, each with one argument that says the moment. They do what nobody can from
outside: drain, drop keys, register anew.
"""

import enum
import re

from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.identity import model
from virtmigrate.identity.guest import Guest, told

LOG = logging.getLogger(__name__)

DIRECTORY = "/etc/virtmigrate/clone.d"
COUNT = 64
"""Hooks that a guest may have."""

_LIST = (
    f"for f in {DIRECTORY}/*; do "
    '[ ! -f "$f" ] || [ ! -x "$f" ] || echo "${f##*/}"; done'
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Moment(enum.Enum):
    """When a hook runs, as it is told."""

    BEFORE = "before"
    """In the source, before its memory is saved."""
    RESUMED = "resumed"
    """In the source, when its memory was saved, or was not to be after all."""
    CLONE = "clone"
    """In a clone that is somebody else by now, and has no network yet."""
    CONNECTED = "connected"
    """In a clone that has its network."""


def run(guest: Guest, moment: Moment, limits: model.Limits) -> tuple[str, ...]:
    """Run all hooks of a guest, and return their names.

    Raises HookFailed when one fails or takes longer than its limit: those before it
    have run, those after it have not. GuestFailed when they cannot be listed.
    """
    names = _listed(guest, limits)
    for name in names:
        _run(guest, name, moment, limits.hook)
        LOG.info("instance=%s hook=%s ran %s", guest.instance, name, moment.value)
    return names


# Private


def _listed(guest: Guest, limits: model.Limits) -> tuple[str, ...]:
    result = guest.run(["/bin/sh", "-c", _LIST], timeout=limits.step)
    names = tuple(result.out.decode(errors="replace").splitlines())
    if result.code or len(names) > COUNT or not all(map(_NAME.fullmatch, names)):
        reason = told(result) if result.code else f"not at most {COUNT} plain names"
        raise errors.GuestFailed(
            instance=guest.instance,
            host=guest.host,
            doing=f"listing {DIRECTORY}",
            reason=reason,
        )
    return names


def _run(guest: Guest, name: str, moment: Moment, seconds: float) -> None:
    argv = [f"{DIRECTORY}/{name}", moment.value]
    try:
        result = guest.run(argv, timeout=seconds)
    except errors.GuestFailed as e:
        raise _failed(guest, name, str(e)) from e
    if result.code:
        raise _failed(guest, name, told(result))


def _failed(guest: Guest, name: str, reason: str) -> errors.HookFailed:
    return errors.HookFailed(
        instance=guest.instance, host=guest.host, hook=name, reason=reason
    )
