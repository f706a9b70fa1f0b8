# SPDX-License-Identifier: Apache-2.0
"""`instance migrate`, `confirm` and `revert`: a move, its end and its way back."""

import argparse
import re
import time
import types
from typing import Any

from oslo_log import log as logging

from virtmigrate import errors, model
from virtmigrate.cli import command, display, halves, instances, live, outcome
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.units import GiB, KiB, MiB, TiB

LOG = logging.getLogger(__name__)

DECIDABLE = ("given", "returned", "confirmed")
"""Newest steps of a move's journal that a confirm can end."""

_UNITS = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)


def size(text: str) -> int:
    """Read "20G", "512M" or a count of bytes; the letters are powers of 1024."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 20G or 512M")
    return int(found[1]) * _UNITS[found[2].upper()]


def whole(unit: int, called: str) -> Any:
    """Return a reader of sizes that are whole units."""

    def read(text: str) -> int:
        found = size(text)
        if found % unit or not found:
            raise argparse.ArgumentTypeError(f"{text}: give whole {called}")
        return found

    return read


class Migrate(command.ShowOne):
    """Move an instance to another host, and grow it there if asked.

    A guest that runs is shut down, its disks are copied and proven, and it is
    started on DEST. Before the hand-over any failure, and Ctrl-C, puts it back. An
    interrupted move goes on when the same command is given again. Afterwards
    `instance confirm` removes the copy here, or `instance revert` takes it back.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument("dest", metavar="DEST", help="the peer's name or address")
        mib, gib = whole(MiB, "MiB"), whole(GiB, "GiB")
        parser.add_argument("--memory", type=mib, metavar="SIZE", help="new memory")
        parser.add_argument("--vcpus", type=int, metavar="N", help="new CPU count")
        for role in ("root", "ephemeral"):
            parser.add_argument(
                f"--{role}-size",
                type=gib,
                metavar="SIZE",
                help=f"new size of the {role} disk, whole GiB; disks never shrink",
            )
        parser.add_argument(
            "--timeout",
            type=int,
            metavar="SECONDS",
            help="how long the guest may take to shut down; default: "
            "shutdown_timeout of the configuration. With --live: until it is put back",
        )
        live.add_options(parser)
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        show = display.Display(self.app.stderr)
        work = display.Work(show.show)
        with self.open() as session, display.cancelling(work):
            here = session.here(lambda: work)
            record = instances.find(here.node, parsed_args.instance)
            flavor = _flavor(parsed_args, record)
            instances.demand_ours(
                record,
                "resize" if flavor else "migrate",
                override=parsed_args.unmanaged_override,
            )
            if parsed_args.live or parsed_args.rehearse:
                with show:
                    moved = live.run(here, record, parsed_args, work)
                return command.columns(moved)
            there = session.peer(parsed_args.dest, here)
            work.check()
            with show:
                _Move(here, there, record, work).run(parsed_args, flavor)
            return command.columns(_result(record, here, there, show))


class Confirm(command.ShowOne):
    """End a move: the volumes on this host are removed"""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument(
            "--accept-unproven",
            action="store_true",
            help="even if not all of the copy was compared (verify is not full): a "
            "byte that arrived wrong is then lost",
        )
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            here = session.here()
            record = instances.find(here.node, parsed_args.instance)
            override = parsed_args.unmanaged_override
            instances.demand_ours(record, "confirm", override=override)
            operation, dest, step = _open_move(here, record)
            if step not in DECIDABLE:
                raise _not_waiting(record, operation, f"its newest step is {step}")
            there = session.peer(dest, here)
            here.confirm_migration(
                None, None, record, accept_unproven=parsed_args.accept_unproven
            )
            left = there.settle()
            values = _brief(record, there, operation)
            return command.columns({**values, "left": "; ".join(left)})


class Revert(command.ShowOne):
    """Take an instance back from the host that it was moved to.

    It is removed there, and goes on here from where it was when it left: what it
    wrote there is lost.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument(
            "--off", action="store_true", help="do not start it here, even if it ran"
        )
        parser.add_argument(
            "--peer-is-lost",
            action="store_true",
            help="the peer cannot be asked, and will never run the instance: with a "
            "peer that does, there are two",
        )
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        lost = parsed_args.peer_is_lost
        with self.open() as session:
            here = session.here()
            record = instances.find(here.node, parsed_args.instance)
            override = parsed_args.unmanaged_override
            instances.demand_ours(record, "revert", override=override)
            operation, dest, _step = _open_move(here, record)
            if not lost:
                session.peer(dest, here).give_back(record, operation)
            here.finish_revert_migration(
                None, record, power_on=not parsed_args.off, peer_is_lost=lost
            )
            return command.columns(_brief(record, here, operation))


# Private

Where = VirtMigrateDriver | halves.Half


class _Move:
    """One move, both halves of it."""

    def __init__(
        self,
        here: VirtMigrateDriver,
        there: halves.Half,
        record: model.Instance,
        work: display.Work,
    ) -> None:
        self._here = here
        self._there = there
        self._record = record
        self._work = work

    def run(self, args: argparse.Namespace, flavor: Any) -> None:
        """Move it; NotArrived when it was handed over and is not there yet."""
        waits = self._here.node.options
        ticket = self._here.migrate_disk_and_power_off(
            None,
            self._record,
            args.dest,
            flavor,
            timeout=waits.shutdown_timeout if args.timeout is None else args.timeout,
            retry_interval=waits.shutdown_retry_interval,
        )
        self._work.bound = True
        self._work.phase("starting there")
        try:
            operation, *_ = _open_move(self._here, self._record)
            self._there.finish(self._record, operation, ticket)
        except errors.Error as e:
            raise outcome.NotArrived(
                instance=self._record.uuid, peer=args.dest, reason=e
            ) from e


def _flavor(args: argparse.Namespace, record: model.Instance) -> Any:
    """Return what a resize asks for as the driver takes it, None for a plain move."""
    asked = (args.memory, args.vcpus, args.root_size, args.ephemeral_size)
    if all(value is None for value in asked):
        return None
    memory = args.memory or record.memory
    if memory % MiB:
        raise errors.MigrationRefused(
            instance=record.uuid,
            reason=f"its memory of {memory} bytes is not whole MiB: give --memory, too",
        )
    return types.SimpleNamespace(
        memory_mb=memory // MiB,
        vcpus=args.vcpus or record.vcpus,
        root_gb=(args.root_size or 0) // GiB,
        ephemeral_gb=(args.ephemeral_size or 0) // GiB,
    )


def _open_move(here: VirtMigrateDriver, record: model.Instance) -> tuple[str, str, str]:
    """Return operation, peer and newest step of the instance's move."""
    for operation, uuid, dest, step in here.open_operations():
        if uuid == record.uuid and step not in ("restored", "parked"):
            return operation, dest, step
    raise _not_waiting(record, record.operation, "there is none")


def _not_waiting(
    record: model.Instance, operation: str, reason: str
) -> errors.MigrationError:
    return errors.MigrationError(
        instance=record.uuid,
        operation=operation,
        reason=f"no move of it waits for this ({reason})",
    )


def _brief(record: model.Instance, where: Where, operation: str) -> dict[str, Any]:
    return {
        "uuid": record.uuid,
        "name": record.name,
        "host": where.node.name,
        "state": where.node.domains.power(record.uuid).value,
        "operation": operation,
    }


def _result(
    record: model.Instance,
    here: VirtMigrateDriver,
    there: halves.Half,
    show: display.Display,
) -> dict[str, Any]:
    operation, _dest, _step = _open_move(here, record)
    stopped = show.began.get("stopping")
    downtime = None if stopped is None else round(time.monotonic() - stopped, 1)
    return {
        **_brief(record, there, operation),
        "source": here.node.name,
        "sent": show.last.sent,
        "downtime": downtime,
    }
