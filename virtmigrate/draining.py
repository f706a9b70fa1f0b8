# SPDX-License-Identifier: Apache-2.0
"""Whether a host takes new instances.

A note in its mailbox says so, where this host's processes and its peers see it. It
stays until an operator takes it away: a host that was emptied, or a drain that was
killed, is as closed as before.
"""

import time

from oslo_log import log as logging

from virtmigrate import drainnote, errors, mailbox, node

LOG = logging.getLogger(__name__)


def noted(box: mailbox.Mailbox) -> drainnote.Note | None:
    """Return what a host's mailbox says; None when it was never drained."""
    try:
        stored = box.drains.find(mailbox.DRAIN)
    except errors.PoolNotFound:
        return None
    return stored.body if stored else None


def is_draining(box: mailbox.Mailbox) -> bool:
    """Tell whether a host takes no new instances."""
    found = noted(box)
    return found is not None and found.draining


def begin(here: node.Node, reason: str = "", rolling: str = "") -> None:
    """Take no new instances from now on; can be called again."""
    note = drainnote.Note(
        host=here.name,
        draining=True,
        since=time.time(),
        reason=reason,
        rolling=rolling,
    )
    found = noted(here.mailbox)
    if found is None or not found.draining or found.rolling != rolling:
        _publish(here, note)
        LOG.info("host=%s takes no new instances: it is drained", here.name)


def end(here: node.Node) -> bool:
    """Take new instances again; return whether that was a change.

    Of a round of hosts it stays known that this one had its turn.
    """
    found = noted(here.mailbox)
    if found is None:
        # What a killed process began to write, and nobody ever read.
        here.mailbox.drains.remove(mailbox.DRAIN)
    if found is None or not found.draining:
        return False
    if found.rolling:
        open_again = drainnote.Note(
            host=here.name, draining=False, since=time.time(), rolling=found.rolling
        )
        _publish(here, open_again)
    else:
        here.mailbox.drains.remove(mailbox.DRAIN)
    LOG.info("host=%s takes new instances again", here.name)
    return True


def demand_open(box: mailbox.Mailbox, host: str) -> None:
    """Raise HostDraining while a host takes no new instances."""
    found = noted(box)
    if found is not None and found.draining:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.since))
        raise errors.HostDraining(host=host, since=since)


# Private


def _publish(here: node.Node, note: drainnote.Note) -> None:
    drains = here.mailbox.drains
    stored = drains.find(mailbox.DRAIN)
    drains.publish(mailbox.DRAIN, note, after=stored.generation if stored else 0)
    drains.prune(mailbox.DRAIN)
