# SPDX-License-Identifier: Apache-2.0
"""What each part of the plug-in stands on."""

from typing import Any

import nova.conf
from oslo_config import cfg

from virtmigrate import driver as core
from virtmigrate.nova_plugin import upload

CONF = nova.conf.CONF


class Base:
    """Holds the driver that does the work."""

    core: core.VirtMigrateDriver
    """Ours, from init_host on; it knows nothing of Nova."""
    uploads: upload.Uploads
    """Where images of servers go."""
    virtapi: Any

    def configuration(self, host: str) -> cfg.ConfigOpts:
        """Return the configuration of a host: nova.conf, with its [virtmigrate]."""
        assert isinstance(CONF, cfg.ConfigOpts)
        return CONF
