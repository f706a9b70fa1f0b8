# SPDX-License-Identifier: Apache-2.0
"""What a host's mailbox says of it while it is drained, and after it was."""

from virtmigrate.schema import Struct


class Note(Struct, frozen=True):
    """Whether a host takes new instances, and how that came."""

    host: str
    draining: bool
    """It takes no new instances, and none that move."""
    since: float
    """Seconds since the epoch at which `draining` became what it is."""
    reason: str = ""
    rolling: str = ""
    """The round of hosts in which it was drained; "" when it was drained alone."""
