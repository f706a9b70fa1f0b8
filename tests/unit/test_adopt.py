# SPDX-License-Identifier: Apache-2.0
"""What of an adoption is decided without a host."""

import dataclasses

import pytest

from virtmigrate import domainxml, model
from virtmigrate.adopt import chains, checks, planner, pools, values
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role, VolumeState

CHAIN = """<backingStore type='file'><format type='raw'/>
  <source file='/d/base.raw'/><backingStore/></backingStore>"""


def found(*disks: str) -> domainxml.FoundDomain:
    return domainxml.read(
        "<domain type='qemu'><uuid>u</uuid><name>n</name><memory>65536</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os>"
        f"<devices>{''.join(disks)}</devices></domain>"
    )


def disk(
    target: str, source: str, fmt: str = "qcow2", inner: str = "", device: str = "disk"
) -> str:
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='{fmt}'/>"
        f"<source file='{source}'/>{inner}<target dev='{target}' bus='virtio'/></disk>"
    )


def layer(path: str, fmt: DiskFormat = DiskFormat.RAW) -> domainxml.Layer:
    return domainxml.Layer(domainxml.SourceType.FILE, path, fmt)


TOP = layer("/d/top.qcow2", DiskFormat.QCOW2)
BASE = layer("/d/base.raw")
OPEN = disk("vda", "/d/top.qcow2")
CLOSED = disk("vda", "/d/top.qcow2", inner=CHAIN)


def read(text: str, *given: domainxml.Layer, **sizes: int) -> chains.Chains:
    said = {"vda": given} if given else {}
    return chains.Chains(found(text), values.Given(chains=said, sizes=sizes))


# Chains


def test_chain_of_the_xml() -> None:
    done = read(CLOSED)
    assert (done.problems, done.chains) == ([], {"vda": (TOP, BASE)})


def test_open_chain_is_refused_with_a_hint() -> None:
    done = read(OPEN)
    (problem,) = done.problems
    assert "/d/top.qcow2 has a backing layer" in problem
    assert "--disk vda=" in problem
    assert done.chains == {"vda": ()}


def test_operator_closes_the_chain() -> None:
    done = read(OPEN, TOP, BASE)
    assert (done.problems, done.chains) == ([], {"vda": (TOP, BASE)})
    assert read(OPEN, TOP).problems == []


@pytest.mark.parametrize(
    ("text", "given", "problem"),
    [
        (OPEN, [layer("/d/other", DiskFormat.QCOW2)], "--disk says /d/other"),
        (OPEN, [layer("/d/top.qcow2")], "as raw, and the XML /d/top.qcow2 as qcow2"),
        (CLOSED, [TOP], "names 2 layers, and --disk only 1"),
        (CLOSED, [TOP, layer("/d/wrong")], "--disk says /d/wrong as raw"),
        (disk("vda", "/d/r", "raw"), [layer("/d/r"), BASE], "nothing is behind /d/r"),
        (disk("vda", "/d/r", "raw"), [layer("/d/r"), BASE], "is raw and has no"),
    ],
    ids=["source", "format", "short", "below", "long", "raw"],
)
def test_operator_contradicts_the_xml(
    text: str, given: list[domainxml.Layer], problem: str
) -> None:
    assert any(problem in each for each in read(text, *given).problems)


def test_values_for_what_is_not_there() -> None:
    given = values.Given(
        chains={"vdz": (BASE,)}, sizes={"vdy": 1, "vda[1]": 1, "vda": 1}
    )
    assert chains.Chains(found(CLOSED), given).problems == [
        "--disk vdz: the domain has no such disk",
        "--size vdy: the domain has no such disk",
        "--size vda[1]: it is raw, its file is measured",
    ]


# Roles


def test_root_is_the_first_disk_or_the_first_to_boot() -> None:
    cd = disk("sda", "/d/cd", "raw", "<readonly/>", "cdrom")
    domain = found(cd, disk("vda", "/d/a", "raw"), disk("vdb", "/d/b", "raw"))
    roles = [planner._role(each, planner._root(domain)) for each in domain.disks]
    assert roles == [Role.CONFIG, Role.ROOT, Role.DATA]
    domain = found(
        disk("vda", "/d/a", "raw"),
        disk("vdb", "/d/b", "raw", "<boot order='1'/>"),
    )
    assert planner._root(domain) == "vdb"
    assert planner._root(found()) is None


# Names and records


def planned(**changes: object) -> values.Planned:
    base = values.Planned(
        label="vda",
        name="disk",
        path="/d/disk",
        format=DiskFormat.RAW,
        role=Role.ROOT,
        owner="u",
        size=None,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def stored(**changes: object) -> model.Volume:
    fields: dict[str, object] = {
        "name": "disk",
        "pool": "p",
        "path": "/d/disk",
        "format": DiskFormat.RAW,
        "role": Role.ROOT,
        "size": 5,
        "state": VolumeState.USABLE,
        "owner": "u",
        "operation": "o",
        "origin": "alpha",
    }
    return model.Volume(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "fine"),
    [
        ("/d/disk.raw", True),
        ("/d/a b", False),
        ("/d/a\nb", False),
        ("/d/../disk", False),
        ("/d//disk", False),
        ("/d/" + "x" * 241, False),
        ("/d/ünï", True),
    ],
)
def test_file_name_as_record_name(path: str, fine: bool) -> None:
    volume = planned(path=path, name=path.rpartition("/")[2])
    assert (not list(checks._name(volume))) == fine


@pytest.mark.parametrize(
    ("found", "volume", "fits"),
    [
        (stored(), planned(), True),
        (stored(owner="other"), planned(), False),
        (stored(path="/e/disk"), planned(), False),
        (stored(format=DiskFormat.QCOW2), planned(), False),
        (stored(owner=""), planned(), False),
        (stored(owner=""), planned(owner=""), True),
        (stored(owner="", backing="x"), planned(owner=""), False),
        (stored(owner=""), planned(owner="", size=6), False),
    ],
    ids=["again", "theirs", "path", "format", "public", "layer", "backing", "size"],
)
def test_record_that_is_there(
    found: model.Volume, volume: values.Planned, fits: bool
) -> None:
    assert checks._fits(found, volume, "u") is fits


def test_twins() -> None:
    first = planned(role=Role.LAYER)
    assert not list(checks._twin(first, first))
    assert not list(checks._twin(planned(label="vdb[1]", role=Role.LAYER), first))
    (text,) = checks._twin(planned(label="vdb", path="/e/disk"), first)
    assert "one file name" in text
    (text,) = checks._twin(planned(label="vdb"), first)
    assert text == "vdb: /d/disk is also vda"


def test_labels_and_pool_names() -> None:
    assert [values.label("vda", n) for n in range(3)] == ["vda", "vda[1]", "vda[2]"]
    assert pools.name("/a").startswith("virtmigrate-adopted-")
    assert len(pools.name("/a")) == len("virtmigrate-adopted-") + 8
    assert pools.name("/a") != pools.name("/b")
    assert planned().directory == "/d"
