# SPDX-License-Identifier: Apache-2.0
"""Images: cached before they are needed, dropped when they are idle."""

from virtmigrate import mapping, sources
from virtmigrate.face import base


class Images(base.Base):
    """Keeps the image caches of one host."""

    def cache_image(
        self, context: object, image_id: str | sources.Source, **_: object
    ) -> bool:
        """Fetch an image of the service before somebody needs it.

        Into all backends of this host; one after the other. False when all had it. A
        caller that has a source of its own gives that.
        """
        if isinstance(image_id, str):
            image_id = mapping.named_image(self._conf, image_id)
        return self.images.seed(image_id, self._progress)

    def manage_image_cache(
        self, context: object, all_instances: object = None, **_: object
    ) -> None:
        """Drop idle images beyond each backend's limits.

        What is in use is what records say; `all_instances` is not asked.
        """
        self.images.tend()
