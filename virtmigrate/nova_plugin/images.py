# SPDX-License-Identifier: Apache-2.0
"""The image cache, as Nova asks for it."""

from typing import Any

from virtmigrate.nova_plugin import base, glance, leftovers
from virtmigrate.nova_plugin.translation import told


class Images(base.Base):
    """Keeps the image caches of one host."""

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
