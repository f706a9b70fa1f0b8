# SPDX-License-Identifier: Apache-2.0
"""A domain's configuration says that its transient disks are read-only."""

import pytest

from virtmigrate import domainxml
from virtmigrate.domainxml import Disk, DiskFormat, Layer, SourceType

LAYERS = (Layer(SourceType.FILE, "/disk", DiskFormat.RAW),)


def build(*disks: Disk, transient: str = "") -> str:
    return domainxml.build(
        domainxml.Domain(
            uuid="7b2d8f9e-32b4-4f2e-9d65-0a3f8f1c2b11",
            name="n",
            memory=1 << 26,
            vcpus=1,
            virt_type="qemu",
            machine="q35",
            disks=disks,
            metadata={"owner": "o", **({"transient": transient} if transient else {})},
        )
    )


def readonly(text: str) -> dict[str, bool]:
    return {disk.target: disk.readonly for disk in domainxml.disks(text)}


TEXT = build(Disk("vda", LAYERS), Disk("vdb", LAYERS), transient="vdb")


def test_there_and_back() -> None:
    found = domainxml.guarded(TEXT)
    assert readonly(found) == {"vda": False, "vdb": True}
    assert domainxml.guarded(found) == found
    back = domainxml.unguarded(found)
    assert readonly(back) == {"vda": False, "vdb": False}
    assert domainxml.unguarded(back) == back


@pytest.mark.parametrize("transient", ["", "vdc"])
def test_of_no_disk(transient: str) -> None:
    text = build(Disk("vda", LAYERS), transient=transient)
    assert readonly(domainxml.guarded(text)) == {"vda": False}


def test_of_a_disk_that_qemu_cannot_have_so() -> None:
    text = build(Disk("sda", LAYERS, bus="sata"), transient="sda")
    assert readonly(domainxml.guarded(text)) == {"sda": False}


def test_what_is_read_only_anyhow_stays_so() -> None:
    text = build(Disk("vda", LAYERS, readonly=True), Disk("vdb", LAYERS))
    assert readonly(domainxml.unguarded(text)) == {"vda": True, "vdb": False}


def test_noted() -> None:
    text = build(Disk("vda", LAYERS), Disk("vdb", LAYERS))
    assert domainxml.with_transient(text, []) == text
    noted = domainxml.with_transient(text, ["vdb", "vda"])
    assert domainxml.metadata_of(noted) == {"owner": "o", "transient": "vda,vdb"}
    assert domainxml.with_transient(noted, ["vda", "vdb"]) == noted
    cleared = domainxml.with_transient(noted, [])
    assert domainxml.metadata_of(cleared) == {"owner": "o"}


def test_a_layer_with_its_room() -> None:
    top = Layer(SourceType.FILE, "/top", DiskFormat.QCOW2, room=1 << 20)
    base = Layer(
        SourceType.NETWORK,
        "pool/image",
        DiskFormat.RAW,
        hosts=("h:6789",),
        auth=domainxml.Auth("user", "s"),
    )
    found = domainxml.with_disks(TEXT, {"vdb": (top, base)})
    assert '<slice type="storage" offset="0" size="1048576"/>' in found
    (_, disk) = domainxml.disks(found)
    assert [each.source for each in disk.chain] == ["/top", "pool/image"]
    assert not disk.problems
