# SPDX-License-Identifier: Apache-2.0
"""`storage check` and `storage upgrade`."""

import argparse
from typing import Any

from virtmigrate import consistency, errors, upgrade
from virtmigrate.cli import command, outcome


class Check(command.Lister):
    """Show what of this host's pools, records, journals and domains does not fit.

    Ends with 1 when something is left. With --repair what a record, a journal or a
    transfer says is this host's, and of no use any more, is put right.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--repair",
            action="store_true",
            help="remove half-made volumes of operations that are over, prune old "
            "generations, drop expired holds; all else stays",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            found = consistency.check(session.look())
            done = [(each, "") for each in found]
            if parsed_args.repair:
                done = consistency.repair(found)
        if any(not said for _, said in done):
            self.code = outcome.Outcome.FAILED
        rows = [(f.backend, f.kind.value, f.name, f.detail, said) for f, said in done]
        return ("backend", "finding", "name", "detail", "done"), rows


class Upgrade(command.Lister):
    """Make the layout of this host's backends the one of this release.

    Stop the services of all hosts that have the backend first. Can be called again
    after a failure.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--dry-run", action="store_true", help="only say what would be done"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        act = upgrade.plan if parsed_args.dry_run else upgrade.run
        with self.open() as session:
            here = session.look()
            with here.locks.only("upgrade") as is_ours:
                if not is_ours:
                    raise errors.ConfigurationError(
                        reason=f"an upgrade runs on {here.name} already"
                    )
                plans = [act(backend) for backend in here.backends.values()]
        rows = [(p.backend, _said(p, dry=parsed_args.dry_run)) for p in plans]
        return ("backend", "result"), rows


# Private


def _said(plan: upgrade.Plan, *, dry: bool) -> str:
    if plan.version is None:
        return "not made yet"
    if not plan.steps:
        return f"layout {plan.version} is current"
    return f"{'would become' if dry else 'became'} layout {plan.steps[-1]}"
