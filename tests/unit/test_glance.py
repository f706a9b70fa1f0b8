# SPDX-License-Identifier: Apache-2.0
"""Images of the image service.

The SDK is the real one. The service is a stand-in that answers the two requests of API
v2 which are used, over real TLS: Glance needs a database and some sixty packages.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import openstack
import pytest
import trustme

from tests.unit.webserver import Fault, Site, serving
from virtmigrate import conf, errors, mapping, sources
from virtmigrate.sources import glance
from virtmigrate.units import GiB

ID = "2e4b6dca-9700-4715-b81d-4463cd7038de"
DATA = b"".join(b"%d\n" % number for number in range(300_000))
RBD = "rbd://647f7ae8-648a-44f5-83ad-f7bd2299274e/images/" + ID + "/snap"
SECRET = "hunter2"
ENTRY: dict[str, Any] = {
    "id": ID,
    "name": "Debian 12",
    "status": "active",
    "disk_format": "qcow2",
    "container_format": "bare",
    "size": len(DATA),
    "virtual_size": 2 * GiB,
    "min_disk": 3,
    "checksum": hashlib.md5(DATA).hexdigest(),
    "os_hash_algo": "sha512",
    "os_hash_value": hashlib.sha512(DATA).hexdigest(),
    "direct_url": RBD,
    "locations": [
        {"url": RBD, "metadata": {}},
        {"url": f"swift+https://me:{SECRET}@store/images/{ID}", "metadata": {}},
    ],
    "os_distro": "debian",
}
FILE = f"/v2/images/{ID}/file"


class Service:
    """The stand-in: what it says of the image can be changed."""

    def __init__(self, site: Site, ca_file: str) -> None:
        self.site, self.url, self.ca_file = site, site.url, ca_file
        site.files[FILE] = DATA
        version = {"id": "v2.9", "status": "CURRENT", "links": []}
        links = [{"rel": "self", "href": f"{site.url}/v2/"}]
        site.files["/"] = json.dumps(
            {"versions": [{**version, "links": links}]}
        ).encode()
        self.say()

    def say(self, **changes: object) -> None:
        """Change what is said; None leaves something out."""
        entry = {**ENTRY, **changes}
        said = {key: value for key, value in entry.items() if value is not None}
        self.site.files[f"/v2/images/{ID}"] = json.dumps(said).encode()

    def image(self, retry_seconds: float = 30) -> Any:
        connection = openstack.connection.Connection(
            auth_type="none", image_endpoint_override=self.url, cacert=self.ca_file
        )
        terms = sources.Terms(timeout=30, retry_seconds=retry_seconds)
        return glance.GlanceImage(connection, ID, terms)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def service(authority: trustme.CA, tmp_path: Path) -> Iterator[Service]:
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    with serving(authority) as site:
        yield Service(site, str(bundle))


def received(source: sources.Source) -> bytes:
    got = bytearray()
    sources.verified(source, got.extend, lambda: None, max_size=GiB)
    return bytes(got)


def test_image_is_fetched(service: Service) -> None:
    source = service.image()
    assert received(source) == DATA
    assert source.origin == f"glance:{ID}"


def test_the_service_of_the_configuration(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id alone is the service's, which clouds.yaml says how to reach."""
    clouds = tmp_path / "clouds.yaml"
    clouds.write_text(
        "clouds:\n  here:\n    auth_type: none\n"
        f"    image_endpoint_override: {service.url}\n    cacert: {service.ca_file}\n"
    )
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(clouds))
    made = conf.load()
    with pytest.raises(errors.ImageUnavailable, match="image_service_cloud"):
        mapping.named_image(made, ID)
    made.set_override("image_service_cloud", "nowhere", "virtmigrate")
    with pytest.raises(errors.ConfigurationError, match="nowhere"):
        mapping.named_image(made, ID)
    made.set_override("image_service_cloud", "here", "virtmigrate")
    assert received(mapping.named_image(made, ID)) == DATA


def test_what_is_said(service: Service) -> None:
    assert service.image().described() == sources.Described(
        name="Debian 12",
        format="qcow2",
        size=len(DATA),
        checksum=sources.Checksum("sha512", ENTRY["os_hash_value"]),
        min_disk=3 * GiB,
        virtual_size=2 * GiB,
        locations=(RBD,),
    )


def test_urls_of_other_stores_are_not_kept(service: Service) -> None:
    """They have passwords in them."""
    service.say(direct_url=None)
    assert SECRET not in repr(service.image().described())


def test_cut_connection_goes_on_where_it_was(service: Service) -> None:
    source = service.image()
    source.described()
    service.site.fault = Fault(times=1, cut=100_000)
    got = bytearray()
    source.read(got.extend, lambda: None)
    assert got == DATA
    parts = [part for _, path, part in service.site.asked if path == FILE]
    assert parts == [None, "bytes=100000-"]


@pytest.mark.parametrize("status", [500, 503])
def test_failure_that_passes(service: Service, status: int) -> None:
    service.site.fault = Fault(times=2, status=status)
    assert received(service.image()) == DATA


@pytest.mark.parametrize("status", [401, 403, 404, 300])
def test_failure_that_stays(service: Service, status: int) -> None:
    source = service.image()
    source.described()
    service.site.fault = Fault(times=99, status=status)
    with pytest.raises(errors.ImageUnavailable, match=f"glance:{ID}"):
        received(source)


def test_wrong_bytes(service: Service) -> None:
    service.site.files[FILE] = DATA[:-1] + b"x"
    with pytest.raises(errors.ImageRefused, match="its sha512 is"):
        received(service.image())


def test_strong_digest_counts_and_not_the_weak_one(service: Service) -> None:
    service.say(checksum="0" * 32)
    assert received(service.image()) == DATA


def test_weak_digest_if_there_is_no_better(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.say(os_hash_algo=None, os_hash_value=None)
    with caplog.at_level(logging.WARNING):
        assert received(service.image()) == DATA
    assert "no digest but md5" in caplog.text
    service.site.files[FILE] = DATA[:-1] + b"x"
    with pytest.raises(errors.ImageRefused, match="its md5 is"):
        received(service.image())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"container_format": "ovf"}, "in a container"),
        ({"container_format": None}, "in a container"),
        ({"os_hash_algo": None, "checksum": None}, "no digest"),
        ({"os_hash_algo": "sha1"}, "no digest that is known"),
        ({"os_hash_value": "00"}, "is no sha512"),
        ({"size": len(DATA) - 1}, "more than"),
        ({"size": len(DATA) + 1}, "are promised"),
        ({"size": 2 * GiB}, "are allowed"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_image_that_is_refused(
    service: Service, changes: dict[str, object], reason: str
) -> None:
    service.say(**changes)
    with pytest.raises(errors.ImageRefused, match=reason):
        received(service.image())


@pytest.mark.parametrize("status", ["queued", "saving", "deactivated", "killed"])
def test_image_that_is_not_active(service: Service, status: str) -> None:
    service.say(status=status)
    with pytest.raises(errors.ImageUnavailable, match=f"its status is {status}"):
        service.image().described()


@pytest.mark.parametrize(
    "changes", [{"status": 7}, {"size": "big"}, {"locations": [1]}], ids=str
)
def test_entry_that_is_none(service: Service, changes: dict[str, object]) -> None:
    service.say(**changes)
    with pytest.raises(errors.ImageUnavailable, match="cannot be read"):
        service.image().described()


def test_format_is_the_doors_to_judge(service: Service) -> None:
    service.say(disk_format="ploop")
    assert service.image().described().format == "ploop"
    service.say(disk_format=None)
    assert service.image().described().format == "unknown"


@pytest.mark.parametrize("name", ["", "../" + ID, ID.upper(), f"{ID}/file", f"{ID}\n"])
def test_id_that_is_none(service: Service, name: str) -> None:
    with pytest.raises(errors.ImageUnavailable, match="its id is no UUID"):
        glance.GlanceImage(cast(Any, None), name)


def test_untrusted_certificate(service: Service, tmp_path: Path) -> None:
    bundle = tmp_path / "others.pem"
    trustme.CA().cert_pem.write_to_path(str(bundle))
    service.ca_file = str(bundle)
    with pytest.raises(errors.ImageUnavailable, match="unavailable or misconfigured"):
        service.image(retry_seconds=0).described()
    assert not service.site.asked


def test_nobody_listens(service: Service) -> None:
    service.url = "https://127.0.0.1:1"
    with pytest.raises(errors.ImageUnavailable, match="unavailable or misconfigured"):
        service.image(retry_seconds=0).described()


def test_service_that_goes_away(service: Service) -> None:
    source = service.image(retry_seconds=0)
    source.described()
    source._connection.image.endpoint_override = "https://127.0.0.1:1/v2"
    with pytest.raises(errors.ImageUnavailable, match="connection failed"):
        source.described()
