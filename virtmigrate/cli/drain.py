# SPDX-License-Identifier: Apache-2.0
"""`host drain`: emptying this host, and bringing back what was on it."""

import argparse
import contextlib
import os
import signal
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from oslo_config import cfg
from oslo_log import log as logging

from virtmigrate import conf as options
from virtmigrate import draining, errors
from virtmigrate.cli import command, display, outcome
from virtmigrate.cli import session as sessions
from virtmigrate.drain import execution, returning, rolling, values
from virtmigrate.drain.mover import Mover
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.units import format_bytes

LOG = logging.getLogger(__name__)

PLAN = (
    "uuid",
    "name",
    "power",
    "policy",
    "way",
    "target",
    "bytes",
    "seconds",
    "downtime",
    "blocked",
)
RESULT = (
    "uuid",
    "name",
    "outcome",
    "way",
    "target",
    "seconds",
    "downtime",
    "sent",
    "tries",
    "reason",
)


class Drain(command.Lister):
    """Empty this host: move its instances to others, and let no new ones come.

    Every instance goes by its policy (see `instance policy`), by default live or not
    at all. Ctrl-C begins no more moves and lets those end that run; a second one puts
    them back. The same command again goes on where one was ended or killed. The host
    takes no new instances until `--stop`. Ends with 0 when all went as it should and
    nothing runs here any more, 1 when something stayed, 3 when an instance is between
    two hosts, 4 when it was cancelled.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "--to",
            nargs="+",
            metavar="HOST",
            help="hosts that instances may go to",
        )
        what.add_argument(
            "--rolling",
            nargs="+",
            metavar="HOST",
            help="empty these hosts in this order, this one when its turn is there: "
            "each goes to those before it, and to --spare",
        )
        what.add_argument(
            "--return",
            dest="back",
            type=Path,
            metavar="FILE",
            help="send those instances back that a drain of another host brought here; "
            "FILE is what its --return-plan wrote",
        )
        what.add_argument(
            "--stop", action="store_true", help="take new instances again; no move"
        )
        parser.add_argument(
            "--spare", metavar="HOST", help="the empty host of --rolling"
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="show what would be done; do nothing"
        )
        parser.add_argument(
            "--rehearse",
            action="store_true",
            help="try each way that the plan may use, with a tiny instance that comes "
            "and goes; nobody else's stands still",
        )
        parser.add_argument(
            "--return-plan", type=Path, metavar="FILE", help="write how all comes back"
        )
        parser.add_argument(
            "--report",
            type=Path,
            metavar="FILE",
            help="write all that is known, as JSON",
        )
        parser.add_argument(
            "--bandwidth",
            type=int,
            metavar="MIB",
            help="MiB per second for all moves together; default: host_bandwidth_mib",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> Any:
        if bool(parsed_args.rolling) != bool(parsed_args.spare):
            raise errors.ConfigurationError(reason="--rolling and --spare go together")
        with self.open() as session:
            if parsed_args.bandwidth:
                _limit(session.conf, parsed_args.bandwidth)
            here = session.here()
            if parsed_args.stop:
                changed = here.stop_draining()
                return ("host", "changed"), [(here.node.name, changed)]
            return self._drain(session, here, parsed_args)

    # Private

    def _drain(
        self,
        session: sessions.Session,
        here: VirtMigrateDriver,
        args: argparse.Namespace,
    ) -> Any:
        only = None
        if args.back:
            back = returning.read(args.back)
            only, names = returning.here(back, here.node.name), [back.host]
        else:
            names = args.to or _turn(here, args.rolling, args.spare)
        if here.node.name in names:
            raise errors.DrainRefused(
                host=here.node.name, reason="it cannot be emptied to itself"
            )
        fars = {name: session.peer(name, here) for name in dict.fromkeys(names)}
        mover = here.libvirt_mover(fars)
        if args.dry_run:
            return self._show_plan(here.drain_plan(mover, only))
        if args.rehearse:
            plan = here.drain_plan(mover, only)
            return self._show_trials(here.rehearse_drain(mover, plan))
        if only is None:
            round_name = rolling.name(args.rolling, args.spare) if args.rolling else ""
            mover.close_host(round_name)
        with here.drain(mover, _tell) as drain, _cancelling(drain):
            report = drain.run(only, lambda report: _keep(report, mover, args))
        self._conclude(report, all_gone=only is None)
        return RESULT, [_result(each) for each in report.results]

    def _show_plan(self, plan: values.Plan) -> Any:
        if plan.blocked:
            self.code = outcome.Outcome.FAILED
        return PLAN, [_line(line) for line in plan.lines]

    def _show_trials(self, trials: Sequence[values.Trial]) -> Any:
        if any(trial.failed for trial in trials):
            self.code = outcome.Outcome.FAILED
        rows = [(t.target, t.way.value, t.seconds, t.failed) for t in trials]
        return ("target", "way", "seconds", "failed"), rows

    def _conclude(self, report: values.Report, *, all_gone: bool) -> None:
        """Say what the host still has, and choose the exit code."""
        good = all(each.outcome in values.GOOD for each in report.results)
        if report.count(values.Outcome.UNDECIDED):
            self.code = outcome.Outcome.UNDECIDED
        elif report.cancelled and not good:
            self.code = outcome.Outcome.CANCELLED
        elif not (report.is_done if all_gone else good):
            self.code = outcome.Outcome.FAILED
        if all_gone:
            for text in report.leftovers.texts():
                LOG.warning("host %s still has %s", report.host, text)
            if report.leftovers.is_empty:
                LOG.warning("host %s is empty", report.host)


# Private


def _limit(conf: cfg.ConfigOpts, mib: int) -> None:
    """Keep all moves together within MiB per second."""
    group = conf[options.GROUP]
    conf.set_override("host_bandwidth_mib", mib, options.GROUP)
    if "live_bandwidth_mib" in group:
        # QEMU limits each guest by itself.
        each = max(1, mib // int(group.drain_concurrency))
        conf.set_override("live_bandwidth_mib", each, options.GROUP)


def _turn(here: VirtMigrateDriver, hosts: Sequence[str], spare: str) -> list[str]:
    """Return where instances go in a round; DrainRefused before this host's turn."""
    name = here.node.name
    try:
        targets = rolling.before(name, hosts, spare)
    except ValueError as e:
        raise errors.DrainRefused(host=name, reason=str(e)) from e
    others = hosts[: hosts.index(name)]
    notes = {other: draining.noted(here.peer(other).mailbox) for other in others}
    if wait := rolling.waits_for(name, hosts, rolling.name(hosts, spare), notes):
        raise errors.DrainRefused(host=name, reason=wait)
    return list(targets)


@contextlib.contextmanager
def _cancelling(drain: execution.Drain) -> Iterator[None]:
    """Let the first signal end the beginning of moves, and the second one the moves."""
    heard: list[int] = []

    def cancel(number: int, frame: types.FrameType | None) -> None:
        heard.append(number)
        drain.cancel(abort=len(heard) > 1)
        text = b"moves that run are being put back, wait\n"
        if len(heard) == 1:
            text = b"no more moves begin; once more to put back those that run\n"
        # Not by a stream: the signal may have interrupted one that is writing.
        with contextlib.suppress(OSError):
            os.write(2, text)

    before = {number: signal.signal(number, cancel) for number in display.SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep(report: values.Report, mover: Mover, args: argparse.Namespace) -> None:
    """Write the files that were asked for, before the drain is forgotten."""
    if args.return_plan:
        returning.write(args.return_plan, returning.of(report, mover))
    if args.report:
        text = msgspec.json.format(msgspec.json.encode(report))
        args.report.write_bytes(text + b"\n")


def _tell(result: values.Result) -> None:
    where = f" {result.target}" if result.target else ""
    why = f": {result.reason}" if result.reason else ""
    sent = f", {format_bytes(result.sent)} sent" if result.sent else ""
    text = f"{result.name} {result.outcome.value}{where}{sent}{why}\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _line(line: values.Line) -> tuple[Any, ...]:
    instance = line.instance
    first = line.rungs[0] if line.rungs else None
    return (
        instance.uuid,
        instance.name,
        instance.power,
        ",".join(way.value for way in instance.policy),
        ",".join(rung.way.value for rung in line.rungs) or None,
        line.target or None,
        first.bytes if first else None,
        first.seconds if first else None,
        first.downtime if first else None,
        line.blocked,
    )


def _result(result: values.Result) -> tuple[Any, ...]:
    return (
        result.uuid,
        result.name,
        result.outcome.value,
        result.way.value if result.way else None,
        result.target or None,
        round(result.seconds, 1),
        result.downtime,
        result.sent,
        result.tries,
        result.reason,
    )
