# SPDX-License-Identifier: Apache-2.0
"""The face that a compute service imports: it checks, delegates and maps.

What is the host's is here; face/ has the rest, and says whose signatures these are.
"""

from collections.abc import Callable
from typing import Any

from oslo_config import cfg

from virtmigrate import (
    events,
    imagecache,
    inventory,
    node,
    peers,
    periodic,
    receiver,
    snapshot,
    takeover,
)
from virtmigrate.conf import register
from virtmigrate.face import images, instances, moves
from virtmigrate.migration import source, target
from virtmigrate.progress import Progress


class VirtMigrateDriver(instances.Instances, images.Images, moves.Moves):
    """Runs the instances of one host and moves them to others.

    Safe to share between threads. `init_host` comes first.

    Arguments:
        virtapi: what the compute service gives its driver; kept, not used.
        conf: the configuration; by default oslo.config's global one.
        progress: makes the Progress of a move; by default nobody listens.
    """

    def __init__(
        self,
        virtapi: object = None,
        conf: cfg.ConfigOpts | None = None,
        *,
        progress: Callable[[], Progress] = Progress,
        **_: object,
    ) -> None:
        if isinstance(virtapi, cfg.ConfigOpts):
            virtapi, conf = None, virtapi
        self.virtapi = virtapi
        self._conf = conf if conf is not None else cfg.CONF
        self._progress = progress
        self._node: node.Node | None = None
        self._events = events.Poller(lambda: self.node)
        self._settling = periodic.Periodic("virtmigrate-settle")
        self._receiver: receiver.Receiver | None = None

    def init_host(self, host: str, **_: object) -> None:
        """Make pools, say to peers what this host is, finish what was left undone.

        From then on peers' requests are served, unless `receiver` says otherwise.
        """
        register(self._conf)
        self._node = node.Node(self._conf)
        self._peers = peers.Peers(self._node)
        self._node.ensure()
        self.images = imagecache.Caches(self._node)
        self._source = source.Source(self._node, self.peer)
        self.snapshots = snapshot.Snapshots(self._node, self._source.demand_none)
        self._target = target.Target(self._node)
        self.settle()
        if self._node.options.receiver:
            serving = self._target.actions()
            self._receiver = receiver.Receiver(self._node, actions=serving)
            self._receiver.start()
        interval = float(self._node.options.settle_interval)
        if interval:
            self._settling.start(self.settle, interval, first=interval)

    def settle(self) -> list[str]:
        """Finish or undo what a failure left, on this host; return what remains.

        Called at the start and every `settle_interval` seconds: peers come back,
        and debts are paid.
        """
        left = self.node.agents.recover()
        left += [*self.node.sweep(), *takeover.stop_lost(self.node)]
        left += [*self.images.tend(), *self.snapshots.finish()]
        return [*left, *self._source.recover(), *self._target.recover()]

    def cleanup_host(self, host: str, **_: object) -> None:
        """Close all connections."""
        self._events.stop()
        self._settling.stop()
        if self._receiver is not None:
            self._receiver.stop()
            self._receiver = None
        if self._node is not None:
            self._peers.close()
            self._node.close()

    def get_host_ip_addr(self) -> str:
        """Return the name or address that peers get as `dest`."""
        return self.node.name

    def get_available_resource(self, nodename: str) -> dict[str, Any]:
        """Return what this host has, in Nova's terms (MiB and GiB)."""
        return inventory.resources(self.node)

    def get_available_nodes(self, refresh: bool = False) -> list[str]:
        return [self.node.name]

    def register_event_listener(
        self, callback: Callable[[events.Event], object]
    ) -> None:
        """Call back, from a thread of ours, for each change of an instance's state."""
        self._events.start(callback, float(self.node.options.event_interval))
