# SPDX-License-Identifier: Apache-2.0
"""How a command ended, as a script reads it: the exit code.

    0  done
    1  refused, or failed: nothing was changed, or all was put back
    2  wrong usage: unknown command or option
    3  undecided: the instance is between two hosts; the message says what to do
    4  cancelled by a signal, all was put back

A command that reports (`host check`, `host settle`) ends with 1 when something
that it reports is not in order.
"""

import enum

from oslo_log import log as logging

from virtmigrate import errors

LOG = logging.getLogger(__name__)


class Outcome(enum.IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    UNDECIDED = 3
    CANCELLED = 4


class NotArrived(errors.MigrationError):
    """The source gave the instance up, and the peer did not get it going."""

    msg = (
        "moving instance {instance}: it was handed over to {peer}, which could not "
        "finish taking it: {reason}. Its data is whole. Run the same command again "
        "to go on, or `virtmigrate instance revert {instance}` to take it back"
    )


def of(error: BaseException) -> Outcome:
    """Return the exit code for what a command raised."""
    if _was_cancelled(error):
        return Outcome.CANCELLED
    if isinstance(error, errors.MigrationUndecided | NotArrived):
        return Outcome.UNDECIDED
    return Outcome.FAILED


def text(error: BaseException) -> str:
    """Return what went wrong in one message."""
    if not _was_cancelled(error):
        return str(error) or type(error).__name__
    if not isinstance(error, errors.MigrationRolledBack):
        return "cancelled; nothing was touched"
    return (
        f"cancelled: instance {error.instance} is {error.state} on {error.host} "
        f"again{error.debts}"
    )


def tell(error: BaseException, *, debug: bool) -> Outcome:
    """Log the error, with a traceback only for who debugs; return the exit code."""
    LOG.error(text(error), exc_info=error if debug else None)
    return of(error)


# Private


def _was_cancelled(error: BaseException) -> bool:
    if isinstance(error, errors.MigrationRolledBack | errors.MigrationRefused):
        return isinstance(error.__cause__, errors.Cancelled)
    return isinstance(error, errors.Cancelled)
