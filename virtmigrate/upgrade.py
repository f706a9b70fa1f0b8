# SPDX-License-Identifier: Apache-2.0
"""Making the layout of a backend the one that this release works with, step by step.

A step leads from a version to the next one. Before it the layout's record says that
an upgrade was begun, and no host uses the backend; after it, that it is done. One
that was killed in the middle is begun again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.backends import base, layout

LOG = logging.getLogger(__name__)

Step = Callable[[base.Backend], None]

STEPS: dict[int, Step] = {}
"""By the version that a step leads from. A step finds out what of it is done
already: it may have been killed at any point."""


@dataclass(frozen=True)
class Plan:
    """What an upgrade of one backend does."""

    backend: str
    version: int | None
    """Its layout; None where the backend was not made yet."""
    steps: tuple[int, ...]
    """The versions that are still to be reached, in order."""


def plan(backend: base.Backend) -> Plan:
    """Return what is to be done; raises LayoutRefused, ConfigurationError."""
    try:
        found = backend.layout.find()
    except errors.PoolNotFound:
        found = None
    if found is None:
        return Plan(backend.name, None, ())
    backend.layout.demand_known(found)
    steps = tuple(range(found.body.version + 1, layout.VERSION + 1))
    for version in steps:
        if version - 1 not in STEPS:
            raise errors.ConfigurationError(
                reason=f"backend {backend.name} has layout {found.body.version}, and "
                f"this release has no step from {version - 1} to {version}: upgrade "
                "by an older release first. Nothing was changed"
            )
    return Plan(backend.name, found.body.version, steps)


def run(backend: base.Backend) -> Plan:
    """Do what is to be done; return what was.

    No other process may use the backend, on any host. Raises as plan(), and what a
    step raises: then it is begun again by the next run.
    """
    planned = plan(backend)
    for version in planned.steps:
        found = backend.layout.read()
        if found.body.upgrading != version:
            found = backend.layout.change(found, upgrading=version)
        LOG.info("backend=%s layout becomes %s", backend.name, version)
        STEPS[version - 1](backend)
        backend.layout.change(found, version=version, upgrading=None)
    return planned
