# SPDX-License-Identifier: Apache-2.0
"""The end of what a guest said."""

from pathlib import Path

import pytest

from virtmigrate import console


def log(tmp_path: Path, now: bytes, before: bytes | None = None) -> Path:
    path = console.path(str(tmp_path), "abc")
    path.write_bytes(now)
    if before is not None:
        path.with_name(f"{path.name}.0").write_bytes(before)
    return path


def test_whole_log_that_is_short(tmp_path: Path) -> None:
    assert console.tail(log(tmp_path, b"hello"), 10) == b"hello"


def test_end_of_a_long_log(tmp_path: Path) -> None:
    assert console.tail(log(tmp_path, b"0123456789"), 4) == b"6789"


def test_rest_comes_from_the_log_before(tmp_path: Path) -> None:
    assert console.tail(log(tmp_path, b"89", b"0123456"), 4) == b"5689"


def test_log_before_is_not_needed(tmp_path: Path) -> None:
    assert console.tail(log(tmp_path, b"6789", b"x"), 4) == b"6789"


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        console.tail(console.path(str(tmp_path), "abc"))
