# SPDX-License-Identifier: Apache-2.0
"""`image save`: an instance's disks become images."""

import argparse
import getpass
import uuid as uuids
from pathlib import Path
from typing import Any

from virtmigrate import errors, livesnapshot, node
from virtmigrate.cli import command, display, instances
from virtmigrate.livesnapshot import Kind, Quiesce, Target, Wanted
from virtmigrate.units import MiB

COLUMNS = (
    "disk",
    "image",
    "format",
    "size",
    "virtual size",
    "consistency",
    "digest",
)


class Save(command.Lister):
    """Make an image of an instance, which goes on, and show what it became.

    Of its root disk, as it is at one moment. Of a failure, or Ctrl-C, no image is left,
    and the guest is as before.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument(
            "--to",
            required=True,
            metavar="file:PATH|glance:NAME|cache:BACKEND",
            help="a file of this host that is not there yet; a new image of the image "
            "service; an image in a backend's cache, which is pinned there",
        )
        parser.add_argument(
            "--disk-format",
            dest="image_format",
            metavar="raw|qcow2",
            choices=["raw", "qcow2"],
            help="default: image_save_format, or raw for a cache",
        )
        parser.add_argument(
            "--compress",
            action="store_true",
            default=None,
            help="a smaller qcow2 image, after some time; default: image_save_compress",
        )
        _add_disks(parser)
        _add_limits(parser)
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        target = parsed_target(parsed_args.to)
        override = parsed_args.unmanaged_override
        with self.open() as session, display.working(self.app.stderr) as work:
            here = session.here()
            record = instances.find(here.node, parsed_args.instance)
            instances.demand_ours(record, "image save", override=override)
            asked = wanted(here.node, target, record.name, parsed_args)
            saved = here.saves.save(record.uuid, asked, work)
        return COLUMNS, [_row(each) for each in saved]


def parsed_target(text: str) -> Target:
    """Return what --to names. Raises ConfigurationError when that is nothing."""
    kind, _, where = text.partition(":")
    if kind not in [each.value for each in Kind] or not where:
        raise errors.ConfigurationError(
            reason=f"--to {text}: file:PATH, glance:NAME or cache:BACKEND"
        )
    if kind == Kind.FILE.value:
        path = Path(where).absolute()
        return Target(kind=Kind.FILE, where=str(path), name=path.name)
    if kind == Kind.SERVICE.value:
        return Target(kind=Kind.SERVICE, where=str(uuids.uuid4()), name=where)
    return Target(kind=Kind.CACHE, where=where, name="")


def wanted(
    here: node.Node, target: Target, name: str, parsed_args: argparse.Namespace
) -> Wanted:
    """Return what the options ask for."""
    options = here.options
    is_cache = target.kind is Kind.CACHE
    default = "raw" if is_cache else options.image_save_format
    fmt = parsed_args.image_format or default
    compress = parsed_args.compress
    if compress is None:
        compress = options.image_save_compress and fmt == "qcow2"
    bandwidth, timeout = parsed_args.bandwidth, parsed_args.timeout
    if bandwidth is None:
        bandwidth = options.image_save_bandwidth_mib
    named = Target(
        kind=target.kind,
        where=target.where,
        name=name if is_cache else target.name,
        is_new=target.is_new,
    )
    return Wanted(
        target=named,
        format=fmt,
        compress=compress,
        all_disks=parsed_args.all_disks,
        quiesce=Quiesce.DEMAND if parsed_args.quiesce else Quiesce.NO,
        trim=parsed_args.trim,
        keep_layer=parsed_args.keep_layer,
        bandwidth=int(bandwidth * MiB),
        timeout=float(timeout if timeout is not None else options.image_save_timeout),
        by=getpass.getuser(),
    )


# Private


def _add_disks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all-disks",
        action="store_true",
        help="one image of each disk that it writes to; the others are called after "
        "the first one and their disk",
    )
    parser.add_argument(
        "--quiesce",
        action="store_true",
        help="have the guest's agent freeze the file systems, or fail",
    )
    parser.add_argument(
        "--trim",
        action="store_true",
        help="first have the agent discard what the file systems do not use: what was "
        "deleted in the guest is in the image otherwise",
    )
    parser.add_argument(
        "--keep-layer",
        action="store_true",
        help="keep the frozen disks, as a snapshot of the instance",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bandwidth",
        type=_positive,
        metavar="MIB",
        help="MiB per second; default: image_save_bandwidth_mib",
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help="for all of it; default: image_save_timeout",
    )


def _positive(text: str) -> float:
    number = float(text)
    if number <= 0:
        raise ValueError(text)
    return number


def _row(saved: livesnapshot.Saved) -> tuple[Any, ...]:
    return (
        saved.disk,
        saved.place,
        saved.format,
        saved.size,
        saved.virtual_size,
        saved.consistency,
        saved.digest,
    )
