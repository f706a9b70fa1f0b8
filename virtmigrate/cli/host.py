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


class WriteOff(command.ShowOne):
    """Forget what an undone move still owes at a peer that is lost for good.

    Its instance is back here already. What the move left at the peer is not removed
    any more, should that come back; its own driver reclaims it. If another host took
    the instance over this ends its move: what the move made is removed, here and at
    the peer, and no disk of the instance.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "operation", metavar="OPERATION", help="as `host settle` lists it"
        )
        parser.add_argument(
            "--peer-is-lost",
            action="store_true",
            help="the peer cannot be asked, and never comes back: should it, it could "
            "take the instance, and there were two",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            owed = session.here().write_off(
                parsed_args.operation, peer_is_lost=parsed_args.peer_is_lost
            )
        values = {"operation": parsed_args.operation, "owes": owed or "nothing"}
        return command.columns(values)


class Retired(command.Lister):
    """Show, or remove, the volumes of instances that moved away (keep_retired).

    They are proven, never started, and only make a return cheaper.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument(
            "--remove", action="store_true", help="remove those that are shown"
        )
        parser.add_argument(
            "--instance", metavar="UUID", help="only those of this instance"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        rows = []
        with self.open() as session:
            for backend in session.look().backends.values():
                for volume in backend.retired(parsed_args.instance):
                    rows.append((backend.name, volume.name, volume.owner, volume.size))
                    if parsed_args.remove:
                        backend.remove(volume.name)
        return ("backend", "volume", "instance", "bytes"), rows
