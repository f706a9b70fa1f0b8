# SPDX-License-Identifier: Apache-2.0
"""The face that a compute service imports: it checks, delegates and maps.

What is the host's is here; face/ has the rest, and says whose signatures these are.
"""

import functools
from collections.abc import Callable
from typing import Any

from oslo_config import cfg

from virtmigrate import (
    clone,
    events,
    imagecache,
    inventory,
    livesnapshot,
    node,
    peers,
    periodic,
    quiescing,
    receiver,
    sinks,
    snapshot,
    takeover,
    transient,
)
from virtmigrate.conf import register
from virtmigrate.face import clones, console, drains, images, instances, live, moves
from virtmigrate.livemigration import LiveMigrations
from virtmigrate.migration import source, target
from virtmigrate.progress import Progress


class VirtMigrateDriver(
    instances.Instances,
    images.Images,
    moves.Moves,
    live.Live,
    clones.Clones,
    drains.Drains,
    console.Consoles,
):
    """Runs the instances of one host and moves them to others.

    Safe to share between threads. `init_host` comes first.

    Arguments:
        virtapi: what the compute service gives its driver; kept, not used.
        conf: the configuration; by default oslo.config's global one.
        progress: makes the Progress of a move; by default nobody listens.
        images_to: the image service that images of instances go to; by default
            that of the configuration.
    """

    def __init__(
        self,
        virtapi: object = None,
        conf: cfg.ConfigOpts | None = None,
        *,
        progress: Callable[[], Progress] = Progress,
        images_to: sinks.Service | None = None,
        **_: object,
    ) -> None:
        if isinstance(virtapi, cfg.ConfigOpts):
            virtapi, conf = None, virtapi
        self.virtapi = virtapi
        self._conf = conf if conf is not None else cfg.CONF
        self._progress = progress
        self._images_to = images_to or functools.partial(sinks.service_sink, self._conf)
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
        # What cleanup_host closes, also when this fails.
        self._peers = peers.Peers(self._node)
        self.live = LiveMigrations(
            self._node, self.peer, lambda uuid: self._source.demand_none(uuid)
        )
        self._quiescing = quiescing.Quiescing(self._node.agents, self._node.name)
        self._node.ensure()
        self.images = imagecache.Caches(self._node)
        self._source = source.Source(self._node, self.peer, self.live.demand_none)
        self.snapshots = snapshot.Snapshots(self._node, self.demand_at_rest)
        self.clones = clone.Clones(self._node, self.snapshots, self.demand_at_rest)
        self._target = target.Target(self._node)
        self.saves = livesnapshot.Images(
            self._node,
            self.snapshots,
            self.images,
            self.demand_at_rest,
            self._images_to,
        )
        # What may take long waits for the first settling.
        self._recover()
        if self._node.options.receiver:
            serving = {**self._target.actions(), **self.live.actions()}
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
        return [*self._recover(), *self.snapshots.tend()]

    def cleanup_host(self, host: str, **_: object) -> None:
        """Close all connections."""
        self._events.stop()
        self._settling.stop()
        if self._receiver is not None:
            self._receiver.stop()
            self._receiver = None
        if self._node is not None:
            self._quiescing.close()
            self._peers.close()
            self.live.close()
            self._node.close()

    def get_host_ip_addr(self) -> str:
        """Return the name or address that peers get as `dest`."""
        return self.node.name

    def get_available_resource(self, nodename: str) -> dict[str, Any]:
        """Return what this host has, in Nova's terms (MiB and GiB)."""
        return inventory.resources(self.node)

    def storage(self) -> list[inventory.Storage]:
        """Return the storage of this host, each once, and what its backends are."""
        return inventory.storage(self.node)

    def get_available_nodes(self, refresh: bool = False) -> list[str]:
        return [self.node.name]

    def register_event_listener(
        self, callback: Callable[[events.Event], object]
    ) -> None:
        """Call back, from a thread of ours, for each change of an instance's state."""
        self._events.start(callback, float(self.node.options.event_interval))

    def stop_events(self) -> None:
        """Call nobody back any more."""
        self._events.stop()

    # Private

    def _recover(self) -> list[str]:
        left = self.node.agents.recover()
        left += [*self.node.sweep(), *takeover.stop_lost(self.node)]
        # First of what takes long: guests may stand still until this decides.
        left += self.live.recover()
        left += [*self.images.tend(), *self.snapshots.finish()]
        left += [*self.clones.finish(), *self.saves.recover()]
        left += [*self._source.recover(), *self._target.recover()]
        # Last: a move that is put back may need what its guest wrote.
        return [*left, *transient.settle(self.node, self.demand_at_rest)]
