# SPDX-License-Identifier: Apache-2.0
"""What libvirt's codes and texts become. The texts are libvirt 9.0's own."""

import dataclasses
import errno

import libvirt
import pytest

from virtmigrate import errors, translation

RPC = libvirt.VIR_FROM_RPC
STORAGE = libvirt.VIR_FROM_STORAGE
ASKING = translation.Doing(host="alpha", doing="asking", seconds=3.0)


def failure(code: int, domain: int, text: str, int1: int = -1) -> libvirt.libvirtError:
    error = libvirt.libvirtError(text)
    error.err = (code, domain, text, 2, "%s", text, None, int1, -1)
    return error


def translated(error: libvirt.libvirtError, *, lost: bool = False) -> errors.Error:
    return translation.translate(error, dataclasses.replace(ASKING, lost=lost))


BY_CODE = [
    (libvirt.VIR_ERR_NO_DOMAIN, "instance vm is not on host alpha"),
    (libvirt.VIR_ERR_DOM_EXIST, "instance vm is already on host alpha: text"),
    (libvirt.VIR_ERR_NO_STORAGE_POOL, "host alpha has no storage pool p"),
    (libvirt.VIR_ERR_NO_STORAGE_VOL, "host alpha: pool p has no volume v"),
    (libvirt.VIR_ERR_STORAGE_VOL_EXIST, "host alpha: pool p already has a volume v"),
    (libvirt.VIR_ERR_NO_CONNECT, "host alpha cannot be reached: text"),
    (libvirt.VIR_ERR_AUTH_FAILED, "host alpha does not let us in: text"),
    (libvirt.VIR_ERR_AUTH_CANCELLED, "host alpha does not let us in: text"),
    (libvirt.VIR_ERR_AUTH_UNAVAILABLE, "host alpha does not let us in: text"),
    (libvirt.VIR_ERR_NO_SUPPORT, "host alpha: asking: text (libvirt code 3, domain 7)"),
]


@pytest.mark.parametrize(("code", "said"), BY_CODE)
def test_by_code(code: int, said: str) -> None:
    doing = dataclasses.replace(ASKING, instance="vm", pool="p", volume="v")
    assert str(translation.translate(failure(code, RPC, "text"), doing)) == said


NAMED = [
    (
        libvirt.VIR_ERR_NO_DOMAIN,
        "Domain not found: no domain with matching name 'x'",
        "instance x is not on host alpha",
    ),
    (
        libvirt.VIR_ERR_NO_STORAGE_POOL,
        "Storage pool not found: no storage pool with matching name 'x'",
        "host alpha has no storage pool x",
    ),
    (
        libvirt.VIR_ERR_NO_STORAGE_VOL,
        "Storage volume not found: no storage vol with matching name 'x'",
        "host alpha: pool ? has no volume x",
    ),
    (
        libvirt.VIR_ERR_STORAGE_VOL_EXIST,
        "storage volume 'x' exists already",
        "host alpha: pool ? already has a volume x",
    ),
    (
        libvirt.VIR_ERR_NO_STORAGE_VOL,
        "Storage volume not found",
        "host alpha: pool ? has no volume asking",
    ),
]


@pytest.mark.parametrize(("code", "text", "said"), NAMED)
def test_name_from_text(code: int, text: str, said: str) -> None:
    assert str(translated(failure(code, STORAGE, text))) == said


BUSY = [
    (
        libvirt.VIR_ERR_INTERNAL_ERROR,
        "internal error: pool 'x' has asynchronous jobs running.",
        "x",
    ),
    (
        libvirt.VIR_ERR_OPERATION_INVALID,
        "Requested operation is not valid: volume 'v' is still being allocated.",
        "?",
    ),
    (
        libvirt.VIR_ERR_OPERATION_INVALID,
        "Requested operation is not valid: volume 'v' is still in use.",
        "?",
    ),
]


@pytest.mark.parametrize(("code", "text", "pool"), BUSY)
def test_pool_busy(code: int, text: str, pool: str) -> None:
    error = translated(failure(code, STORAGE, text))
    assert isinstance(error, errors.PoolBusy)
    assert str(error) == f"host alpha: pool {pool} is still busy after 3 s: {text}"


LOST = [
    "unable to connect to server at 'alpha:16514': Connection refused",
    "End of file while reading data: Input/output error",
    "Cannot write data: Broken pipe",
]


@pytest.mark.parametrize("text", LOST)
def test_connection_lost(text: str) -> None:
    error = translated(failure(libvirt.VIR_ERR_SYSTEM_ERROR, RPC, text), lost=True)
    assert isinstance(error, errors.HostUnreachable)


def test_connection_lost_unknown_code() -> None:
    text = "internal error: client socket is closed"
    error = failure(libvirt.VIR_ERR_INTERNAL_ERROR, RPC, text)
    assert isinstance(translated(error, lost=True), errors.HostUnreachable)


def test_host_cannot_reach_another() -> None:
    """Over a living connection, it is the host that cannot reach its peer."""
    text = "unable to connect to server at 'beta:16514': Connection refused"
    error = translated(failure(libvirt.VIR_ERR_SYSTEM_ERROR, RPC, text, 111))
    assert isinstance(error, errors.LibvirtFailed)
    assert error.errno == 111


def test_no_right_to_socket() -> None:
    text = "Failed to connect socket to '/run/libvirt/libvirt-sock': Permission denied"
    error = failure(libvirt.VIR_ERR_SYSTEM_ERROR, RPC, text, errno.EACCES)
    assert isinstance(translated(error, lost=True), errors.AuthenticationFailed)


OURS = [
    "Our own certificate /p/clientcert.pem failed validation against /p/cacert.pem: "
    "The certificate hasn't got a known issuer.",
    "The client certificate /p/clientcert.pem has expired",
    "The client certificate /p/clientcert.pem is not yet active",
    "Unable to set x509 key and certificate: /p/clientkey.pem, /p/clientcert.pem: "
    "Error while reading file.",
    "Unable to import client certificate /p/clientcert.pem",
    "Certificate /p/clientcert.pem usage does not permit digital signature",
    "The certificate /p/clientcert.pem basic constraints show a CA, but we need one "
    "for a client",
    "Unable to read TLS confirmation: Input/output error",
]


@pytest.mark.parametrize("text", OURS)
def test_own_certificate(text: str) -> None:
    error = translated(failure(libvirt.VIR_ERR_SYSTEM_ERROR, RPC, text), lost=True)
    assert isinstance(error, errors.CertificateRefused)
    assert error.problem == "our own certificate"
    assert text in str(error)


AUTHORITY = [
    "Cannot read CA certificate '/p/cacert.pem': No such file or directory",
    "The CA certificate /p/cacert.pem has expired",
    "Unable to import CA certificate list /p/cacert.pem",
    "Unable to set x509 CA certificate: /p/cacert.pem: Error while reading file.",
]


@pytest.mark.parametrize("text", AUTHORITY)
def test_own_authority(text: str) -> None:
    error = translated(failure(libvirt.VIR_ERR_SYSTEM_ERROR, RPC, text), lost=True)
    assert isinstance(error, errors.CertificateRefused)
    assert error.problem == "our own CA certificate"


def test_unverified_peer() -> None:
    text = "authentication failed: Failed to verify peer's certificate"
    error = failure(libvirt.VIR_ERR_AUTH_FAILED, RPC, text)
    assert translation.is_unverified(error)
    assert isinstance(translated(error, lost=True), errors.CertificateRefused)


def test_no_tls_there() -> None:
    text = "authentication failed: TLS handshake failed An unexpected TLS packet"
    error = failure(libvirt.VIR_ERR_AUTH_FAILED, RPC, text)
    assert isinstance(translated(error, lost=True), errors.HostUnreachable)


def test_no_details(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made of what another test left as the thread's last error, it would differ.
    monkeypatch.setattr(libvirt.libvirtmod, "virGetLastError", lambda: None)
    error = libvirt.libvirtError("openAuth failed")
    error.err = None
    translation.forget()
    assert "openAuth failed" in str(translated(error))
    assert isinstance(translated(error, lost=True), errors.HostUnreachable)


def test_details_that_the_binding_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt.libvirtmod, "virGetLastError", lambda: None)
    kept = (libvirt.VIR_ERR_NO_STORAGE_VOL, 18, "no volume 'x'", 2, *[None] * 3, -1, -1)
    translation.keep(None, kept)
    error = libvirt.libvirtError("lookup failed")
    assert error.err is None
    assert isinstance(translated(error), errors.VolumeNotFound)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(number: int) -> None:
    code, domain = libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_STREAMS
    error = libvirt.libvirtError("x")
    error.err = (code, domain, "cannot write", 2, None, None, None, number, -1)
    assert isinstance(translated(error), errors.DiskFull)


NO_CALL_SAID = [
    None,
    (0, 0, None, 0, None, None, None, 0, 0),
    (libvirt.VIR_ERR_SYSTEM_ERROR, RPC, "Cannot write data", 2, *[None] * 3, 5, -1),
]


@pytest.mark.parametrize("lost", NO_CALL_SAID)
def test_an_exception_that_knows_nothing(lost: tuple[object, ...] | None) -> None:
    """What libvirt said last in this thread is what it is about."""
    real = failure(libvirt.VIR_ERR_STORAGE_VOL_EXIST, libvirt.VIR_FROM_STORAGE, "vol")
    translation.keep(None, real.err)
    error = libvirt.libvirtError("lost")
    error.err = lost
    assert isinstance(translated(error), errors.VolumeExists)


def test_an_earlier_exception_is_not_the_newest() -> None:
    earlier = failure(libvirt.VIR_ERR_STORAGE_VOL_EXIST, STORAGE, "vol")
    translation.keep(None, earlier.err)
    translation.keep(None, failure(libvirt.VIR_ERR_NO_STORAGE_VOL, STORAGE, "v").err)
    assert isinstance(translated(earlier), errors.VolumeExists)
