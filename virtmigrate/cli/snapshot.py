# SPDX-License-Identifier: Apache-2.0
"""`snapshot list | show | create | revert | branch | delete`."""

import abc
import argparse
import datetime
import getpass
from dataclasses import dataclass
from typing import Any

from oslo_log import log as logging

from virtmigrate import node, peers, progress, snapshot, snapshottree
from virtmigrate.cli import command, display, instances, snapshots, tree
from virtmigrate.instance import Power
from virtmigrate.migration import source
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted, limits
from virtmigrate.snapshottree import Taken

LOG = logging.getLogger(__name__)


class _Tree(command.Lister):
    """A command that shows a tree: a picture in the table, rows in other formats."""

    def tree(
        self,
        parsed_args: argparse.Namespace,
        found: snapshottree.Snapshots,
        current: str | None,
    ) -> Any:
        if parsed_args.formatter != "table":
            columns = snapshots.COLUMNS + snapshots.MORE
            return columns, snapshots.rows(found, current)
        marks = tree.marks_for(getattr(self.app.stdout, "encoding", None))
        return snapshots.COLUMNS, snapshots.drawn(found, current, marks)


class List(_Tree):
    """Show an instance's snapshots as a tree; "(now)" is what its disks went on to.

    Other formats than the table have one row for each snapshot, in the order of
    their making.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            here = session.look()
            record = instances.find(here, parsed_args.instance)
            for said in limits.slow(here, record):
                LOG.warning("%s", said)
        return self.tree(parsed_args, record.snapshots, record.current)


class Show(command.ShowOne):
    """Show all that is recorded of a snapshot, and the room that it takes."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        _add_snapshot(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            here = session.look()
            record = instances.find(here, parsed_args.instance)
            found = snapshots.everything(here, record, parsed_args.snapshot)
        return command.columns(found)


@dataclass(frozen=True)
class _Task:
    """What one command works on."""

    here: node.Node
    known: snapshot.Snapshots
    uuid: str
    args: argparse.Namespace

    @property
    def power(self) -> Power:
        return self.here.domains.power(self.uuid)


class _Change(_Tree):
    """A command that changes an instance's snapshots, or says how it would."""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        command.add_instance(parser)
        self.add_arguments(parser)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="only show what would be done, to which layers",
        )
        command.add_override(parser)
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        if parsed_args.dry_run:
            return self._steps(parsed_args)
        override = parsed_args.unmanaged_override
        with self.open() as session, display.working(self.app.stderr) as work:
            here = session.here()
            record = instances.find(here.node, parsed_args.instance)
            instances.demand_ours(record, "snapshot", override=override)
            work.check()
            task = _Task(here.node, here.snapshots, record.uuid, parsed_args)
            self.change(task, work)
            return self.tree(parsed_args, *here.snapshots.all(record.uuid))

    @abc.abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what this command is told beside the instance."""

    @abc.abstractmethod
    def plan(self, task: _Task) -> list[snapshot.Step]:
        """Return what change() would do."""

    @abc.abstractmethod
    def change(self, task: _Task, work: progress.Progress) -> None:
        """Do it."""

    # Private

    def _steps(self, parsed_args: argparse.Namespace) -> Any:
        with self.open() as session:
            here = session.look()
            uuid = instances.find(here, parsed_args.instance).uuid
            moves = source.Source(here, peers.Peers(here).get)
            known = snapshot.Snapshots(here, moves.demand_none)
            task = _Task(here, known, uuid, parsed_args)
            steps = self.plan(task)
        return ("step", "of", "how"), [(s.what, s.where, s.how) for s in steps]


class Create(_Change):
    """Take a snapshot, and show the tree.

    A disk snapshot keeps the disks; a checkpoint the configuration, too, and the
    memory of a guest that is not off. After a failure, or Ctrl-C, all is as before.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="NAME", help="what it is to be called")
        parser.add_argument(
            "--checkpoint",
            action="store_true",
            help="configuration and memory come back with it, too",
        )
        parser.add_argument(
            "--memory",
            choices=[each.value for each in Memory],
            help="where the memory is kept; with anything but none it is a "
            "checkpoint. Default: none for a disk snapshot or a guest that is off; "
            "internal for a checkpoint with an internal disk, else external",
        )
        _add_disks(parser)
        parser.add_argument(
            "--quiesce",
            action="store_true",
            help="have the guest's agent freeze the file systems, or fail",
        )
        parser.add_argument("--description", default="", metavar="TEXT")
        parser.add_argument(
            "--automatic",
            action="store_true",
            help="it may be deleted where chains get too deep (flatten_chain)",
        )
        _add_layer(parser)
        parser.add_argument(
            "--timeout",
            type=float,
            default=Wanted.timeout,
            metavar="SECONDS",
            help="how long the writing of memory may take; default: %(default)g",
        )

    def plan(self, task: _Task) -> list[snapshot.Step]:
        return task.known.plan_create(task.uuid, wanted(task.args, task.power))

    def change(self, task: _Task, work: progress.Progress) -> None:
        task.known.create(task.uuid, wanted(task.args, task.power), work)


class Revert(_Change):
    """Go back to a snapshot, and show the tree.

    What the disks got since the last snapshot is lost, unless --keep is given; the
    other snapshots stay, unless --delete-children is. Disks that a checkpoint did
    not have are detached; their volumes stay and are named.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_snapshot(parser)
        parser.add_argument(
            "--delete-children",
            action="store_true",
            help="first delete all that was taken after it, the last ones first",
        )
        parser.add_argument(
            "--keep",
            default="",
            metavar="NAME",
            help="make a snapshot of what there is now, in the same step",
        )
        _add_return(parser)

    def plan(self, task: _Task) -> list[snapshot.Step]:
        return task.known.plan_revert(task.uuid, back(task.args))

    def change(self, task: _Task, work: progress.Progress) -> None:
        for ref in task.known.revert(task.uuid, back(task.args), work):
            LOG.warning(
                "%s was detached: its volume %s in backend %s stays until the "
                "instance goes",
                ref.target,
                ref.volume,
                ref.backend,
            )


class Branch(Revert):
    """Go on from a snapshot beside what was taken after it, and show the tree.

    It is a revert that loses nothing: what there is now becomes a snapshot in the same
    step, to go back to.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_snapshot(parser)
        parser.set_defaults(delete_children=False)
        parser.add_argument(
            "--keep",
            default=f"kept-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}",
            metavar="NAME",
            help="what that snapshot is called; default: by the time, as %(default)s",
        )
        _add_return(parser)


class Delete(_Change):
    """Delete a snapshot, and show the tree.

    What was taken after it stays, and so does what the guest has now. Layers that
    nothing needs any more are merged or removed; the guest runs on.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_snapshot(parser)
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "--children",
            action="store_true",
            help="and all that was taken after it, the last ones first",
        )
        which.add_argument(
            "--only-children",
            action="store_true",
            help="what was taken after it, and not itself",
        )

    def plan(self, task: _Task) -> list[snapshot.Step]:
        return task.known.plan_delete(
            task.uuid, task.args.snapshot, **doomed(task.args)
        )

    def change(self, task: _Task, work: progress.Progress) -> None:
        task.known.delete(
            task.uuid, task.args.snapshot, **doomed(task.args), progress=work
        )


def placed(text: str) -> tuple[str, Place]:
    """Read "vda=external"."""
    target, _, place = text.partition("=")
    known = [each.value for each in Place]
    if not target or place not in known:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write TARGET=PLACE, the place one of {', '.join(known)}"
        )
    return target, Place(place)


def wanted(args: argparse.Namespace, power: Power) -> Wanted:
    """Return the snapshot that is asked for, of a guest in this state."""
    places = dict(args.place)
    memory = Memory(args.memory or Memory.NONE)
    if args.memory is None and args.checkpoint and power is not Power.OFF:
        is_inside = Place.INTERNAL in places.values()
        memory = Memory.INTERNAL if is_inside else Memory.EXTERNAL
    is_checkpoint = args.checkpoint or memory is not Memory.NONE
    return Wanted(
        name=args.name,
        kind=Kind.CHECKPOINT if is_checkpoint else Kind.DISK,
        memory=memory,
        places=places,
        left_out=frozenset(args.leave_out),
        quiesce=args.quiesce,
        layer=args.layer,
        description=args.description,
        automatic=args.automatic,
        by=getpass.getuser(),
        timeout=args.timeout,
    )


def back(args: argparse.Namespace) -> Return:
    """Return the way back that is asked for."""
    return Return(
        args.snapshot,
        power=args.power,
        configuration=args.configuration,
        delete_children=args.delete_children,
        keep=args.keep,
        layer=args.layer,
        by=getpass.getuser(),
    )


def doomed(args: argparse.Namespace) -> dict[str, bool]:
    """Return what is to be deleted, as Snapshots.delete() takes it."""
    children = args.children or args.only_children
    return {"children": children, "itself": not args.only_children}


# Private


def _add_snapshot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="its name or id")


def _add_disks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--place",
        action="append",
        default=[],
        type=placed,
        metavar="TARGET=PLACE",
        help="where a disk's state is kept: internal (in its qcow2 volume), external "
        "(below a new layer) or own (by the backend itself); default: external where "
        "the backend has layers, else own; repeatable",
    )
    parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="TARGET",
        help="a disk that is not frozen; repeatable",
    )


def _add_return(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--power",
        choices=[each.value for each in Taken],
        default="",
        help="what the guest is to be afterwards; default: as at the checkpoint, or "
        "for a disk snapshot as it is now",
    )
    parser.add_argument(
        "--configuration",
        action=argparse.BooleanOptionalAction,
        help="bring the configuration back; default: that of a checkpoint",
    )
    _add_layer(parser)


def _add_layer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer",
        default="",
        metavar="NAME",
        help="the first part of the names of new layers; default: the disk's target",
    )
