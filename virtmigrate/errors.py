# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, told so that a reader knows what to do.

    Error
    ├── ConfigurationError
    ├── Unsupported
    ├── XmlRefused
    ├── DomainNotUnderstood
    ├── HostError
    │   ├── HostUnreachable
    │   ├── HostTimeout
    │   ├── HostBusy
    │   ├── AuthenticationFailed
    │   ├── CertificateRefused
    │   ├── InsecureConnection
    │   ├── ReceiverSilent, RequestRefused
    │   └── LibvirtFailed
    ├── StorageError
    │   ├── NoBackend, StorageDown, LayoutRefused
    │   ├── PoolNotFound, PoolBusy
    │   ├── VolumeNotFound, VolumeExists, VolumeInUse
    │   ├── LockError
    │   │   └── LockBusy, LockLost
    │   ├── NoSpace
    │   │   └── DiskFull
    │   └── RecordError
    │       ├── RecordMissing, RecordBroken, RecordTooNew
    │       └── RecordConflict
    ├── JournalBroken
    ├── InstanceError
    │   ├── InstanceNotFound, InstanceExists, InstanceBusy
    │   ├── InvalidState
    │   ├── NotEntitled
    │   │   └── HeldElsewhere
    │   ├── TakeOverRefused
    │   └── OwnedElsewhere
    ├── TransferError
    │   ├── ShortTransfer, SourceChanged, SourceUnreadable
    │   └── VerificationFailed
    ├── ImageError
    │   ├── ImageRefused
    │   ├── ImageNotConverted
    │   ├── ImageUnavailable, ImageNotFetched
    │   ├── ImageNotFound, ImageGone, ImageInUse
    │   └── DiskTooSmall
    └── MigrationError
        ├── MigrationRefused
        ├── MigrationRolledBack
        ├── MigrationUndecided
        ├── NotConfirmable, NotRevertible
        └── TicketDamaged
    Cancelled

Cancelled stands beside Error: somebody asked for it, it is no failure.
"""


class Error(Exception):
    """Base of everything that virtmigrate raises on purpose.

    A subclass gives `msg`, a template; keyword arguments fill it and stay
    readable as attributes.
    """

    msg = "{reason}"

    def __init__(self, **details: object) -> None:
        self.details = details
        super().__init__(self.msg.format(**details))

    def __getattr__(self, name: str) -> object:
        details = self.__dict__.get("details", {})
        if name in details:
            return details[name]
        raise AttributeError(name)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.details)


def _rebuild(cls: type[Error], details: dict[str, object]) -> Error:
    return cls(**details)


class Cancelled(Exception):
    """Whoever asked for the work asked for it to stop."""


class ConfigurationError(Error):
    msg = "configuration: {reason}"


class Unsupported(Error):
    msg = "backend {backend} cannot {operation}: {reason}"


class XmlRefused(Error):
    msg = "XML is refused: {reason}"


class DomainNotUnderstood(Error):
    msg = "domain {domain}: {reason}"


# Hosts


class HostError(Error):
    msg = "host {host}: {reason}"


class HostUnreachable(HostError):
    msg = "host {host} cannot be reached: {reason}"


class HostTimeout(HostError):
    msg = (
        "host {host} did not answer within {seconds:g} s while {doing}; "
        "the connection was cut, and what it was doing there is unknown"
    )


class HostBusy(HostError):
    msg = "host {host}: no {what} place became free in {seconds:g} s ({count} in all)"


class AuthenticationFailed(HostError):
    msg = "host {host} does not let us in: {reason}"


class CertificateRefused(HostError):
    msg = "host {host}: certificate refused ({problem}): {reason}"


class InsecureConnection(HostError):
    msg = (
        "host {host}: {reason}. Nothing was sent. Use qemu+tls:// or SASL with "
        "encryption, or name the host in allow_insecure_peers"
    )


class ReceiverSilent(HostError):
    msg = (
        "host {host}: no receiver answered within {seconds:g} s ({doing}); is the "
        "driver or `virtmigrate receiver` running there?"
    )


class RequestRefused(HostError):
    msg = "host {host}: its receiver refused to {verb} {volume}: {reason}"


class LibvirtFailed(HostError):
    """Any error of libvirt that has no name of its own here.

    `code` is VIR_ERR_*, `domain` VIR_FROM_*.
    """

    msg = "host {host}: {doing}: {reason} (libvirt code {code}, domain {domain})"


# Storage


class StorageError(Error):
    msg = "host {host}, pool {pool}: {reason}"


class StorageDown(StorageError):
    msg = (
        "pool {pool} of host {host} did not answer within {seconds:g} s: {reason}. "
        "Other backends are not concerned; try again when its cluster is healthy"
    )


class NoBackend(StorageError):
    msg = "host {host} has no {wanted} for {size}"


class LayoutRefused(StorageError):
    msg = (
        "host {host}, pool {pool}: backend {backend} has layout {version}, and this "
        "release works with {known}{reason}. It was left untouched"
    )


class PoolNotFound(StorageError):
    msg = "host {host} has no storage pool {pool}"


class PoolBusy(StorageError):
    msg = "host {host}: pool {pool} is still busy after {seconds:g} s: {reason}"


class VolumeNotFound(StorageError):
    msg = "host {host}: pool {pool} has no volume {volume}"


class VolumeExists(StorageError):
    msg = "host {host}: pool {pool} already has a volume {volume}"


class VolumeInUse(StorageError):
    msg = (
        "host {host}: volume {volume} in pool {pool} is needed by {users}; it was "
        "left as it is"
    )


class LockError(StorageError):
    msg = "host {host}, backend {backend}: lock {name} cannot be had: {reason}"


class LockBusy(LockError):
    msg = (
        "host {host}, backend {backend}: another operation has the lock {name}, and "
        "did not end within {seconds:g} s. Nothing was done; try again"
    )


class LockLost(LockError):
    msg = (
        "host {host}, backend {backend}: the lock {name} was lost, because it could "
        "not be renewed in time. Another operation may have it; what was not "
        "published under it is given up"
    )


class NoSpace(StorageError):
    msg = (
        "host {host}: pool {pool} has room for {free}, but {wanted} are needed "
        "({reserved} are reserved for other transfers)"
    )


class DiskFull(NoSpace):
    """The storage said so while something was written: a part of it may stay."""

    msg = "host {host}, pool {pool}: its storage is full: {reason}"


class RecordError(StorageError):
    msg = "host {host}: record {record} in pool {pool}: {reason}"


class RecordMissing(RecordError):
    msg = (
        "host {host}: no record {record} in pool {pool}. Nothing is guessed from "
        "the bytes; `virtmigrate instance adopt` makes records for what others made"
    )


class RecordBroken(RecordError):
    msg = "host {host}: record {record} in pool {pool} is broken: {reason}"


class RecordTooNew(RecordError):
    msg = (
        "host {host}: record {record} in pool {pool} has schema {schema}, and this "
        "release reads up to {known}; it was left untouched. Upgrade virtmigrate"
    )


class RecordConflict(RecordError):
    msg = (
        "host {host}: record {record} in pool {pool} was changed by somebody else "
        "(expected generation {expected}, found {found}); nothing was written"
    )


class JournalBroken(Error):
    msg = "journal {path}: {reason}; the file was left untouched"


# Instances


class InstanceError(Error):
    msg = "instance {instance} on {host}: {reason}"


class InstanceNotFound(InstanceError):
    msg = "instance {instance} is not on host {host}"


class InstanceExists(InstanceError):
    msg = "instance {instance} is already on host {host}: {reason}"


class InstanceBusy(InstanceError):
    msg = "instance {instance} on {host} is in another operation: {reason}"


class InvalidState(InstanceError):
    msg = "instance {instance} on {host} is {state}: {reason}"


class NotEntitled(InstanceError):
    msg = (
        "host {host} has no right to run instance {instance}: {reason}. Starting it "
        "here could make two of it, so it was not started"
    )


class HeldElsewhere(NotEntitled):
    msg = (
        "host {host} may not run instance {instance}: its disks in backend {backend} "
        "are {holder}'s. It was not started. Stop it there, or move it; if {holder} "
        "is down for good: `virtmigrate instance take-over {instance}`"
    )


class TakeOverRefused(InstanceError):
    msg = "taking instance {instance} over to {host} is refused: {reason}"


class OwnedElsewhere(InstanceError):
    msg = (
        "instance {instance} belongs to {owner}: use its own command ({command}), "
        "or --unmanaged-override if {owner} must not know"
    )


# Moving bytes


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


# Images


class ImageError(Error):
    msg = "image {image}: {reason}"


class ImageRefused(ImageError):
    """What came in is not what was declared, or not safe to use."""

    msg = "image {image} is refused: {reason}. Nothing of it is used"


class ImageNotConverted(ImageError):
    msg = (
        "image {image} was not converted: {reason}. What was written of it is not used"
    )


class ImageUnavailable(ImageError):
    msg = "image {image} cannot be fetched: {reason}"


# Moving instances


class ImageNotFetched(ImageError):
    """Another one, who fetched it for all that wait, failed; ask again to try anew."""

    msg = "image {image}: {host} could not fetch it: {reason}"


class ImageNotFound(ImageError):
    msg = "host {host}: backend {backend} has no image {image}, or more than one"


class ImageGone(ImageError):
    """It was dropped while something was made of it."""

    msg = "host {host}: image {image} was dropped meanwhile; ask for it again"


class ImageInUse(ImageError):
    msg = "host {host}: image {image} stays, it is used: {reason}"


class DiskTooSmall(ImageError):
    msg = "volume {volume} of {size} bytes is too small: {image} needs {least}"


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
