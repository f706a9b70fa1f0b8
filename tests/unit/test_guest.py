# SPDX-License-Identifier: Apache-2.0
"""The guest's counter on disk: what verify() finds."""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path

import pytest

from sandbox import guest

START = guest.PLAIN_START


def record(counter: int, boot: int = 1) -> bytes:
    text = b"VMBEAT1 %010d %06d" % (counter, boot)
    checksum = hashlib.sha256(text).hexdigest()[:37].encode()
    return (text + b" " + checksum + b"\n") * 8


def disk(records: list[bytes], size: int = 3 * 1024 * 1024) -> io.BytesIO:
    content = bytearray(size)
    data = b"".join(records)
    content[START : START + len(data)] = data
    return io.BytesIO(bytes(content))


def test_verify_unbroken() -> None:
    records = [record(n, boot=1 + n // 4) for n in range(1, 11)]
    assert guest.verify(disk(records)) == guest.CounterLog(1, 10, 3, [])


def test_verify_empty() -> None:
    assert guest.verify(disk([])) == guest.CounterLog(0, 0, 0, [])


def test_verify_lost_in_the_middle() -> None:
    records = [record(n) for n in range(1, 11)]
    records[3:5] = [bytes(512), bytes(512)]
    log = guest.verify(disk(records))
    assert (log.first, log.last) == (1, 10)
    assert log.problems == ["lost: record 4", "lost: record 5"]


def test_verify_lost_at_the_start() -> None:
    log = guest.verify(disk([bytes(512), record(2)]))
    assert log == guest.CounterLog(2, 2, 1, ["lost: record 1"])


def test_verify_doubled() -> None:
    log = guest.verify(disk([record(1), record(2), record(2), record(4)]))
    assert log.problems == ["doubled: record 2 in place 3"]


def test_verify_out_of_order() -> None:
    log = guest.verify(disk([record(1), record(3), record(2)]))
    assert log.problems == ["out of order: 3 in place 2", "out of order: 2 in place 3"]


@pytest.mark.parametrize("length", [1, 64, 256, 511])
def test_verify_torn(length: int) -> None:
    torn = record(2)[:length] + bytes(512 - length)
    log = guest.verify(disk([record(1), torn, record(3)]))
    assert log.problems == ["torn: record 2"]


def test_verify_torn_over_older_record() -> None:
    log = guest.verify(disk([record(1), record(2)[:256] + record(9)[256:]]))
    assert log.problems == ["torn: record 2"]


def test_verify_wrong_checksum() -> None:
    wrong = record(2).replace(b"0000000002", b"0000000003")
    assert guest.verify(disk([record(1), wrong])).problems == ["torn: record 2"]


def test_verify_rubbish_behind_the_end() -> None:
    log = guest.verify(disk([record(1), bytes(512), b"x" * 512]))
    assert log.last == 1
    assert log.problems == ["lost: record 2", "torn: record 3"]


def test_verify_boot_that_left_no_trace() -> None:
    log = guest.verify(disk([record(1, boot=1), record(2, boot=3)]))
    assert log.problems == ["out of order: boot 3 after 1 at record 2"]


def test_verify_older_boot_again() -> None:
    log = guest.verify(disk([record(1), record(2, boot=2), record(3, boot=1)]))
    assert log.boots == 2
    assert log.problems == ["out of order: boot 1 after 2 at record 3"]


def test_verify_partitioned(tmp_path: Path) -> None:
    content = bytearray(2 * 1024 * 1024)
    content[470:478] = struct.pack("<II", 2048, 4)
    content[510:512] = b"\x55\xaa"
    area = record(1) + record(2)
    content[START : START + len(area)] = area
    content[START + 4 * 512 :] = b"y" * (len(content) - START - 4 * 512)
    path = tmp_path / "disk"
    path.write_bytes(content)
    assert guest.verify(path) == guest.CounterLog(1, 2, 1, [])


def test_console(tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    checksum = "a" * 37
    log.write_bytes(
        b"\x1bcSeaBIOS\r\nDISK vda 1048576\r\nBOOT 7\r\n"
        + f"BEAT 7 {checksum} vdb=3\r\nBEAT 8 {checksum} vdb=4\r\nBEAT 9 aa".encode()
    )
    assert guest.beats(log) == [
        guest.Beat(7, checksum, {"vdb": 3}),
        guest.Beat(8, checksum, {"vdb": 4}),
    ]
    assert guest.boots(log) == [7]
    assert guest.disks(log) == {"vda": 1048576}
