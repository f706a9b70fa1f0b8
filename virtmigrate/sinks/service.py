# SPDX-License-Identifier: Apache-2.0
"""The image service of the configuration, as a sink."""

from oslo_config import cfg

from virtmigrate import errors
from virtmigrate.sinks.base import Sink
from virtmigrate.sources.download import Terms


def service_sink(conf: cfg.ConfigOpts, image_id: str, *, is_new: bool) -> Sink:
    """Return an image of the service that is to be filled, by its id.

    Arguments:
        is_new: it is made, too.

    Raises ConfigurationError where no service is configured, or it cannot be used.
    """
    group = conf["virtmigrate"]
    cloud = group.image_service_cloud
    if not cloud:
        raise errors.ConfigurationError(
            reason="no image service is configured (image_service_cloud)"
        )
    try:
        # An extra, and slow to import.
        import openstack

        from virtmigrate.sinks import glance
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
    return glance.GlanceSink(
        connection,
        image_id,
        Terms.configured(conf),
        is_new=is_new,
        answer=group.image_save_answer_timeout,
    )
