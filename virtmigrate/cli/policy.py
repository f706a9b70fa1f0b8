# SPDX-License-Identifier: Apache-2.0
"""`instance policy`: how an instance leaves a host that is drained."""

import argparse
from typing import Any

import msgspec

from virtmigrate.cli import command, instances
from virtmigrate.drain import ladder


class Policy(command.ShowOne):
    """Show, or set, how an instance leaves a host that is drained.

    Its words are tried in their order: live (it runs on), postcopy (live, and it always
    ends), cold (shut down, and started there), stop (shut down, and it stays), leave
    (nothing is done). They go with the instance wherever it moves.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument(
            "policy",
            nargs="?",
            type=words,
            metavar="WAY,...",
            help="live, postcopy, cold, stop, leave; or `default` for the host's "
            "drain_policy",
        )
        parser.add_argument(
            "--apart",
            action="append",
            metavar="GROUP",
            help="never with another member of GROUP on one host; repeatable. An empty "
            "one takes it out of all",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            here = session.here().node
            uuid = instances.find(here, parsed_args.instance).uuid
            with here.claimed(uuid):
                record = here.entitled(uuid)
                changes: dict[str, tuple[str, ...]] = {}
                if parsed_args.policy is not None:
                    changes["policy"] = parsed_args.policy
                if parsed_args.apart is not None:
                    changes["apart"] = tuple(sorted(filter(None, parsed_args.apart)))
                if changes:
                    record = msgspec.structs.replace(record, **changes)
                    here.publish_instance(record)
                    here.tenures.amend(record)
            chosen = record.policy or tuple(here.options.drain_policy)
        return command.columns(
            {
                "uuid": record.uuid,
                "name": record.name,
                "policy": ",".join(chosen),
                "of": "the instance" if record.policy else "the host",
                "apart": ",".join(record.apart),
            }
        )


def words(text: str) -> tuple[str, ...]:
    """Read "live,cold"; nothing for `default`."""
    if text == "default":
        return ()
    try:
        return tuple(way.value for way in ladder.read(text.split(",")))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e
