# SPDX-License-Identifier: Apache-2.0
"""`host check` and `host settle`."""

import argparse
from typing import Any

from virtmigrate import check
from virtmigrate.cli import command, outcome


class Check(command.Lister):
    """Show what works and what does not on this host, and towards a peer.

    Ends with 1 when something does not work. The remedy stands beside it.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--peer",
            action="append",
            default=[],
            metavar="DEST",
            help="also look at this host as one to move to; repeatable",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            found = check.host(session.conf)
            for dest in parsed_args.peer:
                found += check.peer(session.conf, dest)
        if any(finding.state is check.State.FAILED for finding in found):
            self.code = outcome.Outcome.FAILED
        rows = [(f.what, f.state.value, f.detail, f.remedy) for f in found]
        return ("check", "result", "detail", "remedy"), rows


class Settle(command.Lister):
    """Finish or undo what a failure left on this host; show what remains"""

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            left = session.here().settle()
        if left:
            self.code = outcome.Outcome.FAILED
        rows = [tuple(each.split(": ", 1)) for each in left]
        return ("operation", "reason"), rows
