# SPDX-License-Identifier: Apache-2.0
"""The hosts that instances can be moved to, as the configuration says."""

from virtmigrate import conf, mailbox, node, ownhost
from virtmigrate.host import Host
from virtmigrate.peer import Peer


class Peers:
    """Opens each peer once. Safe to share between threads, but for close()."""

    def __init__(self, here: node.Node) -> None:
        self._here = here
        self._opened: dict[str, Peer] = {}

    def get(self, dest: str) -> Peer:
        """Return a host by what the caller names it; also this one."""
        if dest == self._here.name:
            return ownhost.OwnHost(self._here)
        if dest not in self._opened:
            self._opened[dest] = self._open(dest)
        return self._opened[dest]

    def close(self) -> None:
        """Close all connections to them."""
        for peer in self._opened.values():
            peer.host.close()
        self._opened.clear()

    # Private

    def _open(self, dest: str) -> Peer:
        options = self._here.options
        host = Host(
            conf.transfer_uri(self._here.conf, dest),
            name=dest,
            timeouts=node.timeouts(self._here.conf),
            allow_insecure=dest in options.allow_insecure_peers,
        )
        box = mailbox.of(
            host,
            options.record_grace,
            ownership=self._here.files.settings.ownership,
            busy_timeout=options.busy_timeout,
        )
        return Peer(host, box, float(options.receiver_timeout))
