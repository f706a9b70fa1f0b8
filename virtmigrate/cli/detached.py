# SPDX-License-Identifier: Apache-2.0
"""`snapshot detached`."""

import argparse
from typing import Any

from virtmigrate.cli import command, instances


class Detached(command.Lister):
    """Show the disks that reverts took from an instance, or remove one for good.

    A revert to a checkpoint detaches disks that were added since. Their volumes stay,
    and keep the instance from being moved.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument(
            "--remove",
            metavar="TARGET|VOLUME",
            help="remove this one, and all that it holds; there is no way back. By its "
            "volume where several had the same target",
        )
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            if parsed_args.remove is None:
                here = session.look()
                left = instances.find(here, parsed_args.instance).detached
            else:
                driver = session.here()
                record = instances.find(driver.node, parsed_args.instance)
                override = parsed_args.unmanaged_override
                instances.demand_ours(record, "snapshot", override=override)
                driver.snapshots.give_up(record.uuid, parsed_args.remove)
                left = driver.snapshots.detached(record.uuid)
        rows = [(ref.target, ref.volume, ref.backend, ref.role.value) for ref in left]
        return ("target", "volume", "backend", "role"), rows
