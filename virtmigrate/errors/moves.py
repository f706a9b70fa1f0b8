# SPDX-License-Identifier: Apache-2.0
"""Instances on their way."""

from virtmigrate.errors.base import Error


class MigrationError(Error):
    msg = "moving instance {instance} ({operation}): {reason}"


class MigrationRefused(MigrationError):
    """A check failed; nothing was touched, the instance runs as before."""

    msg = "moving instance {instance} is refused: {reason}. Nothing was touched"


class MigrationRolledBack(MigrationError):
    """The move failed before the hand-over and everything was put back.

    The instance is on the source, in the state that it was in. `debts` says
    what could not be removed at the peer yet; it is removed later.
    """

    msg = (
        "moving instance {instance} ({operation}) failed and was rolled back: "
        "{reason}. The instance is {state} on {host} again{debts}"
    )


class MigrationUndecided(MigrationError):
    """The hand-over began, and the peer cannot be asked how it ended."""

    msg = (
        "moving instance {instance} ({operation}): the peer {peer} cannot be asked "
        "whether it took the instance ({reason}). It is started nowhere until the "
        "peer answers; this is tried again at every start and by "
        "`virtmigrate host settle`"
    )


class NotConfirmable(MigrationError):
    msg = (
        "confirming the move of instance {instance} ({operation}) is refused: "
        "{reason}. The source's volumes were kept"
    )


class NotRevertible(MigrationError):
    msg = "reverting the move of instance {instance} ({operation}): {reason}"


class TicketDamaged(MigrationError):
    msg = "the migration string is damaged ({reason}); nothing was touched"
