# SPDX-License-Identifier: Apache-2.0
"""How fast the way to a host is, measured with a small volume that comes and goes."""

import os
import time

from oslo_log import log as logging

from virtmigrate import errors, model
from virtmigrate.peer import Peer
from virtmigrate.units import MiB

LOG = logging.getLogger(__name__)

SIZE = 16 * MiB
"""Bytes that are sent: half a second of a Gigabit link."""


def measure(there: Peer, card: model.HostCard) -> float:
    """Return the bytes per second of one stream to a host; 0 where that is not known.

    Where it takes no streams nothing is sent. On failure nothing stays there.
    """
    for backend in card.backends:
        if not backend.pieces:
            pool = there.incoming(backend)
            try:
                with pool.nonce(SIZE) as name:
                    data = os.urandom(SIZE)
                    began = time.monotonic()
                    pool.write(name, data)
                    return SIZE / max(time.monotonic() - began, 1e-6)
            except errors.Error as e:
                LOG.warning("host=%s its link was not measured: %s", there.name, e)
                return 0.0
    return 0.0
