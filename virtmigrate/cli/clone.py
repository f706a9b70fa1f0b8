# SPDX-License-Identifier: Apache-2.0
"""`clone create | list | report | detach`."""

import argparse
import types
import uuid as uuids
from typing import Any

from virtmigrate import census, errors
from virtmigrate.cli import command, display, instances

_COLUMNS = ("uuid", "name", "source", "kind", "state", "power", "not unique")


class Create(command.Lister):
    """Make clones of an instance, on its host; it goes on.

    A running one is cloned with its memory, where enable_live_clone says so. Clones
    stay off every network until they are proven to be somebody else. One that is off
    is cloned as it is, and its clones are off.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument(
            "names", metavar="NAME", nargs="+", help="what the clones are called"
        )
        parser.add_argument(
            "--risk",
            action="append",
            default=[],
            metavar="WHAT",
            help="go on although this is not made unique in the guests, as `agent`; "
            "such clones run, and stay off the network; can be given again",
        )
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        override = parsed_args.unmanaged_override
        with self.open() as session, display.working(self.app.stderr) as work:
            here = session.here(lambda: work)
            record = instances.find(here.node, parsed_args.instance)
            instances.demand_ours(record, "clone", override=override)
            new = [
                types.SimpleNamespace(uuid=str(uuids.uuid4()), name=name)
                for name in parsed_args.names
            ]
            outcomes = here.clone(
                None,
                types.SimpleNamespace(uuid=record.uuid),
                new,
                risk=parsed_args.risk,
            )
            names = {each.uuid: each.name for each in new}
        columns = ("uuid", "name", "state", "reason")
        return columns, [
            (
                each.uuid,
                names[each.uuid],
                each.state.value if each.state else "failed",
                each.reason,
            )
            for each in outcomes
        ]


class List(command.Lister):
    """Show the clones of this host, and what they were made of.

    "ready" is proven to be somebody else; "apart" runs, and reaches no network; "being
    made" was cut short, and settling takes it away.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            here = session.look()
            found = census.records(here)
            rows = []
            for record in found.values():
                if record.cloned is None:
                    continue
                cloned, source = record.cloned, found.get(record.cloned.source)
                try:
                    power = here.domains.power(record.uuid).value
                except errors.InstanceNotFound:
                    power = "no domain"
                rows.append(
                    (
                        record.uuid,
                        record.name,
                        source.name if source else cloned.source,
                        "live" if cloned.live else "off",
                        cloned.state.value,
                        power,
                        ", ".join(cloned.unproven),
                    )
                )
        return _COLUMNS, sorted(rows, key=lambda row: row[1])


class Report(command.ShowOne):
    """Show what was done to make a clone somebody else, and what was read back."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            here = session.look()
            record = instances.find(here, parsed_args.instance)
        if record.cloned is None:
            raise errors.CloneError(
                instance=record.uuid, host=here.name, reason="it is no clone"
            )
        cloned = record.cloned
        return command.columns(
            {
                "uuid": record.uuid,
                "source": cloned.source,
                "operation": cloned.operation,
                "kind": "live" if cloned.live else "off",
                "state": cloned.state.value,
                "not unique": ", ".join(cloned.unproven),
                "report": cloned.report,
                **{f"identity {name}": value for name, value in cloned.identities},
            }
        )


class Detach(command.Plain):
    """Give a clone all that it has of other instances' volumes; it runs on.

    Copies what it stands on into its own layers. Can be repeated after any failure.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        override = parsed_args.unmanaged_override
        with self.open() as session, display.working(self.app.stderr) as work:
            here = session.here(lambda: work)
            record = instances.find(here.node, parsed_args.instance)
            instances.demand_ours(record, "detach", override=override)
            here.detach_clone(None, types.SimpleNamespace(uuid=record.uuid))
