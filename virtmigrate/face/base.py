# SPDX-License-Identifier: Apache-2.0
"""What every part of the driver's face stands on."""

from collections.abc import Callable

from oslo_config import cfg

from virtmigrate import clone, errors, imagecache, node, peers, snapshot
from virtmigrate.migration import source, target
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress


class Base:
    """One host's rooms, put together by init_host."""

    _conf: cfg.ConfigOpts
    _progress: Callable[[], Progress]
    _node: node.Node | None
    _peers: peers.Peers
    _source: source.Source
    _target: target.Target
    images: imagecache.Caches
    snapshots: snapshot.Snapshots
    clones: clone.Clones

    @property
    def node(self) -> node.Node:
        """This host; ConfigurationError before init_host."""
        if self._node is None:
            raise errors.ConfigurationError(reason="init_host was not called")
        return self._node

    def peer(self, dest: str) -> Peer:
        """Return a host that instances can be moved to; also this one."""
        return self._peers.get(dest)
