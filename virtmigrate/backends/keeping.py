# SPDX-License-Identifier: Apache-2.0
"""What a backend keeps beside its volumes: manifests, leases of images, ages."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from virtmigrate import errors, manifest, model, record, storagepool, xml
from virtmigrate.formats import DiskFormat

Holds = tuple[model.Hold, ...]

_TRIES = 5
"""Times that a record is changed again after somebody else changed it."""


@dataclass(frozen=True)
class Image:
    """What makes two images the same: what a guest sees of them is equal."""

    root: str
    """Of the manifest of the bytes."""
    format: DiskFormat
    """What the bytes are read as."""
    size: int
    """What of them is seen."""


def manifest_name(name: str) -> str:
    """Return the volume, beside the records, that keeps a volume's digests."""
    return f"{name}.manifest"


def write_manifest(pool: storagepool.Pool, name: str, found: manifest.Manifest) -> None:
    """Keep the digests of a volume; a torn write keeps none."""
    volume, data = manifest_name(name), found.digests()
    pool.delete(volume)
    pool.create_raw(volume, len(data))
    if data:
        pool.write(volume, data)


def read_manifest(
    pool: storagepool.Pool, name: str, wanted: model.Digest | None
) -> manifest.Manifest | None:
    """Return the kept digests of a volume, None unless they are those wanted."""
    if wanted is None or wanted.block_size != manifest.block_size_for(wanted.size):
        return None
    length = -(-wanted.size // wanted.block_size) * manifest.LENGTH
    try:
        data = pool.read(manifest_name(name), limit=length)
        found = manifest.Manifest(wanted.size, wanted.block_size, data)
    except (ValueError, errors.VolumeNotFound, errors.ShortTransfer):
        return None
    return found if found.digest() == wanted else None


def is_image(volume: model.Volume, wanted: Image | None = None) -> bool:
    """Tell whether a volume is an image, the one wanted, and may be built upon.

    One that stands on another is none: its bytes do not tell all that is seen.
    """
    return (
        volume.role is model.Role.IMAGE
        and volume.state is model.VolumeState.USABLE
        and volume.proof is model.Proof.FULL
        and volume.backing is None
        and volume.digest is not None
        and wanted in (None, Image(volume.digest.root, volume.format, volume.size))
    )


def holds_without(volume: model.Volume, operation: str) -> Holds:
    """Return the leases of others that are not over."""
    now = time.time()
    return tuple(
        hold
        for hold in volume.holds
        if hold.operation != operation and hold.until > now
    )


def change_holds(
    store: record.Store[model.Volume],
    name: str,
    change: Callable[[model.Volume], Holds | None],
) -> bool:
    """Change the leases in a record; False when it is gone or `change` says None.

    Raises RecordConflict when others change it all the time.
    """
    for attempt in range(1, _TRIES + 1):
        stored = store.find(name)
        holds = change(stored.body) if stored else None
        if stored is None or holds is None:
            break
        body = msgspec.structs.replace(stored.body, holds=holds)
        try:
            store.publish(name, body, after=stored.generation)
        except errors.RecordConflict:
            if attempt == _TRIES:
                raise
            continue
        store.prune(name)
        return True
    return False


def written(pool: storagepool.Pool, stored: record.Stored[model.Volume]) -> float:
    """Return when a record was written, by its host's clock; 0 when nobody knows."""
    volume = f"{stored.name}.rec.{stored.generation}"
    try:
        with pool.opened(volume, f"looking at {volume}") as (_, vol):
            tree = xml.parse(vol.XMLDesc(0))
        return float(xml.text_at(tree, "target/timestamps/mtime") or 0)
    except (errors.StorageError, ValueError):
        return 0.0
