# SPDX-License-Identifier: Apache-2.0
"""Bytes on their way."""

from virtmigrate.errors.base import Error


class TransferError(Error):
    msg = "copying {volume} to {host}: {reason}"


class ShortTransfer(TransferError):
    pass


class SourceChanged(TransferError):
    msg = (
        "reading {volume}: it changed while it was read ({reason}); what was copied "
        "of it is not used"
    )


class SourceUnreadable(TransferError):
    msg = "reading {volume}: {reason}"


class VerificationFailed(TransferError):
    msg = (
        "copying {volume} to {host}: the copy differs from the source (digest "
        "{found}, expected {expected}); the copy is not used"
    )
