# SPDX-License-Identifier: Apache-2.0
"""The class that Nova loads.

It holds virtmigrate.driver.VirtMigrateDriver, which does the work. What is here binds
Nova's arguments by name and tolerates more of them: Nova's signatures drift.
docs/nova.md has a table of all methods.
"""

from typing import Any

from nova.virt import driver

from virtmigrate.nova_plugin import guests, hosts, images, live, moves, refused


class VirtMigrateDriver(
    hosts.Hosts,
    guests.Guests,
    moves.Moves,
    live.Live,
    images.Images,
    refused.Refused,
    driver.ComputeDriver,
):
    """Runs the instances of one host for Nova, and moves them without SSH.

    Safe to share between threads. `init_host` comes first.
    """

    capabilities: Any = {  # noqa: RUF012
        **driver.ComputeDriver.capabilities,
        "has_imagecache": True,
        "supports_evacuate": False,
        "supports_migrate_to_same_host": False,
    }

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi)
