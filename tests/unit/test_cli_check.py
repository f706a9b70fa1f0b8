# SPDX-License-Identifier: Apache-2.0
"""What `host check` says of certificates and errors."""

import datetime
from pathlib import Path

import pytest
import trustme

from virtmigrate import address, certificates, check, errors


@pytest.mark.parametrize(
    ("days", "state"),
    [(-2, check.State.FAILED), (5, check.State.WARNING), (90, check.State.WORKS)],
)
def test_certificate_by_its_days(tmp_path: Path, days: int, state: check.State) -> None:
    now = datetime.datetime.now(datetime.UTC)
    issued = trustme.CA().issue_cert(
        "alpha",
        not_before=now - datetime.timedelta(days=10),
        not_after=now + datetime.timedelta(days=days, hours=1),
    )
    file = tmp_path / "clientcert.pem"
    issued.cert_chain_pems[0].write_to_path(str(file))
    assert certificates.read(file).days_left == days
    finding = check._certificate(file)
    assert finding.state is state
    assert f"{days} days left" in finding.detail
    assert bool(finding.remedy) == (state is not check.State.WORKS)


def test_no_certificate(tmp_path: Path) -> None:
    file = tmp_path / "clientcert.pem"
    assert check._certificate(file).state is check.State.FAILED
    file.write_text("no certificate")
    assert check._certificate(file).state is check.State.FAILED


def test_files_that_libvirt_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = address.parse("qemu+tls://beta/system?pkipath=/pki")
    assert certificates.used(there) == [
        Path("/pki/cacert.pem"),
        Path("/pki/clientcert.pem"),
    ]
    assert certificates.used(address.parse("qemu+unix:///system")) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (tmp_path / ".pki/libvirt").mkdir(parents=True)
    (tmp_path / ".pki/libvirt/clientcert.pem").touch()
    assert certificates.used(address.parse("qemu+tls://beta/system")) == [
        Path("/etc/pki/CA/cacert.pem"),
        tmp_path / ".pki/libvirt/clientcert.pem",
    ]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.HostUnreachable(host="b", reason="r"), "16514"),
        (errors.CertificateRefused(host="b", problem="expired", reason="r"), "renew"),
        (
            errors.CertificateRefused(host="b", problem="untrusted", reason="r"),
            "one authority",
        ),
        (errors.PoolNotFound(host="b", pool="p"), "instance migrate"),
    ],
    ids=["unreachable", "expired", "untrusted", "new"],
)
def test_remedy(error: errors.Error, text: str) -> None:
    assert text in check.remedy(error)


def test_version() -> None:
    assert check.version(9000000) == "9.0.0"
    assert check.version(7002022) == "7.2.22"
