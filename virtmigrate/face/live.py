# SPDX-License-Identifier: Apache-2.0
"""Live migration, by Nova's names. A live move has one driver: the source's."""

from collections.abc import Callable, Mapping
from typing import Any

from virtmigrate import errors
from virtmigrate.face import base
from virtmigrate.livemigration import Options


class Live(base.Base):
    """Moves running instances to other hosts and takes what comes."""

    def check_can_live_migrate_destination(
        self,
        context: object,
        instance: Any,
        src_compute_info: object,
        dst_compute_info: object,
        block_migration: bool = False,
        disk_over_commit: bool = False,
        **_: object,
    ) -> dict[str, str]:
        """Say where this host is reached; the source checks all else."""
        return {"dest": self.node.name}

    def check_can_live_migrate_destination_cleanup(
        self, context: object, dest_check_data: object
    ) -> None:
        """Nothing: the check leaves nothing."""

    def check_can_live_migrate_source(
        self,
        context: object,
        instance: Any,
        dest_check_data: Mapping[str, str],
        block_device_info: object = None,
        **_: object,
    ) -> dict[str, str]:
        """Raise MigrationRefused with the reason, if it cannot be moved there."""
        dest = dest_check_data["dest"]
        found = self.live.forecast(instance.uuid, dest)
        if found.obstacles:
            raise errors.MigrationRefused(
                instance=instance.uuid, reason="; ".join(found.obstacles)
            )
        return {**dest_check_data, "source": self.node.name}

    def pre_live_migration(
        self,
        context: object,
        instance: Any,
        block_device_info: object = None,
        network_info: object = None,
        disk_info: object = None,
        migrate_data: Any = None,
        **_: object,
    ) -> Any:
        """Let the source bring the instance here."""
        self.live.arrivals.allow(instance.uuid)
        return migrate_data

    def live_migration(
        self,
        context: Any,
        instance: Any,
        dest: str,
        post_method: Callable[..., object],
        recover_method: Callable[..., object],
        block_migration: bool = False,
        migrate_data: Any = None,
        **_: object,
    ) -> None:
        """Move it; call one of the two methods when that is over.

        `recover_method` when it runs here as before, `post_method` when it runs
        there. Neither where that is not known: MigrationUndecided is raised, and a
        settle ends it when the peer answers.
        """
        request = str(getattr(context, "request_id", None) or "-")
        try:
            self.live.migrate(
                instance.uuid, dest, Options(request=request), self._progress()
            )
        except errors.MigrationUndecided:
            raise
        except (errors.Error, errors.Cancelled):
            recover_method(context, instance, dest, migrate_data)
            raise
        post_method(context, instance, dest, block_migration, migrate_data)

    def live_migration_abort(self, instance: Any) -> None:
        """End it; the guest goes on here. InvalidState without one."""
        self.live.abort(instance.uuid)

    def live_migration_force_complete(self, instance: Any) -> None:
        """Pause the guest, so that what is left ends."""
        self.live.force(instance.uuid)

    def post_live_migration(
        self,
        context: object,
        instance: Any,
        block_device_info: object,
        migrate_data: object = None,
        **_: object,
    ) -> None:
        """Nothing: what was here went when the peer had settled."""

    def post_live_migration_at_source(
        self, context: object, instance: Any, network_info: object
    ) -> None:
        """Nothing: interfaces on bridges went with the source's QEMU."""

    def post_live_migration_at_destination(
        self,
        context: object,
        instance: Any,
        network_info: object,
        block_migration: bool = False,
        block_device_info: object = None,
        **_: object,
    ) -> None:
        """Finish what came here; NotEntitled unless this host has it."""
        self.live.arrivals.recover()
        self.node.entitled(instance.uuid)

    def rollback_live_migration(
        self, context: object, instance: Any, **_: object
    ) -> None:
        """See that it is what it was here; MigrationUndecided."""
        self.live.recover()
        self.node.entitled(instance.uuid)

    def rollback_live_migration_at_destination(
        self,
        context: object,
        instance: Any,
        network_info: object = None,
        block_device_info: object = None,
        destroy_disks: bool = True,
        migrate_data: object = None,
        **_: object,
    ) -> None:
        """Remove what was made here for an instance that does not come.

        Disks are never touched that are not of that move.
        """
        self.live.arrivals.disallow(instance.uuid)
        self.live.arrivals.recover()
