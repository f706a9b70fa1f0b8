# SPDX-License-Identifier: Apache-2.0
"""A libvirt host, and sessions of work on it."""

import atexit
import contextlib
import os
import threading
import time
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import libvirt
from oslo_log import log as logging

from virtmigrate import address, connection, errors, translation, watchdog

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timeouts:
    """How long a host may take."""

    connect: float = 10.0  # seconds to open a connection
    call: float = 60.0  # seconds without an answer, or a chunk of a stream


class Session:
    """A piece of work on one connection, under one deadline.

    Belongs to the thread that opened it, as do all libvirt objects made in it.
    """

    def __init__(self, opened: connection.Connection, seconds: float) -> None:
        self.conn = opened.conn
        self.opened = opened
        self.began = time.monotonic()
        self.alarm = watchdog.WATCHDOG.arm(seconds, opened.cut)
        self.is_resting = False

    def touch(self) -> None:
        """Say that something moved: the deadline starts anew."""
        if self.is_resting:
            self.is_resting = False
            watchdog.WATCHDOG.rearm(self.alarm)
        self.alarm.touch()

    def rest(self) -> None:
        """Stop the clock until the next touch(): nothing is asked of this host now."""
        if not self.is_resting:
            self.is_resting = True
            watchdog.WATCHDOG.disarm(self.alarm)


class _Thread(threading.local):
    """What one thread has of a host."""

    def __init__(self) -> None:
        self.current: connection.Connection | None = None
        self.sessions: list[Session] = []


class Host:
    """One libvirt daemon, reached by URI.

    Safe to share between threads: each gets a connection of its own. A
    connection that broke is opened anew by the next session. After a fork the
    child opens its own.

    Arguments:
        uri: libvirt's; transports that run SSH or a command are refused.
        name: what errors call the host; default: from the URI, or "local".
        allow_insecure: accept a connection without encryption, and one that
            does not check the host's certificate.

    Raises InsecureConnection, and ConfigurationError for what is no URI.
    """

    def __init__(
        self,
        uri: str,
        *,
        name: str | None = None,
        timeouts: Timeouts = Timeouts(),
        allow_insecure: bool = False,
    ) -> None:
        self.uri = uri
        self._address = _checked(uri, name, allow_insecure=allow_insecure)
        self.name = name or self._address.name
        self.timeouts = timeouts
        self._allow_insecure = allow_insecure
        self._lock = threading.Lock()
        self._thread = _Thread()
        self._opened: list[tuple[threading.Thread, connection.Connection]] = []
        _HOSTS.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def session(
        self,
        doing: str,
        *,
        timeout: float | None = None,
        pool: str | None = None,
        volume: str | None = None,
        instance: str | None = None,
    ) -> Iterator[Session]:
        """Work on this thread's connection; libvirt's errors become ours.

        Sessions nest: the outer one's deadline stands still meanwhile.

        Arguments:
            doing: for errors, as "looking up pool x".
            timeout: seconds until the connection is cut, counted anew from each
                touch(); default: timeouts.call.
            pool, volume, instance: names for errors.

        Raises HostTimeout when the deadline passed: what the host made of the
        request is unknown. Otherwise what translation.translate() returns.
        """
        seconds = self.timeouts.call if timeout is None else timeout
        with self._working(seconds) as session:
            try:
                yield session
            except libvirt.libvirtError as e:
                if session.alarm.fired:
                    raise errors.HostTimeout(
                        host=self.name, seconds=seconds, doing=doing
                    ) from e
                raise translation.translate(
                    e,
                    translation.Doing(
                        host=self.name,
                        doing=doing,
                        lost=not session.opened.is_usable(),
                        seconds=time.monotonic() - session.began,
                        instance=instance,
                        pool=pool,
                        volume=volume,
                    ),
                ) from e

    def close(self) -> None:
        """Close the connections of all threads; a later session opens a new one.

        A session that another thread is in fails with HostUnreachable.
        """
        with self._lock:
            opened, self._opened = self._opened, []
            for _, each in opened:
                each.is_retired = True
        _close([each for _, each in opened])

    # Private

    @contextlib.contextmanager
    def _working(self, seconds: float) -> Iterator[Session]:
        mine = self._thread
        with self._paused(mine.sessions):
            opened = self._claim()
            if not mine.sessions:
                # What an earlier session heard explains nothing in this one.
                translation.forget()
            session = Session(opened, seconds)
            mine.sessions.append(session)
            try:
                yield session
            finally:
                watchdog.WATCHDOG.disarm(session.alarm)
                mine.sessions.pop()
                opened.uses -= 1
                self._put_back(opened)

    @contextlib.contextmanager
    def _paused(self, sessions: list[Session]) -> Iterator[None]:
        """Stop the clock of the enclosing session."""
        if not sessions:
            yield
            return
        outer = sessions[-1]
        watchdog.WATCHDOG.disarm(outer.alarm)
        try:
            yield
        finally:
            if not outer.is_resting:
                watchdog.WATCHDOG.rearm(outer.alarm)

    def _claim(self) -> connection.Connection:
        """Return this thread's connection; close() only cuts it from now on."""
        while True:
            opened = self._connection()
            with self._lock:
                if not opened.is_retired:
                    opened.uses += 1
                    return opened

    def _connection(self) -> connection.Connection:
        """Return this thread's connection, opened anew when it broke."""
        mine = self._thread
        if mine.current is not None and mine.current.is_usable():
            return mine.current
        if mine.current is not None:
            LOG.debug("Reopening a broken connection host=%s", self.name)
            self._put_back(mine.current)
        self._close_orphans()
        mine.current = self._open()
        with self._lock:
            self._opened.append((threading.current_thread(), mine.current))
        return mine.current

    def _open(self) -> connection.Connection:
        opened = connection.open_connection(
            self._address,
            self.name,
            self.timeouts.connect,
            allow_insecure=self._allow_insecure,
        )
        LOG.debug("Connected host=%s uri=%s", self.name, self.uri)
        return opened

    def _put_back(self, opened: connection.Connection) -> None:
        """Close a connection that broke, once no session is on it."""
        if opened.uses or opened.is_usable():
            return
        with self._lock:
            self._opened = [each for each in self._opened if each[1] is not opened]
        if self._thread.current is opened:
            self._thread.current = None
        opened.close()

    def _close_orphans(self) -> None:
        """Close the connections of threads that ended."""
        with self._lock:
            ended = [each for each in self._opened if not each[0].is_alive()]
            self._opened = [each for each in self._opened if each[0].is_alive()]
        _close([opened for _, opened in ended])

    def _abandon(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        for _, opened in self._opened:
            opened.abandon()
        self._lock = threading.Lock()
        self._thread = _Thread()
        self._opened = []


_HOSTS: weakref.WeakSet[Host] = weakref.WeakSet()


def _checked(uri: str, name: str | None, *, allow_insecure: bool) -> address.Address:
    try:
        where = address.parse(uri)
    except ValueError as e:
        raise errors.ConfigurationError(reason=f"{uri!r} is no URI: {e}") from e
    if not where.is_known:
        reason = f"transport {where.transport} runs a command or SSH"
    elif not allow_insecure and not where.verifies:
        reason = "no_verify lets anybody answer for the host"
    else:
        return where
    raise errors.InsecureConnection(host=name or where.name, reason=reason)


def _close(opened: list[connection.Connection]) -> None:
    """Close connections to one host; when it is silent, wait for it only once."""
    answered = True
    for each in opened:
        if each.uses or not answered:
            each.cut()
        if not each.uses:
            answered = each.close() and answered


def _close_all() -> None:
    # An unclosed connection says goodbye in its destructor, unwatched.
    for host in list(_HOSTS):
        host.close()


def _abandon_all() -> None:
    for host in list(_HOSTS):
        host._abandon()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_abandon_all)
