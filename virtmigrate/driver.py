# SPDX-License-Identifier: Apache-2.0
"""The face that a compute service imports: it checks, delegates and maps.

Method names and signatures are OpenStack Nova's (nova.virt.driver.ComputeDriver),
and nothing of Nova is needed: objects are read by their attributes, additional
keyword arguments are tolerated, because Nova's signatures drift.
"""

from collections.abc import Callable, Mapping
from typing import Any

from oslo_config import cfg
from oslo_log import log as logging

from virtmigrate import (
    errors,
    events,
    imagecache,
    inventory,
    mapping,
    node,
    peers,
    periodic,
    receiver,
    snapshot,
    spawning,
    takeover,
)
from virtmigrate.conf import register
from virtmigrate.instance import Info
from virtmigrate.migration import source, target
from virtmigrate.peer import Peer
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)


class VirtMigrateDriver:
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

    @property
    def node(self) -> node.Node:
        """This host; ConfigurationError before init_host."""
        if self._node is None:
            raise errors.ConfigurationError(reason="init_host was not called")
        return self._node

    # The host

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

    # Instances

    def list_instances(self) -> list[str]:
        return [name for _, name in self.node.domains.all()]

    def list_instance_uuids(self) -> list[str]:
        return [uuid for uuid, _ in self.node.domains.all()]

    def instance_exists(self, instance: Any) -> bool:
        return self.node.domains.exists(instance.uuid)

    def get_info(self, instance: Any, use_cache: bool = True, **_: object) -> Info:
        """Return power state, memory and CPUs; InstanceNotFound."""
        return self.node.domains.info(instance.uuid)

    def spawn(
        self,
        context: object,
        instance: Any,
        image_meta: Any,
        injected_files: object = None,
        admin_password: object = None,
        allocations: object = None,
        network_info: Any = None,
        block_device_info: Mapping[str, Any] | None = None,
        power_on: bool = True,
        **_: object,
    ) -> None:
        """Make an instance from an image; on failure nothing of it stays.

        From one of the image service (`image_meta.id`), of a web server (`url` and
        `checksum`) or a file (`path` and `id`), which is cached and cloned; or from
        the raw file `path`, which is copied.
        """
        wanted = mapping.wanted(
            instance,
            image_meta,
            network_info,
            image=mapping.image(self._conf, context, image_meta),
            owner=self.node.options.owner,
        )
        spawning.Spawner(self.node, self.images).spawn(wanted, power_on=power_on)

    def destroy(
        self,
        context: object,
        instance: Any,
        network_info: object = None,
        block_device_info: object = None,
        destroy_disks: bool = True,
        destroy_secrets: bool = True,
        **_: object,
    ) -> None:
        """Stop the instance and remove its domain; its volumes when destroy_disks.

        An instance that came by a move that is not confirmed is given back to
        its source, whose volumes are never touched. Raises InvalidState while a
        move away from here is open: what is here may be the only copy.
        """
        uuid = instance.uuid
        with self.node.claimed(uuid):
            if self._target.give_back(uuid):
                return
            self.node.demand_settled(uuid)
            self._source.demand_none(uuid)
            self.node.domains.kill(uuid)
            self.node.domains.undefine(uuid)
            if destroy_disks:
                self.node.remove_instance(uuid)
        LOG.info("instance=%s destroyed on %s", uuid, self.node.name)

    def cleanup(
        self,
        context: object,
        instance: Any,
        network_info: object = None,
        block_device_info: object = None,
        destroy_disks: bool = True,
        **_: object,
    ) -> None:
        """Remove what destroy would, of an instance that is off already."""
        self.destroy(context, instance, destroy_disks=destroy_disks)

    def power_on(
        self,
        context: object,
        instance: Any,
        network_info: object = None,
        block_device_info: object = None,
        **_: object,
    ) -> None:
        """Start it; NotEntitled when this host has not the right to."""
        with self.node.claimed(instance.uuid):
            self.node.start(instance.uuid)

    def power_off(
        self, instance: Any, timeout: int = 0, retry_interval: int = 0, **_: object
    ) -> None:
        """Let the guest shut down within timeout seconds, then turn it off."""
        with self.node.claimed(instance.uuid):
            self.node.domains.stop(instance.uuid, timeout, retry_interval or 1)

    def reboot(
        self,
        context: object,
        instance: Any,
        network_info: object,
        reboot_type: str,
        block_device_info: object = None,
        bad_volumes_callback: object = None,
        **_: object,
    ) -> None:
        """SOFT: shut down and start. HARD: off and on, from the configuration."""
        uuid = instance.uuid
        with self.node.claimed(uuid):
            # Before it is off: it would stay so.
            self.node.demand_whole(uuid)
            if reboot_type == "SOFT":
                wait = self.node.options
                self.node.domains.stop(
                    uuid, wait.shutdown_timeout, wait.shutdown_retry_interval
                )
            self.node.domains.kill(uuid)
            self.node.start(uuid)

    def pause(self, instance: Any, **_: object) -> None:
        with self.node.claimed(instance.uuid):
            self.node.domains.pause(instance.uuid)

    def unpause(self, instance: Any, **_: object) -> None:
        with self.node.claimed(instance.uuid):
            self.node.demand_whole(instance.uuid)
            self.node.domains.unpause(instance.uuid)

    def suspend(self, context: object, instance: Any, **_: object) -> None:
        """Keep its memory in libvirt's managed save."""
        with self.node.claimed(instance.uuid):
            self.node.demand_whole(instance.uuid)
            self.node.domains.save(instance.uuid)

    def resume(
        self,
        context: object,
        instance: Any,
        network_info: object = None,
        block_device_info: object = None,
        **_: object,
    ) -> None:
        """Start it, from its managed save if there is one."""
        self.power_on(context, instance)

    # Images

    def cache_image(self, context: object, image_id: str, **_: object) -> bool:
        """Fetch an image of the service before somebody needs it.

        Into all backends of this host; one after the other. False when all had it.
        """
        image = mapping.named_image(self._conf, image_id)
        return self.images.seed(image, self._progress)

    def manage_image_cache(
        self, context: object, all_instances: object = None, **_: object
    ) -> None:
        """Drop idle images beyond each backend's limits.

        What is in use is what records say; `all_instances` is not asked.
        """
        self.images.tend()

    # Moves

    def migrate_disk_and_power_off(
        self,
        context: Any,
        instance: Any,
        dest: str,
        flavor: Any,
        network_info: object = None,
        block_device_info: object = None,
        timeout: int = 0,
        retry_interval: int = 0,
        **_: object,
    ) -> str:
        """Move the volumes to dest and hand the instance over.

        Returns the string that finish_migration needs there.
        Raises MigrationRefused: nothing was touched. MigrationRolledBack: all is
        as it was, the guest runs again. MigrationUndecided: see there.
        """
        request = mapping.request(
            context, instance, dest, flavor, timeout, retry_interval
        )
        return self._source.migrate(request, self._progress())

    def finish_migration(
        self,
        context: object,
        migration: object,
        instance: Any,
        disk_info: str,
        network_info: Any = None,
        image_meta: object = None,
        resize_instance: bool = False,
        allocations: object = None,
        block_device_info: object = None,
        power_on: bool = True,
        **_: object,
    ) -> None:
        """Take the instance that was handed over to this host."""
        interfaces = mapping.interfaces(network_info)
        self._target.finish(
            instance.uuid, disk_info, power_on=power_on, interfaces=interfaces
        )

    def confirm_migration(
        self,
        context: object,
        migration: object,
        instance: Any,
        network_info: object = None,
        accept_unproven: bool = False,
        **_: object,
    ) -> None:
        """Remove the source's volumes; NotConfirmable until the peer has proven its.

        `accept_unproven` is an operator's word where `verify` is not full: a byte
        that arrived wrong can then not be repaired any more.
        """
        self._source.confirm(instance.uuid, accept_unproven=accept_unproven)

    def finish_revert_migration(
        self,
        context: object,
        instance: Any,
        network_info: object = None,
        migration: object = None,
        block_device_info: object = None,
        power_on: bool = True,
        peer_is_lost: bool = False,
        **_: object,
    ) -> None:
        """Take the instance back, as it was when it was powered off.

        `peer_is_lost` is an operator's word that the peer will never run it: it
        counts only where the peer cannot be asked.
        """
        self._source.revert(instance.uuid, power_on=power_on, peer_is_lost=peer_is_lost)

    def take_over(
        self, uuid: str, *, power_on: bool = True, host_is_down: bool = False
    ) -> None:
        """Take an instance from a host that is down, where its disks are seen here.

        That host is fenced first: by the storage, or else by an operator's word
        (`host_is_down`) that it has stopped for certain. Raises TakeOverRefused:
        nothing was changed.
        """
        takeover.run(self.node, uuid, power_on=power_on, host_is_down=host_is_down)

    def write_off(self, operation: str, *, peer_is_lost: bool = False) -> str:
        """Forget a debt at a peer, or end a move whose instance a third host has."""
        return self._source.write_off(operation, peer_is_lost=peer_is_lost)

    def open_operations(self) -> list[tuple[str, str, str, str]]:
        """Return (operation, instance, peer, newest step) of moves not over."""
        return self._source.open_operations()

    def peer(self, dest: str) -> Peer:
        """Return a host that instances can be moved to; also this one."""
        return self._peers.get(dest)
