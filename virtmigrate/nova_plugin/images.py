# SPDX-License-Identifier: Apache-2.0
"""Images of servers, and the image cache, as Nova asks for them."""

from collections.abc import Callable
from typing import Any

from nova import exception

from virtmigrate.nova_plugin import base, glance, leftovers
from virtmigrate.nova_plugin.translation import told


class Images(base.Base):
    """Makes images, and keeps the image caches of one host."""

    def snapshot(
        self,
        context: Any,
        instance: Any,
        image_id: str,
        update_task_state: Callable[..., object],
        **_: Any,
    ) -> None:
        """Fill an image that is queued with a server's root disk; the guest runs on.

        What its own image says of quiescing holds: os_require_quiesce, or
        hw_qemu_guest_agent if it can. On failure the image is deleted, and the guest
        is as it was. What update_task_state raises goes on. Raises InstanceNotRunning,
        Nova's word for one that is not here.
        """
        with told(instance.uuid):
            is_here = self.core.instance_exists(instance)
        if not is_here:
            raise exception.InstanceNotRunning(instance_id=instance.uuid)
        with self.uploads.asked_by(context, image_id), told(instance.uuid):
            self.core.snapshot(context, instance, image_id, update_task_state)

    def manage_image_cache(self, context: Any, all_instances: Any) -> None:
        """Drop idle images beyond each backend's limits, and what failed moves left.

        Nova calls it from time to time, with a context that may ask for servers.
        """
        with told():
            self.core.manage_image_cache(context, all_instances)
        leftovers.remove(self, context)

    def cache_image(self, context: Any, image_id: str) -> bool:
        """Fetch an image before somebody boots it; False when it was there."""
        with told():
            return self.core.cache_image(context, glance.NovaImage(context, image_id))
