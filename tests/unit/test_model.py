# SPDX-License-Identifier: Apache-2.0
"""What records say: strict both ways."""

import dataclasses
from typing import Any

import msgspec
import pytest

from virtmigrate import model
from virtmigrate.formats import DiskFormat

VOLUME = model.Volume(
    name="vda.op",
    pool="disks",
    path="/srv/disks/vda.op",
    format=DiskFormat.QCOW2,
    role=model.Role.ROOT,
    size=1 << 40,
    state=model.VolumeState.FROZEN,
    owner="i1",
    operation="op",
    origin="alpha",
    backing="base",
    digest=model.Digest(version=1, size=10, block_size=1, root="ab"),
    durable=True,
)
INSTANCE = model.Instance(
    uuid="i1",
    name="instance-1",
    owner="nova",
    host="alpha",
    state=model.InstanceState.AWAY,
    operation="op",
    memory=1 << 30,
    vcpus=2,
    disks=(
        model.DiskRef(
            target="vda", volume="vda.op", backend="default", role=model.Role.ROOT
        ),
    ),
    peer="beta",
    domain_xml="<domain>ä</domain>",
    power="paused",
    autostart=True,
)
TRANSFER = model.Transfer(
    operation="op",
    request="req-1",
    instance="i1",
    source="alpha",
    peer="beta",
    state=model.TransferState.GIVEN,
    generation=4,
    volumes=(
        model.TransferVolume(
            name="vda.op",
            backend="default",
            source="vda.old",
            target="vda",
            role=model.Role.EPHEMERAL,
            format=DiskFormat.RAW,
            size=20,
            length=10,
            room=20,
            grow=True,
        ),
    ),
    created=1.5,
    record=INSTANCE,
)
CARD = model.HostCard(
    host="alpha",
    uuid="u",
    release="0.1",
    records=(1,),
    manifests=(1,),
    tickets=(1, 2),
    backends=(
        model.BackendCard(
            name="b",
            kind="k",
            disks="d",
            incoming="i",
            records="r",
            formats=(DiskFormat.RAW,),
            files=True,
        ),
    ),
)
ALL = [VOLUME, INSTANCE, TRANSFER, CARD]
NAMES = [type(body).__name__ for body in ALL]


def as_dict(body: msgspec.Struct) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(body))
    return found


@pytest.mark.parametrize("body", ALL, ids=NAMES)
def test_round_trip(body: msgspec.Struct) -> None:
    assert msgspec.json.decode(msgspec.json.encode(body), type=type(body)) == body


@pytest.mark.parametrize("body", ALL, ids=NAMES)
def test_unknown_field_is_refused(body: msgspec.Struct) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({**as_dict(body), "extra": 1}, type(body))


@pytest.mark.parametrize("body", ALL, ids=NAMES)
def test_each_required_field_is_needed(body: msgspec.Struct) -> None:
    fields = msgspec.structs.fields(body)
    required = [field.name for field in fields if field.required]
    assert required
    for name in required:
        left = {key: value for key, value in as_dict(body).items() if key != name}
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.convert(left, type(body))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "10"),
        ("size", 1.5),
        ("size", True),
        ("format", "vmdk"),
        ("state", "ready"),
        ("name", None),
        ("durable", 1),
        ("digest", {"version": 1}),
    ],
    ids=lambda value: str(value)[:12],
)
def test_other_types_are_refused(field: str, value: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**as_dict(VOLUME), field: value}, model.Volume)


def test_records_do_not_change() -> None:
    with pytest.raises(AttributeError):
        VOLUME.size = 1  # type: ignore[misc]
    assert not dataclasses.is_dataclass(VOLUME)
    assert msgspec.structs.replace(VOLUME, size=1) != VOLUME
