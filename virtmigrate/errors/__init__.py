# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, told so that a reader knows what to do.

    Error
    ├── ConfigurationError
    ├── Unsupported
    ├── XmlRefused
    ├── DomainNotUnderstood
    ├── SaveImageRefused
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
    │   │   └── LockBusy, LockLost, LockFileFailed
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
    │   │       └── TakenAway
    │   ├── QuiesceFailed
    │   │   └── AgentNotThere
    │   ├── TakeOverRefused
    │   ├── IdentityError
    │   │   ├── GuestFailed, HookFailed
    │   │   └── IdentityRefused, IdentityFailed
    │   ├── SnapshotError
    │   │   ├── SnapshotNotFound, SnapshotExists
    │   │   └── SnapshotRefused, SnapshotFailed
    │   ├── CloneError
    │   │   └── CloneRefused, CloneFailed
    │   └── OwnedElsewhere
    ├── TransferError
    │   ├── ShortTransfer, SourceChanged, SourceUnreadable
    │   └── VerificationFailed
    ├── ImageError
    │   ├── ImageRefused
    │   ├── ImageNotConverted
    │   ├── ImageUnavailable
    │   ├── ImageNotFetched
    │   │   └── ImageStalled
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

from virtmigrate.errors.base import Cancelled as Cancelled
from virtmigrate.errors.base import ConfigurationError as ConfigurationError
from virtmigrate.errors.base import DomainNotUnderstood as DomainNotUnderstood
from virtmigrate.errors.base import Error as Error
from virtmigrate.errors.base import Unsupported as Unsupported
from virtmigrate.errors.base import XmlRefused as XmlRefused
from virtmigrate.errors.clones import CloneError as CloneError
from virtmigrate.errors.clones import CloneFailed as CloneFailed
from virtmigrate.errors.clones import CloneRefused as CloneRefused
from virtmigrate.errors.clones import SaveImageRefused as SaveImageRefused
from virtmigrate.errors.hosts import AuthenticationFailed as AuthenticationFailed
from virtmigrate.errors.hosts import CertificateRefused as CertificateRefused
from virtmigrate.errors.hosts import HostBusy as HostBusy
from virtmigrate.errors.hosts import HostError as HostError
from virtmigrate.errors.hosts import HostTimeout as HostTimeout
from virtmigrate.errors.hosts import HostUnreachable as HostUnreachable
from virtmigrate.errors.hosts import InsecureConnection as InsecureConnection
from virtmigrate.errors.hosts import LibvirtFailed as LibvirtFailed
from virtmigrate.errors.hosts import ReceiverSilent as ReceiverSilent
from virtmigrate.errors.hosts import RequestRefused as RequestRefused
from virtmigrate.errors.identity import GuestFailed as GuestFailed
from virtmigrate.errors.identity import HookFailed as HookFailed
from virtmigrate.errors.identity import IdentityError as IdentityError
from virtmigrate.errors.identity import IdentityFailed as IdentityFailed
from virtmigrate.errors.identity import IdentityRefused as IdentityRefused
from virtmigrate.errors.images import DiskTooSmall as DiskTooSmall
from virtmigrate.errors.images import ImageError as ImageError
from virtmigrate.errors.images import ImageGone as ImageGone
from virtmigrate.errors.images import ImageInUse as ImageInUse
from virtmigrate.errors.images import ImageNotConverted as ImageNotConverted
from virtmigrate.errors.images import ImageNotFetched as ImageNotFetched
from virtmigrate.errors.images import ImageNotFound as ImageNotFound
from virtmigrate.errors.images import ImageRefused as ImageRefused
from virtmigrate.errors.images import ImageStalled as ImageStalled
from virtmigrate.errors.images import ImageUnavailable as ImageUnavailable
from virtmigrate.errors.instances import AgentNotThere as AgentNotThere
from virtmigrate.errors.instances import HeldElsewhere as HeldElsewhere
from virtmigrate.errors.instances import InstanceBusy as InstanceBusy
from virtmigrate.errors.instances import InstanceError as InstanceError
from virtmigrate.errors.instances import InstanceExists as InstanceExists
from virtmigrate.errors.instances import InstanceNotFound as InstanceNotFound
from virtmigrate.errors.instances import InvalidState as InvalidState
from virtmigrate.errors.instances import NotEntitled as NotEntitled
from virtmigrate.errors.instances import OwnedElsewhere as OwnedElsewhere
from virtmigrate.errors.instances import QuiesceFailed as QuiesceFailed
from virtmigrate.errors.instances import TakenAway as TakenAway
from virtmigrate.errors.instances import TakeOverRefused as TakeOverRefused
from virtmigrate.errors.moves import MigrationError as MigrationError
from virtmigrate.errors.moves import MigrationRefused as MigrationRefused
from virtmigrate.errors.moves import MigrationRolledBack as MigrationRolledBack
from virtmigrate.errors.moves import MigrationUndecided as MigrationUndecided
from virtmigrate.errors.moves import NotConfirmable as NotConfirmable
from virtmigrate.errors.moves import NotRevertible as NotRevertible
from virtmigrate.errors.moves import TicketDamaged as TicketDamaged
from virtmigrate.errors.snapshots import SnapshotError as SnapshotError
from virtmigrate.errors.snapshots import SnapshotExists as SnapshotExists
from virtmigrate.errors.snapshots import SnapshotFailed as SnapshotFailed
from virtmigrate.errors.snapshots import SnapshotNotFound as SnapshotNotFound
from virtmigrate.errors.snapshots import SnapshotRefused as SnapshotRefused
from virtmigrate.errors.storage import DiskFull as DiskFull
from virtmigrate.errors.storage import JournalBroken as JournalBroken
from virtmigrate.errors.storage import LayoutRefused as LayoutRefused
from virtmigrate.errors.storage import LockBusy as LockBusy
from virtmigrate.errors.storage import LockError as LockError
from virtmigrate.errors.storage import LockFileFailed as LockFileFailed
from virtmigrate.errors.storage import LockLost as LockLost
from virtmigrate.errors.storage import NoBackend as NoBackend
from virtmigrate.errors.storage import NoSpace as NoSpace
from virtmigrate.errors.storage import PoolBusy as PoolBusy
from virtmigrate.errors.storage import PoolNotFound as PoolNotFound
from virtmigrate.errors.storage import RecordBroken as RecordBroken
from virtmigrate.errors.storage import RecordConflict as RecordConflict
from virtmigrate.errors.storage import RecordError as RecordError
from virtmigrate.errors.storage import RecordMissing as RecordMissing
from virtmigrate.errors.storage import RecordTooNew as RecordTooNew
from virtmigrate.errors.storage import StorageDown as StorageDown
from virtmigrate.errors.storage import StorageError as StorageError
from virtmigrate.errors.storage import VolumeExists as VolumeExists
from virtmigrate.errors.storage import VolumeInUse as VolumeInUse
from virtmigrate.errors.storage import VolumeNotFound as VolumeNotFound
from virtmigrate.errors.transfers import ShortTransfer as ShortTransfer
from virtmigrate.errors.transfers import SourceChanged as SourceChanged
from virtmigrate.errors.transfers import SourceUnreadable as SourceUnreadable
from virtmigrate.errors.transfers import TransferError as TransferError
from virtmigrate.errors.transfers import VerificationFailed as VerificationFailed
