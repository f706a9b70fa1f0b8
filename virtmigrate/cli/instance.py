# SPDX-License-Identifier: Apache-2.0
"""`instance list`, `instance adopt`, `instance take-over` and `instance transient`."""

import argparse
from typing import Any

from virtmigrate import adopt, domainxml, model, node, scratch, takeover
from virtmigrate.cli import command, instances, moves
from virtmigrate.formats import DiskFormat


class List(command.Lister):
    """Show the instances of this host, and domains that have no record.

    State is the record's: "here" may run here, "away" was handed over, "leaving" is
    in a move, "gone" came here and was given back. What has "no record" can be
    adopted. What guests write to the disks under "transient" goes when they are off.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        columns = (
            "uuid",
            "name",
            "owner",
            "state",
            "power",
            "peer",
            "operation",
            "transient",
        )
        with self.open() as session:
            return columns, sorted(_rows(session.look()), key=lambda row: str(row[1]))


class Adopt(command.Lister):
    """Make records for a domain that something else made.

    Formats and backing chains are taken from the domain's XML where it names them,
    and from --disk where it does not; headers are never read, because a guest may
    have written them. All that is left open is refused and listed at once. The
    domain's configuration then names the full chains.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument(
            "--dry-run", action="store_true", help="show what would be done; do nothing"
        )
        _add_values(parser)
        parser.add_argument(
            "--private-chain",
            action="store_true",
            help="layers below the disks, and CD images, belong to this instance "
            "alone and are removed with it; otherwise they are never removed",
        )
        parser.add_argument(
            "--owner", help="the service that manages it; default: virtmigrate"
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        given = adopt.Given(
            chains=dict(parsed_args.disk),
            sizes=dict(parsed_args.size),
            private_chain=parsed_args.private_chain,
            owner=parsed_args.owner,
        )
        with self.open() as session:
            dry = parsed_args.dry_run
            here = session.look() if dry else session.here().node
            uuid = instances.find_uuid(here, parsed_args.instance)
            made = (
                adopt.plan(here, uuid, given) if dry else adopt.run(here, uuid, given)
            )
        for note in made.notes:
            self.app.LOG.warning("it could not be moved as it is: %s", note)
        columns = ("disk", "volume", "pool", "path", "format", "size", "role", "owner")
        return columns, [_volume_row(volume) for volume in made.volumes]


class TakeOver(command.ShowOne):
    """Take an instance over from a host that is down, and start it here.

    Its disks have to be seen from here, all of them. Where they lie in Ceph, its old
    host is fenced first. Elsewhere somebody has to see that it is down.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.add_argument("uuid", metavar="UUID", help="of the instance")
        parser.add_argument(
            "--host-is-down",
            action="store_true",
            help="its host has stopped for certain, and does not start it again by "
            "itself: with a host that still writes, the disks are destroyed",
        )
        parser.add_argument("--off", action="store_true", help="do not start it")
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        uuid, override = parsed_args.uuid.lower(), parsed_args.unmanaged_override
        with self.open() as session:
            here = session.here()
            record = takeover.recorded(here.node, uuid)
            instances.demand_ours(record, "take over", override=override)
            here.take_over(
                uuid,
                power_on=not parsed_args.off,
                host_is_down=parsed_args.host_is_down,
            )
            values = {
                "uuid": uuid,
                "name": record.name,
                "host": here.node.name,
                "from": record.host,
                "state": here.node.domains.power(uuid).value,
            }
        return command.columns(values)


class Transient(command.ShowOne):
    """Have what the guest writes to a disk thrown away when it is off, or not.

    "on": each start makes a fresh layer over the disk, which takes all that the guest
    writes; a reboot of the guest keeps it, and when the guest is off it is removed. The
    disk itself stays as it is. "off": the guest writes to the disk again. The guest has
    to be off.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        parser.add_argument("target", metavar="TARGET", help="the disk: vda, vdb")
        parser.add_argument("switch", choices=("on", "off"))
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        override, is_on = parsed_args.unmanaged_override, parsed_args.switch == "on"
        with self.open() as session:
            here = session.here()
            record = instances.find(here.node, parsed_args.instance)
            instances.demand_ours(record, "make transient", override=override)
            here.set_transient(record.uuid, parsed_args.target, transient=is_on)
            values = {
                "uuid": record.uuid,
                "name": record.name,
                "disk": parsed_args.target,
                "transient": is_on,
            }
        return command.columns(values)


def chain(text: str) -> tuple[str, tuple[domainxml.Layer, ...]]:
    """Read "vda=qcow2:/path,raw:/base"."""
    target, equals, rest = text.partition("=")
    if not equals or not target:
        raise argparse.ArgumentTypeError(f"{text!r}: write vda=qcow2:/path,raw:/base")
    return target, tuple(_layer(part) for part in rest.split(","))


def labelled_size(text: str) -> tuple[str, int]:
    """Read "vda=20G"."""
    label, equals, rest = text.partition("=")
    if not equals or not label:
        raise argparse.ArgumentTypeError(f"{text!r}: write vda=20G")
    return label, moves.size(rest)


# Private


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the XML leaves open."""
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        type=chain,
        metavar="TARGET=FORMAT:PATH,...",
        help="the whole chain of a disk, top first: vda=qcow2:/a/top,raw:/a/base",
    )
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        type=labelled_size,
        metavar="TARGET=SIZE",
        help="the virtual size of a qcow2 disk: vda=20G; vda[1] is the layer below "
        "it. Needed where no running QEMU tells it",
    )


def _layer(text: str) -> domainxml.Layer:
    fmt, _, path = text.partition(":")
    known = [each.value for each in DiskFormat]
    if fmt not in known or not path.startswith("/"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write FORMAT:/PATH, the format one of {', '.join(known)}"
        )
    return domainxml.Layer(domainxml.SourceType.FILE, path, DiskFormat(fmt))


def _rows(here: node.Node) -> list[tuple[Any, ...]]:
    records = instances.records(here)
    domains = dict(here.domains.all())
    rows = [_row(here, record, domains) for record in records.values()]
    for uuid, name in domains.items():
        if uuid not in records:
            power = here.domains.power(uuid).value
            rows.append((uuid, name, None, "no record", power, None, None, None))
    return rows


def _row(
    here: node.Node, record: model.Instance, domains: dict[str, str]
) -> tuple[Any, ...]:
    power = here.domains.power(record.uuid).value if record.uuid in domains else None
    return (
        record.uuid,
        record.name,
        record.owner,
        record.state.value,
        power,
        record.peer,
        record.operation,
        ",".join(ref.target for ref in scratch.transient(record)) or None,
    )


def _volume_row(volume: adopt.Planned) -> tuple[Any, ...]:
    return (
        volume.label,
        volume.name,
        volume.pool,
        volume.path,
        volume.format.value,
        volume.size,
        volume.role.value,
        volume.owner or "nobody",
    )
