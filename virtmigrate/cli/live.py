# SPDX-License-Identifier: Apache-2.0
"""`instance migrate --live`: the guest goes on at the peer."""

import argparse
from typing import Any

from virtmigrate import errors, model
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.livemigration import Forecast, Options
from virtmigrate.progress import Progress
from virtmigrate.units import MiB


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what a live move can be told."""
    group = parser.add_argument_group("with --live")
    group.add_argument(
        "--live",
        action="store_true",
        help="the guest runs on, but for a moment; the peer needs accept_moves",
    )
    group.add_argument(
        "--rehearse",
        action="store_true",
        help="do all but the migration, undo it, and say what it would be",
    )
    group.add_argument(
        "--bandwidth", type=_mib, metavar="MIB", help="MiB per second at most"
    )
    group.add_argument(
        "--downtime",
        type=_seconds,
        metavar="SECONDS",
        help="how long the guest may stand still, to begin with",
    )


def run(
    here: VirtMigrateDriver,
    record: model.Instance,
    args: argparse.Namespace,
    progress: Progress,
) -> dict[str, Any]:
    """Move it, or rehearse that; return the result's columns.

    Raises MigrationRefused, MigrationRolledBack, MigrationUndecided, Cancelled.
    """
    if any((args.memory, args.vcpus, args.root_size, args.ephemeral_size)):
        raise errors.MigrationRefused(
            instance=record.uuid, reason="nothing is resized by a live move"
        )
    if args.rehearse:
        return _columns(record, here.live.rehearse(record.uuid, args.dest, progress))
    options = Options(
        bandwidth=args.bandwidth,
        downtime=args.downtime,
        timeout=None if args.timeout is None else float(args.timeout),
    )
    outcome = here.live.migrate(record.uuid, args.dest, options, progress)
    return {
        "uuid": record.uuid,
        "name": record.name,
        "host": args.dest,
        "source": here.node.name,
        "operation": outcome.operation,
        "sent": outcome.bytes,
        "seconds": round(outcome.seconds, 1),
        "downtime": round(outcome.downtime, 3),
    }


# Private


def _columns(record: model.Instance, found: Forecast) -> dict[str, Any]:
    return {
        "uuid": record.uuid,
        "name": record.name,
        "memory": found.memory,
        "dirty_rate": round(found.dirty_rate),
        "seconds": round(found.seconds, 1),
        "downtime": round(found.downtime, 3),
        "obstacles": "; ".join(found.obstacles),
    }


def _mib(text: str) -> int:
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count of MiB per second")
    return found * MiB


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.001 <= found <= 600:
        raise argparse.ArgumentTypeError(f"{text!r}: give 0.001 to 600 seconds")
    return found
