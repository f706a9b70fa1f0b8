# SPDX-License-Identifier: Apache-2.0
"""A guest's agent is the guest's: whatever it answers is read with distrust.

libvirt and its host are small fakes; real agents are asked in the functional tests.
"""

import base64
import contextlib
import json
import types
from collections.abc import Iterator
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from virtmigrate import errors
from virtmigrate.identity import agentguest, guest


class FakeHost:
    """A host whose sessions find any domain. The connection can be lost."""

    name = "alpha"

    def __init__(self) -> None:
        self.is_usable = True

    @contextlib.contextmanager
    def session(self, doing: str, **_: object) -> Iterator[Any]:
        conn = types.SimpleNamespace(lookupByUUIDString=lambda uuid: uuid)
        opened = types.SimpleNamespace(is_usable=lambda: self.is_usable)
        yield types.SimpleNamespace(conn=conn, opened=opened)


class Agent:
    """Answers commands by their name, in turn; the last answer stays."""

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers = answers
        self.asked: list[dict[str, Any]] = []

    def __call__(self, domain: str, text: str, seconds: int, flags: int) -> str:
        assert seconds >= 1
        asked = json.loads(text)
        self.asked.append(asked)
        found = self.answers[asked["execute"]]
        answer = found.pop(0) if len(found) > 1 else found[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, str) else json.dumps({"return": answer})


def asked(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[Any]]
) -> tuple[agentguest.AgentGuest, Agent]:
    agent = Agent(answers)
    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", agent)
    return agentguest.AgentGuest(FakeHost(), "the-uuid"), agent  # type: ignore[arg-type]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_command_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = {"exited": True, "exitcode": 3, "out-data": b64(b"out"), "new": 1}
    found, agent = asked(
        monkeypatch,
        {
            "guest-exec": [{"pid": 7}],
            "guest-exec-status": [{"exited": False}, ended],
        },
    )
    result = found.run(["/bin/x", "a b", "$(c)"], data=b"\0in", timeout=10)
    assert result == guest.Result(3, b"out", b"")
    arguments = agent.asked[0]["arguments"]
    assert arguments["path"] == "/bin/x" and arguments["arg"] == ["a b", "$(c)"]
    assert base64.b64decode(arguments["input-data"]) == b"\0in"
    assert agent.asked[1]["arguments"] == {"pid": 7}


def test_a_signal_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = asked(
        monkeypatch,
        {
            "guest-exec": [{"pid": 7}],
            "guest-exec-status": [{"exited": True, "signal": 9}],
        },
    )
    assert found.run(["/bin/x"], timeout=10).code == 137


HOSTILE = {
    "no JSON": "nonsense",
    "another form": json.dumps([1, 2]),
    "no return": json.dumps({"value": {}}),
    "no pid": {"pid": "seven"},
    "a pid that is none": {"pid": None},
    "too long": json.dumps({"return": {"pid": 7, "more": "x" * 2_000_000}}),
    "deep": json.dumps({"return": 0})[:-1] + "[" * 5000,
    "not Unicode": '{"return": "\udcff"}',
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_start(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    found, agent = asked(monkeypatch, {"guest-exec": [answer]})
    with pytest.raises(errors.GuestFailed) as caught:
        found.run(["/bin/x"], timeout=10)
    assert len(str(caught.value)) < 600
    assert len(agent.asked) == 1


ENDS = {
    "no base64": {"exited": True, "out-data": "!!"},
    "cut": {"exited": True, "out-data": b64(b"x"), "out-truncated": True},
    "too much": {"exited": True, "out-data": b64(b"x" * 300_000)},
    "too much of both": {
        "exited": True,
        "out-data": b64(b"x" * 200_000),
        "err-data": b64(b"x" * 200_000),
    },
    "a word": {"exited": "yes"},
    "a code that is none": {"exited": True, "exitcode": "0"},
    "no ASCII": {"exited": True, "err-data": "ä"},
}


@pytest.mark.parametrize("answer", ENDS.values(), ids=ENDS.keys())
def test_a_hostile_end(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    found, _ = asked(
        monkeypatch, {"guest-exec": [{"pid": 7}], "guest-exec-status": [answer]}
    )
    with pytest.raises(errors.GuestFailed, match="alpha"):
        found.run(["/bin/x"], timeout=10)


def test_what_never_ends_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    found, agent = asked(
        monkeypatch,
        {"guest-exec": [{"pid": 7}], "guest-exec-status": [{"exited": False}]},
    )
    with pytest.raises(errors.GuestFailed, match="not done in time, and killed"):
        found.run(["/bin/x"], timeout=0.3)
    last = agent.asked[-1]["arguments"]
    assert last["path"] == "/bin/sh" and last["arg"][-1] == "7"


def test_no_agent_is_the_guests_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = libvirt.libvirtError("Guest agent is not responding")
    gone.err = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, 0, "it is silent", 0, "", "", "", 0)
    found, _ = asked(monkeypatch, {"guest-get-osinfo": [gone]})
    with pytest.raises(errors.GuestFailed, match="it is silent"):
        found.system(timeout=3)


def test_a_lost_host_is_not_the_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = libvirt.libvirtError("end of file")
    lost.err = (libvirt.VIR_ERR_INTERNAL_ERROR, 0, "end of file", 0, "", "", "", 0)
    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", Agent({"x": [lost]}))
    host = FakeHost()
    host.is_usable = False
    found = agentguest.AgentGuest(host, "the-uuid")  # type: ignore[arg-type]
    monkeypatch.setattr(
        libvirt_qemu, "qemuAgentCommand", Agent({"guest-get-osinfo": [lost]})
    )
    with pytest.raises(libvirt.libvirtError):
        found.system(timeout=3)


def test_too_much_input_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    found, agent = asked(monkeypatch, {})
    with pytest.raises(errors.GuestFailed, match="too many"):
        found.run(["/bin/x"], data=bytes(agentguest.INPUT + 1), timeout=3)
    assert agent.asked == []


def test_what_it_says_is_fit_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    end = {"exited": True, "exitcode": 1, "err-data": b64(b"\x1b[2Jevil\n" * 99)}
    found, _ = asked(
        monkeypatch, {"guest-exec": [{"pid": 7}], "guest-exec-status": [end]}
    )
    with pytest.raises(errors.GuestFailed) as caught:
        found.read("/etc/x", 10, timeout=3)
    assert str(caught.value).isprintable()
