# SPDX-License-Identifier: Apache-2.0
"""The host: its start, what it has, what happens on it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nova import exception
from nova.virt import event as nova_event
from oslo_log import log as logging
from oslo_serialization import jsonutils

from virtmigrate import conf as options
from virtmigrate import driver as core
from virtmigrate import events
from virtmigrate.nova_plugin import base, providers, upload
from virtmigrate.nova_plugin.translation import told

LOG = logging.getLogger(__name__)

OWNER = "nova"
"""Whom instances belong to: the command leaves them to Nova's own commands."""

_EVENTS = {
    events.Kind.STARTED: nova_event.EVENT_LIFECYCLE_STARTED,
    events.Kind.STOPPED: nova_event.EVENT_LIFECYCLE_STOPPED,
    events.Kind.PAUSED: nova_event.EVENT_LIFECYCLE_PAUSED,
    events.Kind.RESUMED: nova_event.EVENT_LIFECYCLE_RESUMED,
}


class Hosts(base.Base):
    """One compute host."""

    capabilities: Any

    def init_host(self, host: str) -> None:
        """Start, and finish what was left undone.

        Raises InvalidConfiguration for options of Nova that would be passed over.
        """
        _demand_options()
        found = self.configuration(host)
        self.uploads = upload.Uploads()
        self.core = core.VirtMigrateDriver(
            self.virtapi, conf=found, images_to=self.uploads
        )
        with told():
            options.register(found)
            found.set_default("owner", OWNER, group=options.GROUP)
            self.core.init_host(host)
        formats = found[options.GROUP].image_formats
        taken = {f"supports_image_type_{name}": name in formats for name in _FORMATS}
        self.capabilities = {**self.capabilities, **taken}

    def cleanup_host(self, host: str) -> None:
        self.core.cleanup_host(host)

    def get_available_nodes(self, refresh: bool = False) -> list[str]:
        return self.core.get_available_nodes(refresh)

    def get_available_resource(self, nodename: str) -> dict[str, Any]:
        with told():
            found = self.core.get_available_resource(nodename)
        arch = found["supported_instances"][0][0]
        cpu = {"arch": arch, "model": found["cpu_info"], "features": []}
        return {**found, "cpu_info": jsonutils.dumps(cpu)}

    def update_provider_tree(
        self, provider_tree: Any, nodename: str, allocations: Any = None
    ) -> None:
        """Tell placement what this host has, and what its backends are."""
        with told():
            resources = self.core.get_available_resource(nodename)
            storage = self.core.storage()
        old = provider_tree.data(nodename).inventory
        ratios = self._get_allocation_ratios(old)  # type: ignore[attr-defined]
        new = providers.inventory(resources, storage, provider_tree, ratios)
        provider_tree.update_inventory(nodename, new)
        providers.set_traits(provider_tree, nodename, storage)

    def get_host_uptime(self) -> str:
        """Return how long the host is up, as `uptime` begins."""
        seconds = float(Path("/proc/uptime").read_text().split()[0])
        days, rest = divmod(int(seconds), 86400)
        clock = f"{rest // 3600:2d}:{rest % 3600 // 60:02d}"
        return f" {time.strftime('%H:%M:%S')} up {days} days, {clock}"

    def plug_vifs(self, instance: Any, network_info: Any) -> None:
        """Nothing: libvirt plugs them when the guest starts."""

    def unplug_vifs(self, instance: Any, network_info: Any) -> None:
        """Nothing: libvirt unplugs them when the guest stops."""

    def register_event_listener(self, callback: Callable[[Any], object] | None) -> None:
        """Tell of changes of the guests' states; None ends it."""
        super().register_event_listener(callback)  # type: ignore[misc]
        if callback is None:
            self.core.stop_events()
        else:
            self.core.register_event_listener(self._tell)

    # Private

    def _tell(self, event: events.Event) -> None:
        told_as = nova_event.LifecycleEvent(event.uuid, _EVENTS[event.kind])
        self.emit_event(told_as)  # type: ignore[attr-defined]


# Private

_FORMATS = ("raw", "iso", "qcow2", "vmdk", "vdi", "vhd", "vhdx")


def _demand_options() -> None:
    conf = base.CONF
    refused = {
        "[DEFAULT]config_drive_format=vfat": conf.config_drive_format == "vfat",
        "[compute]cpu_dedicated_set": conf.compute.cpu_dedicated_set,
        "[compute]cpu_shared_set": conf.compute.cpu_shared_set,
        "[pci]device_spec": conf.pci.device_spec,
        "[devices]enabled_mdev_types": conf.devices.enabled_mdev_types,
        "[serial_console]enabled": conf.serial_console.enabled,
        "[ephemeral_storage_encryption]enabled": (
            conf.ephemeral_storage_encryption.enabled
        ),
    }
    found = [name for name, value in refused.items() if value]
    if found:
        raise exception.InvalidConfiguration(
            message=f"the virtmigrate driver does not do {', '.join(found)}: unset it"
        )
