# SPDX-License-Identifier: Apache-2.0
"""What comes through the door, what does not, and why."""

import os
from pathlib import Path

import pytest

from tests.unit import images
from virtmigrate import door, errors
from virtmigrate.door import __main__ as child
from virtmigrate.door import answer, rules
from virtmigrate.door.terms import Refusal
from virtmigrate.units import GiB, MiB

ALL = door.Limits(formats=tuple(rules.ALLOWED))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return images.make(tmp_path_factory.mktemp("images"))


def looked_at(path: Path, declared: str, limits: door.Limits = ALL) -> door.Found:
    """Look in this process: the same rules, without the start of another."""
    with path.open("rb") as image:
        return rules.examine(image, declared, limits)


@pytest.fixture
def hostile(
    made: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> Path:
    case: images.Hostile = request.param
    path = tmp_path / "hostile"
    path.write_bytes(case.change(made[case.base].read_bytes()))
    return path


# Valid ones


@pytest.mark.parametrize("name", [*images.SUBFORMATS, "vmdk-footer", "raw"])
def test_valid_image_comes_in(made: dict[str, Path], name: str) -> None:
    found = looked_at(made[name], images.declared(name))
    assert found == door.Found(images.declared(name), images.SIZE, door.RULES)


def test_disk_with_partitions_is_raw(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(images.partitioned())
    assert looked_at(path, "raw").virtual_size == path.stat().st_size


@pytest.mark.parametrize("declared", ["raw", "iso"])
@pytest.mark.parametrize("bootable", [False, True])
def test_iso(tmp_path: Path, declared: str, bootable: bool) -> None:
    data = images.iso()
    if bootable:
        data = images.partitioned()[:512] + data[512:]
    path = tmp_path / "cd"
    path.write_bytes(data)
    assert looked_at(path, declared) == door.Found(declared, len(data))


def test_look_is_a_process(made: dict[str, Path]) -> None:
    path = made["qcow2"]
    before = path.stat()
    found = door.Found("qcow2", images.SIZE, door.RULES)
    assert door.recheck(path, "qcow2", ALL) == found
    after = path.stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


# Hostile ones


def case_id(case: images.Hostile) -> str:
    return f"{case.format}: {case.name}"


HOSTILE = [pytest.param(case, case, id=case_id(case)) for case in images.HOSTILE]


@pytest.mark.parametrize(("hostile", "case"), HOSTILE, indirect=["hostile"])
def test_hostile_image_is_refused(hostile: Path, case: images.Hostile) -> None:
    with hostile.open("rb") as image:
        told = child._look(image, case.format, ALL)
    assert case.reason.lower() in told.refused.lower()
    assert not told.format and not told.virtual_size


def test_names_are_unique() -> None:
    names = [case_id(case) for case in images.HOSTILE]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("hostile", "case"),
    [
        each
        for each in HOSTILE
        if each.id in ("qcow2: JSON backing name", "raw: LUKS 2")
    ],
    indirect=["hostile"],
)
def test_reason_reaches_the_caller(hostile: Path, case: images.Hostile) -> None:
    with pytest.raises(errors.ImageRefused, match=case.reason) as caught:
        door.inspect(hostile, case.format, ALL)
    assert str(hostile) in str(caught.value)
    assert "Nothing of it is used" in str(caught.value)


def test_bytes_of_an_image_are_not_shown_raw() -> None:
    evil = "a\x1b[31m\n\r\0\u202e" + "x" * 1000
    shown = answer.plain(evil)
    assert shown.isascii() and shown.isprintable() and len(shown) < 400


def test_more_than_the_limit_is_refused(made: dict[str, Path]) -> None:
    small = door.Limits(formats=ALL.formats, max_size=MiB // 2)
    for name in ("raw", "qcow2-zlib", "vdi"):
        with pytest.raises(Refusal, match="more than image_max_size_gib"):
            looked_at(made[name], images.declared(name), small)


def test_sparse_file_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1025 * GiB)
    with pytest.raises(Refusal, match="file has"):
        looked_at(path, "raw")


def test_claim_of_a_size_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    """Also when the header is in order with itself: the limit decides."""
    path = tmp_path / "claim.qcow2"
    images.qemu_img("create", "-f", "qcow2", path, "2T")
    with pytest.raises(Refusal, match=r"disk has 2\.0 TiB"):
        looked_at(path, "qcow2")
    images.qemu_img("create", "-f", "qcow2", path, "1T")
    assert looked_at(path, "qcow2").virtual_size == 1024 * GiB


@pytest.mark.parametrize("declared", ["qed", "qcow", "ploop", "vpc", "", "../raw\n"])
def test_format_that_is_not_taken(made: dict[str, Path], declared: str) -> None:
    with pytest.raises(errors.ImageRefused, match="not taken") as caught:
        door.inspect(made["raw"], declared, ALL)
    assert "\n" not in str(caught.value)


def test_formats_are_the_operators_choice(made: dict[str, Path]) -> None:
    with pytest.raises(errors.ImageRefused, match="not taken: image_formats"):
        door.inspect(made["vmdk"], "vmdk", door.Limits())


# What is no file


def test_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.ImageRefused, match="no regular file"):
        door.inspect(tmp_path / "pipe", "raw", ALL)


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/nowhere/at/all"])
def test_what_is_no_file(path: str) -> None:
    with pytest.raises(errors.ImageRefused, match=r"no regular file|cannot be opened"):
        door.inspect(Path(path), "raw", ALL)
