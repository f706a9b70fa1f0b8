# SPDX-License-Identifier: Apache-2.0
"""Where images go: files, which are real, and an image service, which is a stand-in."""

import errno
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openstack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.imageservice import Service, serving
from virtmigrate import errors, manifest, sinks
from virtmigrate.sinks import glance
from virtmigrate.sources import glance as sources
from virtmigrate.sources.download import Terms
from virtmigrate.units import GiB, KiB, MiB

TERMS = Terms(timeout=20, retry_seconds=0)
ID = "2e4b6dca-9700-4715-b81d-4463cd7038de"
PIECES: list[sinks.Piece] = [b"a" * 1000, 3 * MiB, b"b" * MiB, b"c", 5000]
DATA = b"".join(bytes(p) if isinstance(p, int) else p for p in PIECES)
COMING = sinks.Announced(
    name="a guest",
    format="raw",
    size=len(DATA),
    virtual_size=2 * GiB + 1,
    properties={"os_type": "linux", "a/b~c": "d"},
)


class Sent:
    """What a sink is given, and its digests."""

    def __init__(self, data: bytes = DATA) -> None:
        self.counted: list[str] = []
        self._data = data

    def digest(self, algorithm: str) -> str:
        self.counted.append(algorithm)
        found = sinks.Print(algorithm, len(self._data))
        found.add(self._data)
        return found.hex()


def broken() -> Iterator[sinks.Piece]:
    """A disk that turns out to have changed, before its last piece."""
    yield from PIECES[:-1]
    raise errors.SourceChanged(volume="vda", reason="on purpose")


def fill(sink: sinks.Sink, sent: Sent | None = None) -> str:
    sink.look()
    sink.begin(COMING)
    sink.take(iter(PIECES))
    mark = sink.prove((sent or Sent()).digest)
    sink.publish()
    return mark


# Digests


@given(
    st.lists(st.one_of(st.binary(max_size=200), st.integers(0, 3 * MiB)), max_size=8)
)
def test_print_is_that_of_the_whole(pieces: list[sinks.Piece]) -> None:
    data = b"".join(bytes(p) if isinstance(p, int) else p for p in pieces)
    expected = {"sha256": hashlib.sha256(data).hexdigest()}
    whole = manifest.Manifest(len(data))
    for index in range(whole.count):
        start, end = whole.span(index)
        whole.add(index, data[start:end])
    expected[sinks.MANIFEST] = whole.root()
    for algorithm, digest in expected.items():
        found = sinks.Print(algorithm, len(data))
        for piece in pieces:
            found.add(piece)
        assert found.hex() == digest


def test_print_of_too_little() -> None:
    found = sinks.Print(sinks.MANIFEST, 10)
    found.add(b"123")
    with pytest.raises(errors.ShortTransfer):
        found.hex()


# Files


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    sink = sinks.FileSink(path, "op")
    sink.begin(COMING)
    sink.take(iter(PIECES))
    assert not path.exists()
    mark = sink.prove(Sent().digest)
    assert not path.exists()
    sink.publish()
    assert path.read_bytes() == DATA
    assert path.stat().st_blocks * 512 < 2 * MiB
    assert [each.name for each in tmp_path.iterdir()] == ["image"]
    assert path.stat().st_mode & 0o777 == 0o600
    sink.abort(mark)
    assert list(tmp_path.iterdir()) == []


def test_file_of_others_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    sink = sinks.FileSink(path, "op")
    mark = fill(sink)
    path.write_bytes(DATA)
    os.utime(path, ns=(1, 1))
    sink.abort(mark)
    assert path.exists()
    sinks.FileSink(path, "op").abort()
    assert path.exists()


def test_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.symlink_to("nowhere")
    with pytest.raises(errors.ImageNotTaken, match="such a file already"):
        sinks.FileSink(path, "op").look()


def test_file_that_came_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "image"
    sink = sinks.FileSink(path, "op")
    sink.begin(COMING)
    sink.take(iter(PIECES))
    mark = sink.prove(Sent().digest)
    path.write_text("precious")
    with pytest.raises(errors.ImageNotTaken, match=os.strerror(errno.EEXIST)):
        sink.publish()
    sink.abort(mark)
    assert path.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_file_that_reads_back_otherwise(tmp_path: Path) -> None:
    sink = sinks.FileSink(tmp_path / "image", "op")
    sink.begin(COMING)
    sink.take(iter(PIECES))
    (part,) = tmp_path.iterdir()
    with part.open("r+b") as file:
        file.seek(2 * MiB)
        file.write(b"x")
    with pytest.raises(errors.ImageNotTaken, match="reads back"):
        sink.prove(Sent().digest)
    with part.open("ab") as file:
        file.write(b"x")
    with pytest.raises(errors.ImageNotTaken, match="bytes instead of"):
        sink.prove(Sent().digest)


def test_file_of_a_disk_that_changed(tmp_path: Path) -> None:
    sink = sinks.FileSink(tmp_path / "image", "op")
    sink.begin(COMING)
    with pytest.raises(errors.SourceChanged):
        sink.take(broken())
    sink.abort()
    sink.abort()
    assert list(tmp_path.iterdir()) == []


def test_file_in_no_directory(tmp_path: Path) -> None:
    sink = sinks.FileSink(tmp_path / "none/image", "op")
    with pytest.raises(errors.ImageNotTaken, match="no directory to write to"):
        sink.look()
    with pytest.raises(errors.ImageNotTaken, match=os.strerror(errno.ENOENT)):
        sink.begin(COMING)


def test_file_that_finds_no_room(tmp_path: Path) -> None:
    """A limit of the process, as a full file system would be."""
    code = (
        "import resource, signal, sys; from pathlib import Path;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from tests.unit.test_sinks import *;"
        "fill(sinks.FileSink(Path(sys.argv[1]), 'op'))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "image")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert "ImageNotTaken" in done.stderr and "no room for it" in done.stderr


# The image service


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


def sink_of(service: Service, *, is_new: bool = True, image: str = ID) -> Any:
    return glance.GlanceSink(connected(service), image, TERMS, is_new=is_new, answer=20)


def connected(service: Service) -> Any:
    return openstack.connection.Connection(
        auth_type="none", image_endpoint_override=service.url
    )


def test_service_gets_a_new_image(service: Service) -> None:
    sent = Sent()
    fill(sink_of(service), sent)
    entry = service.images[ID]
    assert service.data[ID] == DATA
    assert (entry["status"], entry["name"]) == ("active", "a guest")
    assert (entry["disk_format"], entry["container_format"]) == ("raw", "bare")
    assert (entry["min_disk"], entry["os_type"]) == (3, "linux")
    assert sent.counted == ["sha512"]


def test_service_is_heard_by_those_who_debug_too(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "keystoneauth")
    service.queue(ID)
    sink_of(service, is_new=False).look()
    fill(sink_of(service, is_new=False))
    service.images[ID]["size"] = len(DATA)
    source = sources.GlanceImage(connected(service), ID, TERMS)
    assert source.described().size == len(DATA)


def test_service_gets_a_queued_image(service: Service) -> None:
    service.queue(ID, name="theirs")
    fill(sink_of(service, is_new=False))
    entry = service.images[ID]
    assert service.data[ID] == DATA
    assert (entry["status"], entry["name"]) == ("active", "theirs")
    assert entry["disk_format"] == "raw" and entry["a~1b~0c"] == "d"


@pytest.mark.parametrize("status", ["active", "saving", "deactivated"])
def test_service_has_one_that_is_not_queued(service: Service, status: str) -> None:
    service.queue(ID, status=status)
    with pytest.raises(errors.ImageNotTaken, match=f"it is {status}, and only"):
        sink_of(service, is_new=False).look()
    assert not [each for each in service.asked if "PATCH" in each]


def test_service_has_another_digest(service: Service) -> None:
    """It is counted, too: what was sent is there to be read again."""
    service.faults.algorithm = "sha256"
    sent = Sent()
    fill(sink_of(service), sent)
    assert sent.counted == ["sha256"]


def test_service_without_a_strong_digest_is_read_back(service: Service) -> None:
    service.faults.algorithm = None
    fill(sink_of(service))
    service.faults.flip = True
    other = ID.replace("2", "3")
    with pytest.raises(errors.ImageNotTaken, match="its sha512 is"):
        fill(sink_of(service, image=other))


def test_service_stores_something_else(service: Service) -> None:
    service.faults.flip = True
    sink = sink_of(service)
    with pytest.raises(errors.ImageNotTaken, match="its sha512 is"):
        fill(sink)
    sink.abort()
    assert service.images == {}


def test_service_stores_too_little(service: Service) -> None:
    service.faults.lost = 5
    with pytest.raises(errors.ImageNotTaken, match=f"has {len(DATA) - 5} bytes"):
        fill(sink_of(service))


def test_service_does_not_make_it_active(service: Service) -> None:
    service.faults.after = "killed"
    with pytest.raises(errors.ImageNotTaken, match="it is killed after its last byte"):
        fill(sink_of(service))


def test_disk_that_changed_never_becomes_active(service: Service) -> None:
    """The chunk that would end the body is never sent."""
    sink = sink_of(service)
    sink.begin(COMING)
    with pytest.raises(errors.SourceChanged):
        sink.take(broken())
    assert service.data == {}
    sink.abort()
    assert service.images == {}
    sink.abort()


def test_connection_that_breaks(service: Service) -> None:
    service.faults.break_after = MiB
    sink = sink_of(service)
    sink.begin(COMING)
    with pytest.raises(errors.ImageNotTaken, match="does not answer"):
        sink.take(iter([b"x" * 64 * KiB] * 400))
    assert service.data == {}


@pytest.mark.parametrize("status", [401, 403, 409, 413, 500, 503])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_service_that_refuses(service: Service, method: str, status: int) -> None:
    """Nothing is sent a second time: a body can be read once."""
    service.faults.refuse[method] = status
    with pytest.raises(errors.ImageNotTaken, match=f"{status} on purpose"):
        fill(sink_of(service))
    assert sum(each.startswith(method) for each in service.asked) == 1


def test_service_that_deletes_nothing(service: Service) -> None:
    service.queue(ID)
    service.faults.refuse["DELETE"] = 403
    with pytest.raises(errors.ImageNotTaken, match="may still be there"):
        sink_of(service).abort()


def test_nobody_listens(service: Service) -> None:
    service.url = "http://127.0.0.1:1"
    with pytest.raises(errors.ImageNotTaken, match="does not answer"):
        sink_of(service).begin(COMING)


@pytest.mark.parametrize("name", ["", "../x", ID.upper()])
def test_id_that_is_none(service: Service, name: str) -> None:
    with pytest.raises(errors.ImageNotTaken, match="its id is no UUID"):
        sink_of(service, image=name)
