# SPDX-License-Identifier: Apache-2.0
"""Live migrations, as Nova asks for them.

What Nova carries between the hosts has to be an object that its conductor knows, too:
none of ours can be. It is the one of Hyper-V's former driver. For that one, and for no
plainer one, Nova calls the destination when a migration fails, and ends what it noted
there. That no disk is to be removed is said in it, and nothing else is.
"""

from collections.abc import Callable
from typing import Any

from nova import exception
from nova.objects import migrate_data as nova_data
from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.nova_plugin import base, guests
from virtmigrate.nova_plugin.translation import told

LOG = logging.getLogger(__name__)

_DEST = "virtmigrate"
"""Where the destination says its name, in the one field that holds any text: Nova
empties it before it means anything."""


class Live(base.Base):
    """Moves running instances to other hosts and takes what comes."""

    def check_can_live_migrate_destination(
        self,
        context: Any,
        instance: Any,
        src_compute_info: Any,
        dst_compute_info: Any,
        block_migration: bool | None = False,
        disk_over_commit: bool | None = False,
        **_: Any,
    ) -> Any:
        """Say where this host is reached; the source checks all else.

        Which disks are sent is by records, whatever block_migration says.
        """
        return nova_data.HyperVLiveMigrateData(
            is_shared_instance_path=True,
            old_vol_attachment_ids={_DEST: self.core.get_host_ip_addr()},
        )

    def cleanup_live_migration_destination_check(
        self, context: Any, dest_check_data: Any
    ) -> None:
        """Nothing: the check leaves nothing."""

    def check_can_live_migrate_source(
        self,
        context: Any,
        instance: Any,
        dest_check_data: Any,
        block_device_info: Any = None,
        **_: Any,
    ) -> Any:
        """Raise MigrationPreCheckError with the reason, if it cannot be moved there.

        Nova tries another host then, or leaves the server as it is.
        """
        dest = _named(dest_check_data)
        try:
            guests.demand_devices(None, block_device_info)
            self.core.check_can_live_migrate_source(context, instance, {"dest": dest})
        except (errors.Error, exception.Invalid) as e:
            raise exception.MigrationPreCheckError(reason=str(e)) from e
        return dest_check_data

    def pre_live_migration(
        self,
        context: Any,
        instance: Any,
        block_device_info: Any,
        network_info: Any,
        disk_info: Any,
        migrate_data: Any,
        **_: Any,
    ) -> Any:
        """Let the source bring the instance here.

        Nothing is plugged yet: libvirt does that when QEMU starts, so that nobody is
        to wait for Neutron before. That is why no ports are named any more.
        """
        guests.demand_devices(None, block_device_info)
        with told(instance.uuid):
            self.core.pre_live_migration(context, instance)
        migrate_data.vifs = []
        return migrate_data

    def live_migration(
        self,
        context: Any,
        instance: Any,
        dest: str,
        post_method: Callable[..., object],
        recover_method: Callable[..., object],
        block_migration: bool | None = False,
        migrate_data: Any = None,
        **_: Any,
    ) -> None:
        """Move it; call one of the two methods when that is over.

        `recover_method` when it runs here as before: nothing is raised then, or the
        server's state became ERROR. `post_method` when it runs there. Neither where
        that is not known: MigrationError, and a settle ends it.
        """
        status = "failed"
        try:
            self.core.live_migration(
                context,
                instance,
                # Nova calls hosts by other names than libvirt.
                migrate_data.migration.dest_node,
                _nothing,
                _nothing,
            )
        except errors.MigrationUndecided as e:
            raise exception.MigrationError(reason=str(e)) from e
        except errors.Error as e:
            LOG.error("instance=%s was not moved to %s: %s", instance.uuid, dest, e)
        except errors.Cancelled:
            LOG.info("instance=%s is not moved to %s: aborted", instance.uuid, dest)
            status = "cancelled"
        else:
            post_method(context, instance, dest, block_migration, migrate_data)
            return
        recover_method(context, instance, dest, migrate_data, migration_status=status)

    def live_migration_abort(self, instance: Any) -> None:
        """End it; the guest goes on here."""
        with told(instance.uuid):
            self.core.live_migration_abort(instance)

    def live_migration_force_complete(self, instance: Any) -> None:
        """Pause the guest, so that what is left ends; it goes on at the destination."""
        with told(instance.uuid):
            self.core.live_migration_force_complete(instance)

    def rollback_live_migration_at_destination(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_device_info: Any,
        destroy_disks: bool = True,
        migrate_data: Any = None,
        **_: Any,
    ) -> None:
        """Await it no more, and remove what was made for it here, and nothing else."""
        with told(instance.uuid):
            self.core.rollback_live_migration_at_destination(context, instance)

    def post_live_migration(
        self,
        context: Any,
        instance: Any,
        block_device_info: Any,
        migrate_data: Any = None,
        **_: Any,
    ) -> None:
        """Nothing: what was here went when the destination had settled."""

    def post_live_migration_at_source(
        self, context: Any, instance: Any, network_info: Any
    ) -> None:
        """Nothing: libvirt unplugged its ports when its QEMU ended."""

    def post_live_migration_at_destination(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        block_migration: bool | None = False,
        block_device_info: Any = None,
        **_: Any,
    ) -> None:
        """Finish what came here."""
        with told(instance.uuid):
            self.core.post_live_migration_at_destination(
                context, instance, network_info
            )


# Private


def _nothing(*_: object) -> None:
    """Nova is told by who knows its names."""


def _named(data: Any) -> str:
    """Return the destination's name; MigrationPreCheckError of another driver's."""
    found = data.old_vol_attachment_ids if "old_vol_attachment_ids" in data else {}
    if _DEST not in found:
        raise exception.MigrationPreCheckError(
            reason="the destination does not run the virtmigrate driver"
        )
    return str(found[_DEST])
