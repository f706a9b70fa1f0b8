# SPDX-License-Identifier: Apache-2.0
"""The clock: in a memory image it stands at the time of the saving."""

import time

from virtmigrate.identity import guest, model
from virtmigrate.identity.steps import base

TOLERANCE = 5.0
"""Seconds that the guest's clock may be off, beside what it takes to ask for it."""

_RIGHT = "as this host's"
_ATTEMPTS = 3


class Clock:
    """Sets the guest's clock by this host's."""

    name = "clock"

    def obstacle(self, asked: guest.Timed) -> str | None:
        """Every system has a command for it."""
        return None

    def read(self, asked: guest.Timed) -> dict[str, str]:
        """Return whether it is right, or by how many seconds it is not."""
        before = time.time()
        said = base.sh(asked, "reading the clock", "date -u +%s").strip()
        if not said.isdigit() or len(said) > 12:
            raise asked.failed("reading the clock", f"{said[:40]!r} is no time")
        found = int(said)
        if before - TOLERANCE <= found <= time.time() + TOLERANCE:
            return {self.name: _RIGHT}
        return {self.name: f"{found - before:+.0f} s from this host's"}

    def change(self, asked: guest.Timed, wanted: model.Wanted) -> str:
        """Set it; again when that took so long that it is wrong."""
        for _ in range(_ATTEMPTS):
            base.sh(
                asked, "setting the clock", 'date -u -s "@$1"', str(int(time.time()))
            )
            if self.read(asked)[self.name] == _RIGHT:
                return "set by this host's"
        raise asked.failed("setting the clock", f"wrong after {_ATTEMPTS} attempts")

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """It is right."""
        if after.get(self.name) != _RIGHT:
            raise ValueError(f"it is {after.get(self.name)}")
        return f"read back, within {TOLERANCE:g} s"
