# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a server's certificate, told in few words."""

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from virtmigrate import address, certificate

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@contextlib.contextmanager
def serving(pair: trustme.LeafCert) -> Iterator[int]:
    """Shake hands with one client; gives the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair.configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=shake_hands, args=(server, context))
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def shake_hands(server: socket.socket, context: ssl.SSLContext) -> None:
    plain, _ = server.accept()
    plain.settimeout(5)
    with plain, contextlib.suppress(OSError):
        context.wrap_socket(plain, server_side=True).close()


def diagnosis(pair: trustme.LeafCert, known: trustme.CA, pki: Path) -> tuple[str, str]:
    known.cert_pem.write_to_path(pki / "cacert.pem")
    with serving(pair) as port:
        uri = f"qemu+tls://127.0.0.1:{port}/system?pkipath={pki}"
        return certificate.diagnose(address.parse(uri), 5.0)


def test_expired(authority: trustme.CA, tmp_path: Path) -> None:
    pair = authority.issue_cert(
        "127.0.0.1", not_before=NOW - 2 * DAY, not_after=NOW - DAY
    )
    problem, reason = diagnosis(pair, authority, tmp_path)
    assert problem == "expired"
    assert "expired" in reason
    assert str(tmp_path) in reason


def test_not_yet_valid(authority: trustme.CA, tmp_path: Path) -> None:
    pair = authority.issue_cert(
        "127.0.0.1", not_before=NOW + DAY, not_after=NOW + 2 * DAY
    )
    assert diagnosis(pair, authority, tmp_path)[0] == "not yet valid"


@pytest.mark.parametrize("name", ["127.0.0.2", "beta"], ids=["address", "name"])
def test_wrong_name(authority: trustme.CA, tmp_path: Path, name: str) -> None:
    pair = authority.issue_cert(name)
    assert diagnosis(pair, authority, tmp_path)[0] == "wrong name"


def test_other_authority(authority: trustme.CA, tmp_path: Path) -> None:
    pair = trustme.CA().issue_cert("127.0.0.1")
    assert diagnosis(pair, authority, tmp_path)[0] == "untrusted"


def test_nothing_wrong(authority: trustme.CA, tmp_path: Path) -> None:
    problem, reason = diagnosis(authority.issue_cert("127.0.0.1"), authority, tmp_path)
    assert problem == "untrusted"
    assert "GnuTLS" in reason


def test_silent_host(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(tmp_path / "cacert.pem")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        uri = f"qemu+tls://127.0.0.1:{port}/system?pkipath={tmp_path}"
        problem, reason = certificate.diagnose(address.parse(uri), 0.2)
    assert problem == "untrusted"
    assert "timed out" in reason


def test_no_authority() -> None:
    uri = "qemu+tls://127.0.0.1/system?pkipath=/nonexistent"
    problem, reason = certificate.diagnose(address.parse(uri), 0.2)
    assert problem == "untrusted"
    assert "No such file" in reason
