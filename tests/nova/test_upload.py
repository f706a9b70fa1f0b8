# SPDX-License-Identifier: Apache-2.0
"""Images that Nova's own client sends, over HTTP, to a stand-in for the service."""

import hashlib
from collections.abc import Iterator
from typing import Any

import nova.conf
import pytest
from glanceclient.v2 import image_schema
from nova import context

from tests.nova import cloud
from tests.unit import imageservice
from virtmigrate import errors, sinks
from virtmigrate.nova_plugin import glance, upload
from virtmigrate.sources.base import Checksum
from virtmigrate.units import KiB, MiB

IMAGE = "2e4b6dca-9700-4715-b81d-4463cd7038de"
PIECES: list[sinks.Piece] = [b"one" * KiB, 300 * KiB, b"two" * MiB]
DATA = b"".join(each if isinstance(each, bytes) else bytes(each) for each in PIECES)


@pytest.fixture
def service() -> Iterator[imageservice.Service]:
    conf = nova.conf.CONF
    conf([], project="nova", default_config_files=[])
    with imageservice.serving() as made:
        conf.set_override("api_servers", [made.url], "glance")
        conf.set_override("num_retries", 2, "glance")
        made.queue(IMAGE)
        # What glanceclient asks for first: /v2/schemas/image.
        made.images["image"] = {**image_schema._BASE_SCHEMA}
        yield made
    # Nova's own test cases begin with one that was never called.
    conf.reset()


USER = context.RequestContext(auth_token="token", is_admin=False)


def sent(pieces: Iterator[sinks.Piece] | None = None) -> Any:
    """Return a sink that took the bytes."""
    sink = upload.Upload(USER, IMAGE)
    sink.look()
    said = {"image_state": "available"}
    sink.begin(sinks.Announced("made", "raw", len(DATA), len(DATA), said))
    sink.take(iter(PIECES) if pieces is None else pieces)
    return sink


def digest(algorithm: str) -> str:
    return hashlib.new(algorithm, DATA).hexdigest()


@pytest.mark.parametrize("algorithm", ["sha512", "sha256", None])
def test_sent_and_proven(service: imageservice.Service, algorithm: str | None) -> None:
    """By the digest of the service; read back where it has none that is strong."""
    service.faults.algorithm = algorithm
    sink = sent()
    sink.prove(digest)
    found = glance.NovaImage(USER, IMAGE).described().checksum
    assert found == Checksum(algorithm or "md5", digest(algorithm or "md5"))
    entry = service.images[IMAGE]
    assert service.data[IMAGE] == DATA
    assert (entry["status"], entry["disk_format"]) == ("active", "raw")
    assert (entry["container_format"], entry["image_state"]) == ("bare", "available")
    sink.abort()
    sink.abort()
    assert IMAGE not in service.images


@pytest.mark.parametrize("fault", ["flip", "lost"])
def test_what_is_stored_is_something_else(
    service: imageservice.Service, fault: str
) -> None:
    setattr(service.faults, fault, 1)
    with pytest.raises(errors.ImageNotTaken):
        sent().prove(digest)


def test_broken_off_is_not_sent_again(service: imageservice.Service) -> None:
    """Nova's client would go on from where it stopped, and have an active image."""
    service.faults.break_after = MiB
    with pytest.raises(errors.ImageNotTaken, match="broke off"):
        sent()
    cloud.until(lambda: service.images[IMAGE]["status"] == "queued")
    assert not service.data


def test_what_ends_the_reading_goes_on(service: imageservice.Service) -> None:
    def pieces() -> Iterator[sinks.Piece]:
        yield b"a beginning"
        raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        sent(pieces())
    cloud.until(lambda: service.images[IMAGE]["status"] == "queued")


def test_image_that_has_bytes_is_not_touched(service: imageservice.Service) -> None:
    service.images[IMAGE]["status"] = "active"
    with pytest.raises(errors.ImageNotTaken, match="only a queued one"):
        sent()
