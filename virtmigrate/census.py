# SPDX-License-Identifier: Apache-2.0
"""Which instances a host has records of."""

from oslo_log import log as logging

from virtmigrate import errors, model, node

LOG = logging.getLogger(__name__)


def records(here: node.Node) -> dict[str, model.Instance]:
    """Return the records of a host's instances by UUID; broken ones are left out."""
    found: dict[str, model.Instance] = {}
    try:
        names = here.instances.names()
    except errors.PoolNotFound:
        return found
    for name in names:
        try:
            stored = here.instances.find(name)
        except errors.RecordError as e:
            LOG.warning("%s", e)
            continue
        if stored is not None:
            found[name] = stored.body
    return found
