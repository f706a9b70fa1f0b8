# SPDX-License-Identifier: Apache-2.0
"""Where the state of a volume can be kept, by what its backend can do."""

import pytest

from virtmigrate import backends
from virtmigrate.formats import DiskFormat
from virtmigrate.snapshot import rules
from virtmigrate.snapshottree import Place


@pytest.mark.parametrize(("kind", "possible"), [("lvm", False), ("rbd", True)])
def test_a_volume_that_shares_blocks_of_its_image(kind: str, possible: bool) -> None:
    can = backends.KINDS[kind].capabilities
    found = rules.place(can, DiskFormat.RAW, Place.OWN, is_clone=True)
    assert found.possible is possible
    assert rules.place(can, DiskFormat.RAW, Place.OWN).possible
    assert possible or "clones = copy" in found.said
