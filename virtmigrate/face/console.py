# SPDX-License-Identifier: Apache-2.0
"""Consoles: what guests said."""

from typing import Any

from virtmigrate import console
from virtmigrate.face import base


class Consoles(base.Base):
    """Reads the consoles of the instances of one host."""

    def get_console_output(self, context: object, instance: Any, **_: object) -> bytes:
        """Return the newest of what the guest wrote to its first serial port.

        Read on this machine: it has to be the libvirt host itself, and this process
        has to be allowed to read what virtlogd writes. Raises InstanceNotFound; OSError
        where there is no log, or it may not be read.
        """
        self.node.domains.power(instance.uuid)
        return console.tail(console.path(self.node.options.console_path, instance.uuid))
