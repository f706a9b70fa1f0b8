# SPDX-License-Identifier: Apache-2.0
"""A guest that is asked by its QEMU guest agent, through libvirt.

The agent is the guest's: whoever owns the guest owns its answers. Each is read against
a typed form, bounded in size, and in time. libvirt answers at most 4 MiB of it.
"""

import base64
import binascii
import math
import time
from collections.abc import Sequence
from typing import TypeVar

import libvirt
import libvirt_qemu
import msgspec
from oslo_log import log as logging

from virtmigrate import errors, translation
from virtmigrate.host import Host
from virtmigrate.identity import guest

LOG = logging.getLogger(__name__)

INPUT = 128 * 1024
"""Bytes that a command may be given: base64 of them is in one message."""

_ANSWER = 1024 * 1024  # characters of an answer that we look at
_SLACK = 45.0
"""Seconds more than the agent has: libvirt first waits for what others ask of it."""
_SHORTEST, _LONGEST = 0.03, 0.5  # seconds between two looks whether a command ended
_Form = TypeVar("_Form")
_KILL_TIME = 5  # seconds for the agent to start what kills
_KILL_TREE = """
end() {
    kill -STOP "$1" || return
    for child in $(cat /proc/"$1"/task/*/children); do end "$child"; done
    kill -KILL "$1"
}
end "$1" 2>/dev/null
"""
"""A shell that is killed leaves its children: what it waited for would go on."""


class AgentGuest(guest.Files):
    """The guest of a running domain. Safe to share between threads, as its host is."""

    def __init__(self, host: Host, uuid: str) -> None:
        self.instance = uuid
        self.host = host.name
        self._host = host

    def system(self, *, timeout: float) -> guest.System:
        """Ask the agent what runs there."""
        found = self._ask("guest-get-osinfo", {}, _System, timeout)
        return guest.System(
            found.id[:64], found.version_id[:64], found.machine[:64], found.name[:64]
        )

    def run(
        self, argv: Sequence[str], *, data: bytes = b"", timeout: float
    ) -> guest.Result:
        """Run a command to its end, and kill it after `timeout` seconds."""
        if len(data) > INPUT:
            raise self._failed(argv[0], f"{len(data)} bytes of input are too many")
        until = time.monotonic() + timeout
        arguments = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "input-data": base64.b64encode(data).decode(),
            "capture-output": True,
        }
        pid = self._ask("guest-exec", arguments, _Started, timeout).pid
        return self._await(pid, argv[0], until)

    # Private

    def _await(self, pid: int, doing: str, until: float) -> guest.Result:
        pause = _SHORTEST
        while True:
            left = until - time.monotonic()
            if left <= 0:
                self._kill(pid)
                raise self._failed(doing, "not done in time, and killed")
            ended = self._ask("guest-exec-status", {"pid": pid}, _Ended, left)
            if ended.exited:
                return self._result(doing, ended)
            # The agent tells of no end: it has to be asked.
            time.sleep(min(pause, max(left, 0.0)))
            pause = min(2 * pause, _LONGEST)

    def _result(self, doing: str, ended: "_Ended") -> guest.Result:
        if ended.out_truncated or ended.err_truncated:
            raise self._failed(doing, "it wrote too much")
        try:
            out, err = (
                base64.b64decode(text, validate=True)
                for text in (ended.out_data, ended.err_data)
            )
        except (binascii.Error, ValueError) as e:
            raise self._failed(doing, f"its output is no base64: {e}") from e
        if len(out) + len(err) > guest.OUTPUT:
            raise self._failed(doing, f"it wrote more than {guest.OUTPUT} bytes")
        code = 128 + ended.signal if ended.signal else ended.exitcode
        return guest.Result(code, out, err)

    def _kill(self, pid: int) -> None:
        """Kill a command and all that it started, as well as that can be done."""
        argv = ["-c", _KILL_TREE, "kill", str(pid)]
        arguments = {"path": "/bin/sh", "arg": argv}
        try:
            self._ask("guest-exec", arguments, _Started, _KILL_TIME)
        except errors.GuestFailed as e:
            LOG.warning("instance=%s a command was not killed: %s", self.instance, e)

    def _ask(
        self, command: str, arguments: object, form: type[_Form], timeout: float
    ) -> _Form:
        asked = msgspec.json.encode({"execute": command, "arguments": arguments})
        text = self._answer(command, asked.decode(), max(1, math.ceil(timeout)))
        if len(text) > _ANSWER:
            raise self._failed(
                command, f"an answer of {len(text)} characters is too long"
            )
        try:
            answer = msgspec.json.decode(text, type=_Answer)
            return msgspec.json.decode(answer.value, type=form)
        except (msgspec.MsgspecError, ValueError) as e:
            raise self._failed(command, f"no answer that can be read: {e}") from e

    def _answer(self, command: str, asked: str, seconds: int) -> str:
        doing = f"instance {self.instance}: asking its agent"
        try:
            with self._host.session(
                doing, timeout=seconds + _SLACK, instance=self.instance
            ) as session:
                domain = session.conn.lookupByUUIDString(self.instance)
                try:
                    answer = libvirt_qemu.qemuAgentCommand(domain, asked, seconds, 0)
                except libvirt.libvirtError as e:
                    # Of an agent libvirt has a code for each release: whatever is
                    # not the host's or the domain's is the guest's.
                    gone = translation.code(e) == libvirt.VIR_ERR_NO_DOMAIN
                    if gone or not session.opened.is_usable():
                        raise
                    raise self._failed(command, e.get_error_message()) from e
                return str(answer)
        except errors.HostTimeout as e:
            raise self._failed(command, str(e)) from e

    def _failed(self, doing: str, reason: object) -> errors.GuestFailed:
        text = "".join(c if c.isprintable() else " " for c in str(reason)[:300])
        return errors.GuestFailed(
            instance=self.instance, host=self.host, doing=doing, reason=text
        )


# What the agent may answer; what else it says is passed over.


class _Started(msgspec.Struct):
    pid: int


class _Ended(msgspec.Struct, rename="kebab"):
    exited: bool
    exitcode: int = 0
    signal: int = 0
    out_data: str = ""
    err_data: str = ""
    out_truncated: bool = False
    err_truncated: bool = False


class _System(msgspec.Struct, rename="kebab"):
    id: str = ""
    version_id: str = ""
    machine: str = ""
    name: str = ""


class _Answer(msgspec.Struct):
    value: msgspec.Raw = msgspec.field(name="return")
