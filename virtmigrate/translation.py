# SPDX-License-Identifier: Apache-2.0
"""libvirt's errors in our words: the one place that reads codes and texts.

A code decides wherever it can. libvirt has one code for several causes in TLS
and for a busy pool; there the text decides, as libvirt 9.0 to 11.3 have it.
"""

import collections
import errno
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libvirt

from virtmigrate import errors

UNVERIFIED = "Failed to verify peer's certificate"

_BUSY = re.compile(
    r"has asynchronous jobs running|volume '.*' is still (being allocated|in use)"
)
_FILE_EXISTS = re.compile(
    r"volume target path '.*' already exists|already exists in volume group"
)
_GROUP_FULL = re.compile(r"insufficient (free space|suitable allocatable extents)")
_NO_CONFIRMATION = "Unable to read TLS confirmation"

# Texts about files of our own, with what is wrong there.
_OUR_FILES = (
    (re.compile(r"CA certificate"), "our own CA certificate"),
    (re.compile(r"Our own certificate"), "our own certificate"),
    (re.compile(r"client (certificate|key)"), "our own certificate"),
    (re.compile(r"x509 (key|certificate)"), "our own certificate"),
    (re.compile(r"^Certificate \S*/\S* (usage|purpose)"), "our own certificate"),
    (re.compile(r"^The certificate \S*/\S* "), "our own certificate"),
)

_LOGIN_CODES = {
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_CANCELLED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
}


@dataclass(frozen=True)
class Doing:
    """What was asked of a host when libvirt failed."""

    host: str
    doing: str  # "creating volume x"
    lost: bool = False  # the connection is gone, or never was there
    seconds: float = 0.0  # since it began
    instance: str | None = None  # these three: where the caller knows them
    pool: str | None = None
    volume: str | None = None


class _Heard(threading.local):
    """What libvirt said in one thread, as libvirtError.err has it."""

    def __init__(self) -> None:
        self.errors: collections.deque[tuple[Any, ...]] = collections.deque(maxlen=32)


_heard = _Heard()


def keep(_: object, error: tuple[Any, ...]) -> None:
    """Keep what a failed call of this thread says; libvirt calls this for each one.

    The binding reads it only when it makes the exception. A libvirt object that the
    garbage collector frees in between clears it there, or, when its connection is
    broken, puts an error of its own in its place: the exception that is raised then
    knows nothing, or tells of something else. No failed call ever said the latter.
    """
    _heard.errors.append(tuple(error))


def forget() -> None:
    """Forget what libvirt said in this thread until now."""
    _heard.errors.clear()


def restore(error: libvirt.libvirtError) -> libvirt.libvirtError:
    """Give an exception that was made with no call's error that of the newest call."""
    if _heard.errors and error.err not in _heard.errors:
        error.err = _heard.errors[-1]
    return error


def code(error: libvirt.libvirtError) -> int | None:
    """Return VIR_ERR_*, also of an exception that lost it."""
    found: int | None = restore(error).get_error_code()
    return found


def translate(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    """Return the error of ours that says what libvirt's means."""
    restore(error)
    if _is_full(error):
        return _disk_full(error, doing)
    found = _BY_CODE.get(error.get_error_code())
    if found is not None:
        return found(error, doing)
    if _BUSY.search(_text(error)):
        return _pool_busy(error, doing)
    if _is_made_behind_its_back(error):
        return _volume_exists(error, doing)
    if doing.lost:
        return _connection_failed(error, doing)
    return _failed(error, doing)


def is_unverified(error: libvirt.libvirtError) -> bool:
    """Tell whether the peer's certificate was refused; libvirt never says why."""
    return UNVERIFIED in _text(error)


# Private


def _text(error: libvirt.libvirtError) -> str:
    return str(error.get_error_message() or error)


def _quoted(error: libvirt.libvirtError) -> str | None:
    """Return the name that libvirt puts in quotes."""
    found = re.search(r"'([^']+)'", _text(error))
    return found[1] if found else None


def _instance_not_found(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    name = doing.instance or _quoted(error) or doing.doing
    return errors.InstanceNotFound(host=doing.host, instance=name)


def _instance_exists(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    name = doing.instance or _quoted(error) or doing.doing
    reason = _text(error)
    return errors.InstanceExists(host=doing.host, instance=name, reason=reason)


def _pool_not_found(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    name = doing.pool or _quoted(error) or doing.doing
    return errors.PoolNotFound(host=doing.host, pool=name)


def _volume_not_found(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    name = doing.volume or _quoted(error) or doing.doing
    pool = doing.pool or "?"
    return errors.VolumeNotFound(host=doing.host, pool=pool, volume=name)


def _volume_exists(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    name = doing.volume or _quoted(error) or doing.doing
    pool = doing.pool or "?"
    return errors.VolumeExists(host=doing.host, pool=pool, volume=name)


def _is_made_behind_its_back(error: libvirt.libvirtError) -> bool:
    """Tell whether a volume's file is there that libvirt did not know of.

    Another host made it, in a directory that both use: libvirt finds it when it
    looks before creating, or fails to create it exclusively.
    """
    if error.get_error_domain() != libvirt.VIR_FROM_STORAGE:
        return False
    is_refused = error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
    is_there = is_refused and error.get_int1() == errno.EEXIST
    return is_there or bool(_FILE_EXISTS.search(_text(error)))


def _is_full(error: libvirt.libvirtError) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    is_system = error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
    is_full = is_system and error.get_int1() in full
    return is_full or bool(_GROUP_FULL.search(_text(error)))


def _disk_full(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    pool = doing.pool or "?"
    return errors.DiskFull(host=doing.host, pool=pool, reason=_text(error))


def _pool_busy(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    reason = _text(error)
    named = _quoted(error) if f"pool '{_quoted(error)}'" in reason else None
    return errors.PoolBusy(
        host=doing.host,
        pool=doing.pool or named or "?",
        seconds=doing.seconds,
        reason=reason,
    )


def _login_failed(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    text = _text(error)
    if is_unverified(error):
        return errors.CertificateRefused(
            host=doing.host, problem="untrusted", reason=text
        )
    if "TLS handshake failed" in text:
        return errors.HostUnreachable(host=doing.host, reason=text)
    return errors.AuthenticationFailed(host=doing.host, reason=text)


def _connection_failed(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    text = _text(error)
    if _NO_CONFIRMATION in text:
        return errors.CertificateRefused(
            host=doing.host,
            problem="our own certificate",
            reason="the host hung up when it had seen our certificate; it does not "
            "trust it, finds it expired, or tls_allowed_dn_list there lacks its "
            f"name ({text})",
        )
    for pattern, problem in _OUR_FILES:
        if pattern.search(text):
            return errors.CertificateRefused(
                host=doing.host, problem=problem, reason=text
            )
    if error.get_int1() in (errno.EACCES, errno.EPERM):
        return errors.AuthenticationFailed(host=doing.host, reason=text)
    return errors.HostUnreachable(host=doing.host, reason=text)


def _failed(error: libvirt.libvirtError, doing: Doing) -> errors.Error:
    return errors.LibvirtFailed(
        host=doing.host,
        doing=doing.doing,
        reason=_text(error),
        code=error.get_error_code(),
        domain=error.get_error_domain(),
        errno=error.get_int1(),
    )


_BY_CODE: dict[int | None, Callable[[libvirt.libvirtError, Doing], errors.Error]] = {
    libvirt.VIR_ERR_NO_DOMAIN: _instance_not_found,
    libvirt.VIR_ERR_DOM_EXIST: _instance_exists,
    libvirt.VIR_ERR_NO_STORAGE_POOL: _pool_not_found,
    libvirt.VIR_ERR_NO_STORAGE_VOL: _volume_not_found,
    libvirt.VIR_ERR_STORAGE_VOL_EXIST: _volume_exists,
    libvirt.VIR_ERR_NO_CONNECT: _connection_failed,
    **dict.fromkeys(_LOGIN_CODES, _login_failed),
}
