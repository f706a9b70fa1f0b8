# SPDX-License-Identifier: Apache-2.0
"""Images from files and web servers: the promised bytes, each once, or an error."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from tests.unit.webserver import Fault, Site, serving
from virtmigrate import conf, errors, sources
from virtmigrate.sources import base
from virtmigrate.units import GiB, KiB, MiB

DATA = b"".join(b"%d\n" % number for number in range(400_000))
SECRET = "hunter2"


def digest(data: bytes = DATA, algorithm: str = "sha256") -> sources.Checksum:
    return sources.Checksum(algorithm, hashlib.new(algorithm, data).hexdigest())


def nothing() -> None:
    pass


def received(source: sources.Source, max_size: int = GiB) -> bytes:
    got = bytearray()
    found = sources.verified(source, got.extend, nothing, max_size=max_size)
    assert found.size == len(got)
    return bytes(got)


# Digests


@pytest.mark.parametrize("algorithm", base.STRONG)
def test_digest_that_proves(algorithm: str) -> None:
    assert not digest(algorithm=algorithm).is_weak


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [
        ("sha1", "0" * 40),
        ("crc32", "0" * 8),
        ("sha256", "0" * 63),
        ("sha256", "A" * 64),
        ("sha512", "0" * 64),
        ("md5", ""),
        ("", ""),
    ],
)
def test_digest_that_is_none(algorithm: str, text: str) -> None:
    with pytest.raises(ValueError):
        sources.Checksum(algorithm, text)


# Files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(DATA)
    return path


def test_file(path: Path) -> None:
    source = sources.LocalFile(path, "qcow2", digest(), min_disk=GiB)
    assert received(source) == DATA
    described = source.described()
    assert (described.format, described.size) == ("qcow2", len(DATA))
    assert (described.name, described.min_disk) == ("image.qcow2", GiB)
    assert source.origin == str(path)


def test_file_without_a_digest_gets_one(path: Path) -> None:
    source = sources.LocalFile(path, "raw")
    found = sources.verified(source, lambda _: None, nothing, max_size=GiB)
    assert found == sources.Received(len(DATA), digest())


def test_chunks_are_bounded(path: Path) -> None:
    path.write_bytes(bytes(3 * MiB + 5))
    sizes: list[int] = []
    checks: list[int] = []
    source = sources.LocalFile(path, "raw")
    source.read(lambda data: sizes.append(len(data)), lambda: checks.append(1))
    assert max(sizes) <= base.CHUNK and sum(sizes) == 3 * MiB + 5
    assert len(checks) >= len(sizes)


def test_file_from_a_place_on(path: Path) -> None:
    got = bytearray()
    sources.LocalFile(path, "raw").read(got.extend, nothing, start=1000)
    assert got == DATA[1000:]


def test_wrong_digest(path: Path) -> None:
    source = sources.LocalFile(path, "raw", digest(b"other"))
    with pytest.raises(
        errors.ImageRefused, match=f"promised was {digest(b'other').hex}"
    ):
        received(source)


def test_more_than_allowed(path: Path) -> None:
    with pytest.raises(errors.ImageRefused, match="1024 are allowed"):
        received(sources.LocalFile(path, "raw"), max_size=KiB)


@pytest.mark.parametrize("what", ["grow", "shrink", "rewrite"])
def test_file_that_changes_while_it_is_read(path: Path, what: str) -> None:
    def change(_: bytes) -> None:
        if what == "grow":
            with path.open("ab") as file:
                file.write(b"more")
        elif what == "shrink":
            os.truncate(path, base.CHUNK + 1)
        else:
            os.utime(path, ns=(0, 0))

    with pytest.raises(errors.SourceChanged, match="changed while it was read"):
        sources.LocalFile(path, "raw").read(change, nothing)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(errors.ImageUnavailable):
            sources.LocalFile(path, "raw").described()


def test_cancelled(path: Path) -> None:
    def check() -> None:
        raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        sources.LocalFile(path, "raw").read(lambda _: None, check)


# Web servers


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def terms(authority: trustme.CA, tmp_path: Path) -> sources.Terms:
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    return sources.Terms(timeout=30, retry_seconds=30, ca_file=str(bundle))


@pytest.fixture
def site(authority: trustme.CA) -> Iterator[Site]:
    with serving(authority) as site:
        site.files["/a/image.raw"] = DATA
        yield site


def web(
    site: Site, terms: sources.Terms, path: str = "/a/image.raw"
) -> sources.WebFile:
    return sources.WebFile(site.url + path, "raw", digest(), terms)


def test_https(site: Site, terms: sources.Terms) -> None:
    source = web(site, terms)
    assert received(source) == DATA
    described = source.described()
    assert (described.name, described.size) == ("image.raw", len(DATA))
    assert [method for method, _, _ in site.asked] == ["HEAD", "GET"]


def test_http(terms: sources.Terms) -> None:
    """The digest proves what comes, whoever else is on the wire."""
    with serving() as site:
        site.files["/i"] = DATA
        assert received(web(site, terms, "/i")) == DATA


def test_cut_connection_goes_on_where_it_was(site: Site, terms: sources.Terms) -> None:
    site.fault = Fault(times=2, cut=100_000)
    assert received(web(site, terms)) == DATA
    asked = [part for method, _, part in site.asked if method == "GET"]
    assert asked == [None, "bytes=100000-", "bytes=200000-"]


def test_cut_connection_of_unknown_length(site: Site, terms: sources.Terms) -> None:
    """Its end looks like the end of the data: the size or the digest tells."""
    site.fault = Fault(cut=100_000, unsized=True)
    with pytest.raises(errors.ImageRefused, match="it has 100000 bytes"):
        received(web(site, terms))


def test_server_without_ranges(site: Site, terms: sources.Terms) -> None:
    """What is known already is passed over."""
    site.fault = Fault(times=1, cut=1_500_000)
    source = web(site, terms)
    got = bytearray()

    def write(data: bytes) -> None:
        got.extend(data)
        if site.fault and not site.fault.times and not site.fault.no_range:
            site.fault = Fault(times=9, no_range=True)

    source.read(write, nothing)
    assert got == DATA


def test_from_a_place_on(site: Site, terms: sources.Terms) -> None:
    got = bytearray()
    web(site, terms).read(got.extend, nothing, start=12345)
    assert got == DATA[12345:]


def test_nothing_is_left(site: Site, terms: sources.Terms) -> None:
    got: list[bytes] = []
    web(site, terms).read(got.append, nothing, start=len(DATA))
    assert not got


def test_another_part_than_asked_for(site: Site, terms: sources.Terms) -> None:
    site.fault = Fault(wrong_range=True)
    with pytest.raises(errors.ImageUnavailable, match="another part"):
        web(site, terms).read(lambda _: None, nothing, start=5)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_failure_that_passes(site: Site, terms: sources.Terms, status: int) -> None:
    site.fault = Fault(status=status)
    assert received(web(site, terms)) == DATA


@pytest.mark.parametrize("status", [401, 403, 404, 410, 204])
def test_failure_that_stays(site: Site, terms: sources.Terms, status: int) -> None:
    site.fault = Fault(times=9, status=status)
    with pytest.raises(errors.ImageUnavailable, match=f"answered {status}"):
        received(web(site, terms))
    assert len(site.asked) == 2


def test_patience_ends(site: Site, terms: sources.Terms) -> None:
    site.fault = Fault(times=1000, status=503)
    with pytest.raises(errors.ImageUnavailable, match="answered 503"):
        received(web(site, replace(terms, retry_seconds=0.5)))
    assert len(site.asked) > 2


@pytest.mark.parametrize(
    "fault", [Fault(times=99, cut=1000, stall=True)], ids=["stall"]
)
def test_server_that_stalls(site: Site, terms: sources.Terms, fault: Fault) -> None:
    site.fault = fault
    with pytest.raises(errors.ImageUnavailable, match="connection failed"):
        received(web(site, replace(terms, timeout=0.3, retry_seconds=0)))


def test_server_that_drips(site: Site, terms: sources.Terms) -> None:
    site.fault = Fault(times=99, drip=True)
    with pytest.raises(
        errors.ImageUnavailable, match="less than 1024 bytes per second"
    ):
        received(web(site, replace(terms, timeout=0.5, retry_seconds=0)))


def test_nobody_listens(terms: sources.Terms) -> None:
    source = sources.WebFile("http://127.0.0.1:1/i?token=" + SECRET, "raw", digest())
    source._terms = replace(terms, retry_seconds=0)
    with pytest.raises(errors.ImageUnavailable, match="connection failed") as caught:
        source.read(lambda _: None, nothing)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_wrong_digest_from_a_server(site: Site, terms: sources.Terms) -> None:
    site.files["/a/image.raw"] = DATA[:-1] + b"x"
    with pytest.raises(errors.ImageRefused, match="its sha256 is"):
        received(web(site, terms))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(more=b"x", unsized=True), "more than"),
        (Fault(cut=-1, unsized=True), "and .* are promised"),
    ],
    ids=["too long", "too short"],
)
def test_another_size_than_promised(
    site: Site, terms: sources.Terms, fault: Fault, reason: str
) -> None:
    site.fault = fault
    with pytest.raises(errors.ImageRefused, match=reason):
        received(web(site, terms))


def test_server_that_sends_without_an_end(site: Site, terms: sources.Terms) -> None:
    """No more is written than allowed."""
    source = web(site, terms)
    source.__dict__["_size"] = None
    got = bytearray()
    with pytest.raises(errors.ImageRefused, match="more than 4096 bytes"):
        sources.verified(source, got.extend, nothing, max_size=4096)
    assert len(got) <= 4096


# Whom is trusted


def test_untrusted_certificate(site: Site, terms: sources.Terms) -> None:
    strangers = replace(terms, ca_file=None, retry_seconds=0)
    with pytest.raises(errors.ImageUnavailable, match="certificate is refused"):
        received(web(site, strangers))
    assert not site.asked


def test_environment_is_not_asked(
    site: Site, terms: sources.Terms, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither for a proxy, nor for certificates, nor for a password."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine localhost login me password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    assert received(web(site, terms)) == DATA
    assert not any("Authorization" in each for each in site.headers)


def test_redirects_are_followed(site: Site, terms: sources.Terms) -> None:
    site.redirects = {"/old": "/older", "/older": site.url + "/a/image.raw"}
    assert received(web(site, terms, "/old")) == DATA


def test_redirect_in_a_circle(site: Site, terms: sources.Terms) -> None:
    site.redirects = {"/a": "/b", "/b": "/a"}
    with pytest.raises(errors.ImageUnavailable, match="more than 5 times"):
        received(web(site, terms, "/a"))


def test_redirect_from_https_to_http(site: Site, terms: sources.Terms) -> None:
    with serving() as plain:
        plain.files["/i"] = DATA
        site.redirects = {"/old": f"{plain.url}/i?token={SECRET}"}
        with pytest.raises(errors.ImageUnavailable, match="from https to") as caught:
            received(web(site, terms, "/old"))
        assert not plain.asked and SECRET not in str(caught.value)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://x/y", "gopher:x"])
def test_redirect_to_what_is_no_web(
    site: Site, terms: sources.Terms, location: str
) -> None:
    site.redirects = {"/old": location}
    with pytest.raises(errors.ImageUnavailable, match="only URLs with https"):
        received(web(site, terms, "/old"))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "https:///x", "http://[", ""]
)
def test_url_that_is_none(url: str) -> None:
    with pytest.raises(errors.ImageUnavailable, match="only URLs with https"):
        sources.WebFile(url, "raw", digest())


def test_weak_digest_of_a_server_is_refused() -> None:
    with pytest.raises(errors.ImageRefused, match="md5 does not prove"):
        sources.WebFile("https://x/y", "raw", digest(algorithm="md5"))


def test_secrets_are_not_shown(
    site: Site, terms: sources.Terms, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="virtmigrate")
    url = re.sub("//", f"//me:{SECRET}@", site.url) + f"/a/image.raw?token={SECRET}"
    source = sources.WebFile(url, "raw", digest(), terms)
    site.fault = Fault(times=2, status=503)
    assert received(source) == DATA
    assert source.origin == f"{site.url}/a/image.raw#sha256={digest().hex}"
    ours = [each.getMessage() for each in caplog.records if "virtmigrate" in each.name]
    assert ours and not any(SECRET in each for each in ours)
    assert site.headers[-1]["Authorization"].startswith("Basic ")


def test_waiting_can_be_cancelled(site: Site, terms: sources.Terms) -> None:
    site.fault = Fault(times=1000, status=503)
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) > 4:
            raise errors.Cancelled

    with pytest.raises(errors.Cancelled):
        web(site, terms).read(lambda _: None, check)


def test_terms_are_configured(tmp_path: Path) -> None:
    text = "[virtmigrate]\nimage_source_timeout=3\nimage_retry_timeout=4\n"
    (tmp_path / "c").write_text(text + "image_ca_file=/ca.pem\n")
    found = sources.Terms.configured(conf.load(tmp_path / "c"))
    assert found == sources.Terms(3.0, 4.0, "/ca.pem")
