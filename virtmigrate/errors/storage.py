# SPDX-License-Identifier: Apache-2.0
"""Pools, volumes, locks, records and journals."""

from virtmigrate.errors.base import Error


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


class LockFileFailed(LockError):
    msg = (
        "host {host}: lock {name} cannot be had in {path}: {reason}. Nothing was done. "
        "See that state_path has room and is not read-only, and that this user may "
        "write there; then try again"
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
