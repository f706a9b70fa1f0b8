# SPDX-License-Identifier: Apache-2.0
"""One connection to a libvirt daemon, with a hold on its sockets.

Opening one: take the lock of the peer; note this process's sockets; arm the
watchdog; let libvirt connect; find the new sockets; check encryption. Whatever
fails, nothing is left open.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence

import libvirt

from virtmigrate import address, certificate, errors, sockets, translation, watchdog

# Seconds that a daemon gets to say goodbye.
CLOSE_TIMEOUT = 2.0

_SASL = [libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_PASSPHRASE]

_locks: dict[sockets.Peer, threading.Lock] = {}


class Connection:
    """An open connection. One thread at a time may use it; any may cut it."""

    def __init__(self, conn: libvirt.virConnect, held: Sequence[socket.socket]) -> None:
        self.conn = conn
        self.uses = 0  # sessions on it
        self.is_retired = False  # by its host: no new sessions
        self._held = list(held)
        self._is_cut = False
        self._is_closed = False

    def cut(self) -> None:
        """End it from outside; a call in progress fails.

        What it asked for and the daemon did not get is thrown away, once the call has
        returned and this is closed: see sockets.cut().
        """
        self._is_cut = True
        for sock in self._held:
            sockets.cut(sock)

    def is_usable(self) -> bool:
        """Tell whether it is worth a call, without asking the peer."""
        if self.is_retired or self._is_cut or any(map(sockets.is_hung_up, self._held)):
            return False
        try:
            return bool(self.conn.isAlive())
        except libvirt.libvirtError:
            return False

    def close(self) -> bool:
        """Close it, even while objects of it are still referenced.

        Returns whether the daemon answered in time.
        """
        if self._is_closed:
            return True
        self._is_closed = True
        with (
            _alarm(CLOSE_TIMEOUT, self.cut) as alarm,
            contextlib.suppress(libvirt.libvirtError),
        ):
            self.conn.close()
        self._is_cut = True
        for sock in self._held:
            sockets.hang_up(sock)
            sock.close()
        return not alarm.fired

    def abandon(self) -> None:
        """Forget it in a forked child: its TLS session is the parent's."""
        self._is_cut = self._is_closed = True
        # Without a pointer, the binding's destructor says no goodbye.
        self.conn._o = None
        for sock in self._held:
            sock.close()


def open_connection(
    where: address.Address, name: str, seconds: float, *, allow_insecure: bool
) -> Connection:
    """Open a connection within seconds.

    Raises HostUnreachable, HostTimeout, CertificateRefused,
    AuthenticationFailed or InsecureConnection; nothing is left open then.
    """
    peer = _peer(where, name)
    with _turn(peer, name, seconds):
        opening = _Opening(peer)
        try:
            with _alarm(seconds, opening.cut) as alarm:
                return _open(where, name, opening, allow_insecure=allow_insecure)
        except libvirt.libvirtError as e:
            if alarm.fired:
                raise opening.overdue(name, seconds) from e
            failure = e
    raise _explain(failure, where, name, seconds) from failure


# Private


class _Opening:
    """The sockets that appear while a connection is opened."""

    def __init__(self, peer: sockets.Peer) -> None:
        self.peer = peer
        self._before = sockets.snapshot()
        self._was_connected = False

    def cut(self) -> None:
        if sockets.cut_since(self._before, self.peer):
            self._was_connected = True

    def take(self) -> list[socket.socket]:
        return sockets.opened_since(self._before, self.peer)

    def overdue(self, name: str, seconds: float) -> errors.HostError:
        if self._was_connected:
            return errors.HostTimeout(host=name, seconds=seconds, doing="connecting")
        reason = f"no answer to a connection within {seconds:g} s"
        return errors.HostUnreachable(host=name, reason=reason)


@contextlib.contextmanager
def _alarm(seconds: float, action: watchdog.Action) -> Iterator[watchdog.Alarm]:
    alarm = watchdog.WATCHDOG.arm(seconds, action)
    try:
        yield alarm
    finally:
        watchdog.WATCHDOG.disarm(alarm)


def _peer(where: address.Address, name: str) -> sockets.Peer:
    if where.is_local:
        return sockets.UnixPeer()
    try:
        return sockets.resolve(where.host, where.port)
    except OSError as e:
        raise errors.HostUnreachable(host=name, reason=f"{where.host}: {e}") from e


@contextlib.contextmanager
def _turn(peer: sockets.Peer, name: str, seconds: float) -> Iterator[None]:
    """Let one thread at a time open to a peer, so that it knows its sockets."""
    lock = _locks.setdefault(peer, threading.Lock())
    if not lock.acquire(timeout=seconds):
        reason = f"other threads have been trying to connect for {seconds:g} s"
        raise errors.HostUnreachable(host=name, reason=reason)
    try:
        yield
    finally:
        lock.release()


def _open(
    where: address.Address, name: str, opening: _Opening, *, allow_insecure: bool
) -> Connection:
    auth = [_SASL, _no_prompt, None]
    conn = libvirt.openAuth(where.uri, auth)
    opened = Connection(conn, opening.take())
    try:
        if not allow_insecure and not _is_private(conn, where):
            raise errors.InsecureConnection(
                host=name, reason="the connection is not encrypted"
            )
        for sock in opened._held:
            sockets.keep_alive(sock)
    except BaseException:
        opened.close()
        raise
    return opened


def _no_prompt(credentials: list[list[object]], opaque: object) -> int:
    return -1


def _is_private(conn: libvirt.virConnect, where: address.Address) -> bool:
    if where.is_local:
        return bool(conn.isSecure())
    return bool(conn.isEncrypted())


def _explain(
    error: libvirt.libvirtError, where: address.Address, name: str, seconds: float
) -> errors.Error:
    if translation.is_unverified(error):
        problem, reason = certificate.diagnose(where, seconds)
        return errors.CertificateRefused(host=name, problem=problem, reason=reason)
    missing = where.auth_file is not None and not where.auth_file.is_file()
    if missing and error.get_error_domain() == libvirt.VIR_FROM_NONE:
        # libvirt 9.0: "An error occurred, but the cause is unknown".
        reason = f"cannot read the authfile {where.auth_file} of the URI"
        return errors.AuthenticationFailed(host=name, reason=reason)
    doing = translation.Doing(host=name, doing="connecting", lost=True)
    return translation.translate(error, doing)


# libvirt prints every error to stderr unless somebody takes them.
libvirt.registerErrorHandler(translation.keep, None)
os.register_at_fork(after_in_child=_locks.clear)
