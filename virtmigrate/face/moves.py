# SPDX-License-Identifier: Apache-2.0
"""Cold moves: out, in, confirmed, taken back, taken over."""

from typing import Any

from virtmigrate import mapping, takeover
from virtmigrate.face import base


class Moves(base.Base):
    """Moves instances to other hosts and takes what comes."""

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

    def has_open_move(self, uuid: str) -> bool:
        """Tell whether a move of the instance away from this host is not over."""
        return any(instance == uuid for _, instance, _, _ in self.open_operations())
