# SPDX-License-Identifier: Apache-2.0
"""What a failed move left on its source, of a server that was deleted since.

Nova has a periodic task for that, which looks for the migrations of deleted servers;
but Nova 34 deletes a server's migrations together with it, so the task finds none.
"""

from typing import Any

from nova import exception, objects
from oslo_log import log as logging

LOG = logging.getLogger(__name__)


def remove(driver: Any, context: Any) -> None:
    """Remove what this host keeps for moves whose servers Nova has deleted.

    Only by Nova's own word that it is deleted: one that Nova does not know stays. What
    cannot be removed now stays, with a line in the log, until the next time.
    """
    for _, uuid, _, _ in driver.core.open_operations():
        instance = _deleted(context, uuid)
        if instance is None:
            continue
        try:
            driver.delete_instance_files(instance)
        except exception.NovaException as e:
            LOG.warning("instance=%s was deleted, and its move is open: %s", uuid, e)
        else:
            LOG.info("instance=%s was deleted: its move is undone, too", uuid)


# Private


def _deleted(context: Any, uuid: str) -> Any:
    """Return an instance that Nova says is deleted; else None."""
    seen = context.elevated(read_deleted="yes")
    try:
        found = objects.Instance.get_by_uuid(seen, uuid, expected_attrs=[])
    except exception.InstanceNotFound:
        return None
    return found if found.deleted else None
