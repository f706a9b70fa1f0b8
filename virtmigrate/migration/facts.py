# SPDX-License-Identifier: Apache-2.0
"""What a departure's journal says, and the volumes that only a move makes."""

from typing import Any

import msgspec

from virtmigrate import errors, model, node
from virtmigrate.backends import base, making
from virtmigrate.formats import DiskFormat
from virtmigrate.journal import Journal
from virtmigrate.migration import trees
from virtmigrate.model import Role, VolumeState


def facts(journal: Journal, step: str) -> dict[str, Any]:
    facts = journal.facts(step)
    if facts is None:
        raise errors.JournalBroken(path=journal.path, reason=f"it lacks {step}")
    return facts


def original(journal: Journal) -> model.Instance:
    """Return the instance as it was when it was stopped, or else planned."""
    stopping = journal.facts("stopping") or facts(journal, "begun")
    text = str(stopping["original"])
    return msgspec.json.decode(text, type=model.Instance)


def transfer(journal: Journal) -> model.Transfer:
    text = str(facts(journal, "begun")["transfer"])
    return msgspec.json.decode(text, type=model.Transfer)


def cards(journal: Journal) -> dict[str, model.BackendCard]:
    """Return the peer's backends that the volumes come to, by name."""
    text = str(facts(journal, "begun")["cards"])
    return msgspec.json.decode(text, type=dict[str, model.BackendCard])


def source_of(
    here: node.Node, original: model.Instance, volume: model.TransferVolume
) -> base.Backend:
    """Return the backend of this host in which a sent volume lies."""
    for ref in (*original.disks, *trees.memories(original)):
        if ref.target == volume.target:
            return here.backend(ref.backend)
    raise errors.RecordBroken(
        host=here.name,
        pool="instances",
        record=original.uuid,
        reason=f"it has no disk {volume.target}",
    )


def is_converted(volume: model.TransferVolume, ours: model.Volume) -> bool:
    """Tell whether what a guest sees of a disk is sent, and not its layers.

    Arguments:
        ours: the record of the top layer here.
    """
    return volume.format is not ours.format


def roots(journal: Journal) -> dict[str, str]:
    """Return the root of each volume that this move copied, by its name there."""
    return {each["volume"]: each["root"] for each in journal.all("copying")}


def memory_name(operation: str) -> str:
    return f"memory.{operation}"


def memory_volume(
    original: model.Instance, operation: str, here: node.Node
) -> model.Volume:
    pool = here.files.disks
    name = memory_name(operation)
    return model.Volume(
        name=name,
        pool=pool.name,
        path=pool.volume_path(name),
        format=DiskFormat.RAW,
        role=Role.MEMORY,
        size=0,
        state=VolumeState.INCOMPLETE,
        owner=original.uuid,
        operation=operation,
        origin=here.name,
    )


def drop_memory(here: node.Node, journal: Journal) -> None:
    here.files.remove(memory_name(journal.operation))


def overlay_volume(
    volume: model.TransferVolume,
    below: model.Volume,
    transfer: model.Transfer,
    origin: str,
) -> model.Volume:
    return making.layer_over(
        below,
        volume.name,
        role=volume.role,
        size=volume.size,
        owner=transfer.instance,
        operation=transfer.operation,
        origin=origin,
    )
