# SPDX-License-Identifier: Apache-2.0
"""Where the state of a volume can be kept, by what its backend can do."""

import types
from typing import Any, cast

import pytest

from virtmigrate import backends, errors, model
from virtmigrate.formats import DiskFormat
from virtmigrate.snapshot import planning, rules
from virtmigrate.snapshot.work import Work
from virtmigrate.snapshottree import Place


@pytest.mark.parametrize(("kind", "possible"), [("lvm", False), ("rbd", True)])
def test_a_volume_that_shares_blocks_of_its_image(kind: str, possible: bool) -> None:
    can = backends.KINDS[kind].capabilities
    found = rules.place(can, DiskFormat.RAW, Place.OWN, is_clone=True)
    assert found.possible is possible
    assert rules.place(can, DiskFormat.RAW, Place.OWN).possible
    assert possible or "clones = copy" in found.said


def test_it_is_refused_in_planning() -> None:
    """Played: real volumes of this kind need a group, and LVM's own commands."""
    volume = model.Volume(
        name="vda.1",
        pool="pool",
        path="/dev/group/vda.1",
        format=DiskFormat.RAW,
        role=model.Role.ROOT,
        size=1,
        state=model.VolumeState.USABLE,
        owner="uuid",
        operation="1",
        origin="here",
        parent="image",
    )
    ref = model.DiskRef(
        target="vda", volume="vda.1", backend="lvm", role=model.Role.ROOT
    )

    def refused(doing: str, reason: str) -> errors.SnapshotRefused:
        return errors.SnapshotRefused(
            doing=doing, instance="uuid", host="here", reason=reason
        )

    can = backends.KINDS["lvm"].capabilities
    work: Any = types.SimpleNamespace(
        backend=lambda ref: types.SimpleNamespace(capabilities=can),
        volume=lambda *_: volume,
        refused=refused,
    )
    planner = planning.Planner(cast(Work, work))
    with pytest.raises(errors.SnapshotRefused, match="vda own: it is a snapshot of"):
        planner._frozen_disk(ref, None)
