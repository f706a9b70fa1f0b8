# SPDX-License-Identifier: Apache-2.0
"""How a backend's option says that its disks are made of images."""

from pathlib import Path

import pytest

from virtmigrate import backends, conf, errors, host
from virtmigrate.backends.terms import Clones


def clones(tmp: Path, kind: str, **options: str) -> Clones:
    lines = [f"{name} = {value}" for name, value in options.items()]
    path = tmp / "virtmigrate.conf"
    path.write_text(
        f"[virtmigrate]\nenabled_backends = x\n[x]\nkind = {kind}\n" + "\n".join(lines)
    )
    # Nobody connects until something is asked for.
    found = backends.load(conf.load(path), host.Host("qemu:///system", name="h"))
    return found["x"].capabilities.clones


@pytest.mark.parametrize(
    ("kind", "wanted", "expected"),
    [
        ("dir", "auto", Clones.OVERLAY),
        ("dir", "overlay", Clones.OVERLAY),
        ("dir", "copy", Clones.REFLINK),
        ("shared_dir", "auto", Clones.OVERLAY),
        ("lvm", "auto", Clones.COPY),
        ("lvm", "copy", Clones.COPY),
        ("lvm", "snapshot", Clones.SNAPSHOT),
        ("rbd", "auto", Clones.SHARED),
        ("rbd", "copy", Clones.COPY),
    ],
)
def test_the_option(tmp_path: Path, kind: str, wanted: str, expected: Clones) -> None:
    assert clones(tmp_path, kind, clones=wanted) is expected


def test_room_that_is_promised_is_kept(tmp_path: Path) -> None:
    """A layer would take it as it is written."""
    assert clones(tmp_path, "dir", preallocation="falloc") is Clones.COPY
    wanted = {"preallocation": "falloc", "clones": "overlay"}
    assert clones(tmp_path, "dir", **wanted) is Clones.OVERLAY


@pytest.mark.parametrize(
    ("kind", "wanted"), [("dir", "snapshot"), ("lvm", "overlay"), ("rbd", "overlay")]
)
def test_what_a_kind_cannot_is_refused(tmp_path: Path, kind: str, wanted: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=f"x: clones = {wanted}"):
        clones(tmp_path, kind, clones=wanted)
