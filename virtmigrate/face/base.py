# SPDX-License-Identifier: Apache-2.0
"""What every part of the driver's face stands on."""

from collections.abc import Callable

from oslo_config import cfg

from virtmigrate import (
    clone,
    errors,
    imagecache,
    livesnapshot,
    node,
    peers,
    quiescing,
    snapshot,
)
from virtmigrate.livemigration import LiveMigrations
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
    _quiescing: quiescing.Quiescing
    images: imagecache.Caches
    live: LiveMigrations
    snapshots: snapshot.Snapshots
    saves: livesnapshot.Images
    clones: clone.Clones

    @property
    def node(self) -> node.Node:
        """This host; ConfigurationError before init_host."""
        if self._node is None:
            raise errors.ConfigurationError(reason="init_host was not called")
        return self._node

    def demand_at_rest(self, uuid: str) -> None:
        """Raise InvalidState while a move of the instance is open on this host."""
        self._source.demand_none(uuid)
        self.live.demand_none(uuid)

    def peer(self, dest: str) -> Peer:
        """Return a host that instances can be moved to; also this one."""
        return self._peers.get(dest)
