# SPDX-License-Identifier: Apache-2.0
"""Instances: made, started, stopped, removed, as Nova asks for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nova import exception
from nova.compute import power_state
from nova.virt import driver as nova_driver
from nova.virt import hardware

from virtmigrate.instance import Power
from virtmigrate.nova_plugin import base, drive, glance, properties
from virtmigrate.nova_plugin.translation import told
from virtmigrate.units import GiB

_STATES = {
    Power.RUNNING: power_state.RUNNING,
    Power.PAUSED: power_state.PAUSED,
    Power.OFF: power_state.SHUTDOWN,
    Power.SAVED: power_state.SUSPENDED,
    Power.CRASHED: power_state.CRASHED,
}


class Guests(base.Base):
    """Runs the instances of one host."""

    def list_instances(self) -> list[str]:
        with told():
            return self.core.list_instances()

    def list_instance_uuids(self) -> list[str]:
        with told():
            return self.core.list_instance_uuids()

    def instance_exists(self, instance: Any) -> bool:
        with told(instance.uuid):
            return self.core.instance_exists(instance)

    def get_info(self, instance: Any, use_cache: bool = True, **_: Any) -> Any:
        """Return Nova's InstanceInfo; InstanceNotFound."""
        with told(instance.uuid):
            found = self.core.get_info(instance)
        return hardware.InstanceInfo(_STATES[found.power], found.id)

    def spawn(
        self,
        context: Any,
        instance: Any,
        image_meta: Any,
        injected_files: Any,
        admin_password: str | None,
        allocations: Any,
        network_info: Any = None,
        block_device_info: Any = None,
        power_on: bool = True,
        accel_info: Any = None,
        **_: Any,
    ) -> None:
        """Make an instance from an image of the service.

        Raises InvalidInput for what is not honoured: the build is aborted and the user
        told why. On failure nothing of it stays.
        """
        properties.demand_flavor(instance.flavor)
        properties.demand_image(image_meta)
        properties.demand_instance(instance)
        demand_devices(image_meta, block_device_info, accel_info)
        ephemeral = ephemeral_sizes(block_device_info)
        with (
            told(instance.uuid),
            drive.made(
                context, instance, network_info, injected_files, admin_password
            ) as config,
        ):
            self.core.spawn(
                context,
                _ours(instance, config, ephemeral),
                {
                    "source": glance.NovaImage(context, str(image_meta.id)),
                    "machine_type": properties.machine_type(image_meta),
                },
                network_info=network_info,
                power_on=power_on,
            )

    def failed_spawn_cleanup(self, instance: Any) -> None:
        """Nothing: a spawn that fails leaves nothing."""

    def destroy(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_device_info: Any = None,
        destroy_disks: bool = True,
        destroy_secrets: bool = True,
        **_: Any,
    ) -> None:
        """Remove an instance; one that came by a move that is not confirmed is given
        back to its source, whose volumes are never touched.

        Raises InstanceNotFound, and InstancePowerOffFailure for all that fails: the
        guest may run on, and for any other error Nova frees its ports, whose addresses
        the next server would get.
        """
        try:
            with told(instance.uuid):
                self.core.destroy(context, instance, destroy_disks=destroy_disks)
        except exception.InstanceNotFound:
            raise
        except exception.NovaException as e:
            raise exception.InstancePowerOffFailure(reason=str(e)) from e

    def cleanup(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_device_info: Any = None,
        destroy_disks: bool = True,
        migrate_data: Any = None,
        destroy_vifs: bool = True,
        destroy_secrets: bool = True,
        **_: Any,
    ) -> None:
        """Remove what destroy would, of an instance that is off already.

        Nothing of one that has moved live: what was here is gone, and what both hosts
        see is the other's.
        """
        if migrate_data is not None:
            return
        self.destroy(context, instance, network_info, destroy_disks=destroy_disks)

    def delete_instance_files(self, instance: Any) -> bool:
        """Remove what a failed move left here of an instance that was deleted.

        Nova asks both hosts of such a move. What was given away is taken back first:
        the other host gave it up when it was deleted there.
        """
        with told(instance.uuid):
            if self.core.has_open_move(instance.uuid):
                self.core.finish_revert_migration(None, instance, power_on=False)
            self.core.destroy(None, instance)
        return True

    def power_on(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_device_info: Any = None,
        accel_info: Any = None,
        share_info: Any = None,
        **_: Any,
    ) -> None:
        demand_devices(None, block_device_info, accel_info, share_info)
        with told(instance.uuid):
            self.core.power_on(context, instance)

    def power_off(
        self, instance: Any, timeout: int = 0, retry_interval: int = 0
    ) -> None:
        with told(instance.uuid):
            self.core.power_off(instance, timeout, retry_interval)

    def reboot(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        reboot_type: str,
        block_device_info: Any = None,
        bad_volumes_callback: Any = None,
        accel_info: Any = None,
        share_info: Any = None,
        **_: Any,
    ) -> None:
        demand_devices(None, block_device_info, accel_info, share_info)
        with told(instance.uuid):
            self.core.reboot(context, instance, network_info, reboot_type)

    def resume_state_on_host_boot(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        share_info: Any,
        block_device_info: Any = None,
        **_: Any,
    ) -> None:
        """Start what ran before the host went down, where Nova is told to."""
        self.power_on(
            context, instance, network_info, block_device_info, share_info=share_info
        )

    def pause(self, instance: Any) -> None:
        with told(instance.uuid):
            self.core.pause(instance)

    def unpause(self, instance: Any) -> None:
        with told(instance.uuid):
            self.core.unpause(instance)

    def suspend(self, context: Any, instance: Any) -> None:
        with told(instance.uuid):
            self.core.suspend(context, instance)

    def resume(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_device_info: Any = None,
        share_info: Any = None,
        **_: Any,
    ) -> None:
        demand_devices(None, block_device_info, share_info=share_info)
        with told(instance.uuid):
            self.core.resume(context, instance)

    def poll_rebooting_instances(self, timeout: int, instances: Any) -> None:
        """Nothing: a reboot that is cut short is seen by its power state."""

    def get_console_output(self, context: Any, instance: Any) -> str:
        """Return the end of the serial console's log, a character for each byte.

        Raises ConsoleNotAvailable where there is none yet, or this service may not
        read it.
        """
        try:
            with told(instance.uuid):
                found = self.core.get_console_output(context, instance)
        except OSError as e:
            raise exception.ConsoleNotAvailable(message=str(e)) from e
        return found.decode("latin-1")


def demand_devices(
    image_meta: Any,
    block_device_info: Any,
    accel_info: Any = None,
    share_info: Any = None,
) -> None:
    """Raise Nova's exception for a volume, an accelerator or a share that is wanted."""
    volumes = nova_driver.block_device_info_get_mapping(block_device_info)
    if volumes:
        raise exception.InvalidInput(
            reason="the virtmigrate driver has no volumes of Cinder yet: "
            + ", ".join(str(each.get("mount_device")) for each in volumes)
        )
    if image_meta is not None and not image_meta.obj_attr_is_set("id"):
        raise exception.InvalidInput(reason="the virtmigrate driver boots images only")
    if accel_info or share_info:
        what = "accelerators" if accel_info else "shares"
        raise exception.InvalidInput(
            reason=f"the virtmigrate driver has no {what} for guests"
        )


def ephemeral_sizes(block_device_info: Any) -> tuple[int, ...]:
    """Return the sizes in bytes of the empty disks that are wanted."""
    encrypted = nova_driver.block_device_info_get_encrypted_disks(block_device_info)
    swap = nova_driver.block_device_info_get_swap(block_device_info)
    if encrypted or nova_driver.swap_is_usable(swap):
        what = "encrypted disks" if encrypted else "swap disks"
        raise exception.InvalidInput(reason=f"the virtmigrate driver has no {what}")
    found = nova_driver.block_device_info_get_ephemerals(block_device_info)
    return tuple(int(each["size"]) * GiB for each in found)


# Private


def _ours(
    instance: Any, config: Path | None, ephemeral: tuple[int, ...]
) -> SimpleNamespace:
    """Return what our driver reads of an instance."""
    return SimpleNamespace(
        uuid=instance.uuid,
        name=instance.name,
        flavor=instance.flavor,
        config_drive_path=config,
        ephemeral_sizes=ephemeral,
    )
