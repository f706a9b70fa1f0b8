# SPDX-License-Identifier: Apache-2.0
"""Resizes and cold migrations, as Nova asks for them."""

from typing import Any

from nova import exception

from virtmigrate.nova_plugin import base, guests, properties
from virtmigrate.nova_plugin.translation import told


class Moves(base.Base):
    """Moves instances to other hosts and takes what comes."""

    def get_host_ip_addr(self) -> str:
        """Return what peers get as `dest`: a name that their peer_uri leads to."""
        return self.core.get_host_ip_addr()

    def migrate_disk_and_power_off(
        self,
        context: Any,
        instance: Any,
        dest: str,
        flavor: Any,
        network_info: Any,
        block_device_info: Any = None,
        timeout: int = 0,
        retry_interval: int = 0,
        **_: Any,
    ) -> str:
        """Move the volumes to dest and hand the instance over.

        Raises InstanceFaultRollback when the guest is as it was: refused, or undone.
        Any other exception: it is in doubt, and the server's state is ERROR.
        """
        try:
            guests.demand_devices(None, block_device_info)
            properties.demand_flavor(flavor)
            _demand_same_disks(instance, flavor)
        except (exception.Invalid, exception.ResizeError) as e:
            raise exception.InstanceFaultRollback(e) from e
        with told(instance.uuid):
            return self.core.migrate_disk_and_power_off(
                context,
                instance,
                dest,
                flavor,
                timeout=timeout,
                retry_interval=retry_interval,
            )

    def finish_migration(
        self,
        context: Any,
        migration: Any,
        instance: Any,
        disk_info: str,
        network_info: Any,
        image_meta: Any,
        resize_instance: bool,
        allocations: Any,
        block_device_info: Any = None,
        power_on: bool = True,
        share_info: Any = None,
        **_: Any,
    ) -> None:
        """Take the instance that was handed over to this host."""
        with told(instance.uuid):
            self.core.finish_migration(
                context,
                migration,
                instance,
                disk_info,
                network_info=network_info,
                power_on=power_on,
            )

    def confirm_migration(
        self, context: Any, migration: Any, instance: Any, network_info: Any
    ) -> None:
        """Remove the source's volumes, once the peer has proven its own."""
        with told(instance.uuid):
            self.core.confirm_migration(context, migration, instance)

    def finish_revert_migration(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        migration: Any,
        block_device_info: Any = None,
        power_on: bool = True,
        share_info: Any = None,
        **_: Any,
    ) -> None:
        """Take the instance back; Nova also calls it when it starts, from any state."""
        with told(instance.uuid):
            self.core.finish_revert_migration(context, instance, power_on=power_on)

    def check_instance_shared_storage_local(self, context: Any, instance: Any) -> None:
        """Nothing to look for: destroy() knows by records what is shared."""

    def check_instance_shared_storage_cleanup(self, context: Any, data: Any) -> None:
        """Nothing was made to look by."""


# Private


def _demand_same_disks(instance: Any, flavor: Any) -> None:
    """Raise ResizeError for a flavor with disks that a move would have to make, or to
    take away."""
    old, new = instance.flavor, flavor
    if bool(old.ephemeral_gb) != bool(new.ephemeral_gb):
        raise exception.ResizeError(
            reason="a resize neither adds nor removes an ephemeral disk: it has "
            f"{old.ephemeral_gb} GiB, and {new.ephemeral_gb} are wanted"
        )
    if new.root_gb < old.root_gb or new.ephemeral_gb < old.ephemeral_gb:
        raise exception.ResizeError(
            reason=f"disks do not become smaller: root {old.root_gb} to {new.root_gb}, "
            f"ephemeral {old.ephemeral_gb} to {new.ephemeral_gb} GiB"
        )
