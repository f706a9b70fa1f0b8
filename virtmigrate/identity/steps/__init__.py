# SPDX-License-Identifier: Apache-2.0
"""The steps, in their order. Others' come from the entry point `virtmigrate.identity`.

Each is an object of `base.Step`, or a class without arguments that makes one.
"""

import importlib.metadata

from virtmigrate import errors
from virtmigrate.identity.steps import (
    clock,
    entropy,
    keys,
    names,
    network,
    services,
)
from virtmigrate.identity.steps.base import Step as Step

ENTRY_POINT = "virtmigrate.identity"

OURS: tuple[Step, ...] = (
    # All that is random comes after it.
    entropy.Rng(),
    clock.Clock(),
    names.Hostname(),
    # DHCP clients derive theirs from it.
    names.MachineId(),
    names.BootId(),
    keys.RandomSeed(),
    keys.Ssh(),
    services.Initiator(),
    services.CloudInit(),
    # What asks for an address does so under the new one.
    network.Mac(),
    network.Dhcp(),
    network.Address(),
)


def every() -> tuple[Step, ...]:
    """Return our steps, then others', sorted by name.

    Raises ConfigurationError when one cannot be loaded, or is named as another: a
    clone is not to lose a step in silence.
    """
    points = importlib.metadata.entry_points(group=ENTRY_POINT)
    found = [*OURS, *(_load(point) for point in sorted(points, key=lambda p: p.name))]
    named = [step.name for step in found]
    for name in named:
        if named.count(name) > 1:
            raise errors.ConfigurationError(reason=f"two identity steps {name}")
    return tuple(found)


# Private


def _load(point: importlib.metadata.EntryPoint) -> Step:
    try:
        loaded = point.load()
        step: Step = loaded() if isinstance(loaded, type) else loaded
        _demand(step)
    except Exception as e:
        raise errors.ConfigurationError(
            reason=f"identity step {point.name} ({point.value}): {e}"
        ) from e
    return step


def _demand(step: Step) -> None:
    for name in ("obstacle", "read", "change", "proof"):
        if not callable(getattr(step, name, None)):
            raise TypeError(f"it has no {name}()")
    if not isinstance(getattr(step, "name", None), str):
        raise TypeError("it has no name")
