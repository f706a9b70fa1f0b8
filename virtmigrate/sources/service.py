# SPDX-License-Identifier: Apache-2.0
"""The image service of the configuration."""

from oslo_config import cfg

from virtmigrate import errors
from virtmigrate.sources.base import Source
from virtmigrate.sources.download import Terms


def service_image(conf: cfg.ConfigOpts, image_id: str) -> Source:
    """Return an image of the service, by its id.

    Raises ImageUnavailable where no service is configured, ConfigurationError where
    it cannot be used.
    """
    cloud = conf["virtmigrate"].image_service_cloud
    if not cloud:
        raise errors.ImageUnavailable(
            image=image_id,
            reason="it has no path, and no url with a checksum; no image service is "
            "configured (image_service_cloud)",
        )
    try:
        # An extra, and slow to import.
        import openstack

        from virtmigrate.sources import glance
    except ImportError as e:
        raise errors.ConfigurationError(
            reason=f"image_service_cloud needs the extra `glance`: {e}"
        ) from e
    try:
        connection = openstack.connect(cloud=cloud)
    except openstack.exceptions.SDKException as e:
        raise errors.ConfigurationError(
            reason=f"image_service_cloud = {cloud}: {e}"
        ) from e
    return glance.GlanceImage(connection, image_id, Terms.configured(conf))
