# SPDX-License-Identifier: Apache-2.0
"""`receiver`: the help that sources of moves find on this host."""

import argparse
import contextlib
import signal
import threading
import types
from collections.abc import Iterator

from virtmigrate import address, errors, receiver
from virtmigrate.cli import command
from virtmigrate.migration import target

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Receiver(command.Plain):
    """Prove and prepare what other hosts send here, until SIGTERM or SIGINT.

    Needed where no driver runs, or where its option `receiver` is off. A second one
    on the same host stands by.
    """

    def take_action(self, parsed_args: argparse.Namespace) -> None:
        with self.open() as session, _stopped_by_signals() as stop:
            here = session.look()
            if not address.parse(here.options.uri).is_local:
                raise errors.ConfigurationError(
                    reason=f"uri = {here.options.uri}: a receiver runs on its host"
                )
            here.ensure()
            actions = target.Target(here).actions()
            receiver.Receiver(here, actions=actions).serve(stop)


# Private


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """Yield an event that the first signal sets; the second one does as ever."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def end(_number: int, _frame: types.FrameType | None) -> None:
        restore()
        stop.set()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in _SIGNALS:
        signal.signal(number, end)
    try:
        yield stop
    finally:
        restore()
