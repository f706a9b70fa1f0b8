# SPDX-License-Identifier: Apache-2.0
"""Instances: made, started, stopped, removed."""

from collections.abc import Mapping
from typing import Any

from oslo_log import log as logging

from virtmigrate import mapping, spawning
from virtmigrate import transient as transients
from virtmigrate.face import base
from virtmigrate.instance import Info

LOG = logging.getLogger(__name__)


class Instances(base.Base):
    """Runs the instances of one host."""

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
            self.demand_at_rest(uuid)
            lenders = self.clones.lenders(uuid)
            self.node.domains.kill(uuid)
            self.node.domains.undefine(uuid, saved=True)
            if destroy_disks:
                self.node.remove_instance(uuid)
        for lender in sorted(lenders):
            self.clones.tidy(lender)
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
        """SOFT: shut down and start. HARD: off and on, from the configuration.

        Only SOFT keeps what the guest wrote to transient disks.
        """
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
            self.node.start(uuid, keep=reboot_type == "SOFT")

    def set_transient(self, uuid: str, target: str, *, transient: bool) -> None:
        """Have what the guest writes to a disk thrown away when it is off, or not.

        Raises TransientRefused: nothing was changed.
        """
        transients.declare(
            self.node, uuid, target, self.demand_at_rest, transient=transient
        )
        if not transient:
            # What its guest read was kept meanwhile.
            self.clones.tidy(uuid)

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
