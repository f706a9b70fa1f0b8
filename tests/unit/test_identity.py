# SPDX-License-Identifier: Apache-2.0
"""Order, judgement and refusals of the identity steps; guests are small fakes.

Some steps' scripts run here, in a directory that stands for a guest's root. What they
do in guests is shown by the functional tests.
"""

import importlib.metadata
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmigrate import errors, identity
from virtmigrate.identity import changing, comparing, hooks, model, steps
from virtmigrate.identity.guest import Result, System, Timed
from virtmigrate.identity.steps import base, entropy, keys, names, reseed, services

UUID = "27348e55-f0f9-436b-82f1-9bbd283272a2"
WANTED = identity.Wanted(name="other", uuid=UUID)
LIMITS = identity.Limits()
LEAST = identity.Identities({})


class FakeGuest:
    """Answers by a function; notes what it was asked."""

    instance = UUID
    host = "alpha"

    def __init__(self, answer: Callable[[Sequence[str]], Result] | None = None) -> None:
        self.answer = answer or (lambda argv: Result(0, b"", b""))
        self.ran: list[Sequence[str]] = []
        self.kind = System("debian", "12", "x86_64", "Debian")

    def system(self, *, timeout: float) -> System:
        return self.kind

    def run(self, argv: Sequence[str], *, data: bytes = b"", timeout: float) -> Result:
        assert timeout > 0
        self.ran.append(argv)
        return self.answer(argv)

    def read(self, path: str, limit: int, *, timeout: float = 10.0) -> bytes | None:
        raise NotImplementedError

    def write(
        self, path: str, data: bytes, mode: int, *, timeout: float = 10.0
    ) -> None:
        raise NotImplementedError


class FakeStep:
    """A step that reads a value, another one once it was changed."""

    def __init__(
        self, name: str, log: list[str], *, after: str = "new", fails: str = ""
    ) -> None:
        self.name = name
        self.log = log
        self.after = after
        self.fails = fails
        self.value = "old"

    def obstacle(self, asked: Timed) -> str | None:
        return self.fails or None

    def read(self, asked: Timed) -> dict[str, str]:
        self.log.append(f"read {self.name}")
        if self.fails == "read":
            raise asked.failed(self.name, "silent")
        return {self.name: self.value}

    def change(self, asked: Timed, wanted: identity.Wanted) -> str:
        self.log.append(f"change {self.name}")
        if self.fails == "change":
            raise asked.failed(self.name, "silent")
        if self.fails == "fault":
            raise KeyError("a fault in the step")
        self.value = self.after
        return "as it is done"

    def proof(self, after: dict[str, str], wanted: identity.Wanted) -> str:
        if self.fails == "proof":
            raise ValueError("not what was wanted")
        return "seen"


def work(
    every: Sequence[FakeStep],
    *,
    siblings: Sequence[identity.Identities] = (),
    risk: frozenset[str] = frozenset(),
    limits: identity.Limits = LIMITS,
    guest: FakeGuest | None = None,
) -> identity.Report:
    made = changing.Work(guest or FakeGuest(), WANTED, limits, risk)
    source = identity.Identities({step.name: "old" for step in every})
    return made.run(every, source, siblings)


# Values


@pytest.mark.parametrize("name", ["", "-a", "a-", "a.b", "a b", "a;b", "a" * 64, "ä"])
def test_no_hostname(name: str) -> None:
    with pytest.raises(ValueError, match="hostname"):
        identity.Wanted(name=name, uuid=UUID)


@given(st.text())
def test_any_name_becomes_a_hostname(name: str) -> None:
    made = identity.hostname(name, UUID)
    assert identity.Wanted(name=made, uuid=UUID).name == made


def test_hostnames_are_like_their_names() -> None:
    assert identity.hostname("web-2", UUID) == "web-2"
    assert identity.hostname("My Server_1.example", UUID) == "my-server-1-example"
    assert identity.hostname("äöü", UUID) == "host-27348e55"


def test_no_uuid_and_no_mac() -> None:
    for text in ("x", UUID.upper(), UUID.replace("-", "")):
        with pytest.raises(ValueError):
            identity.Wanted(name="a", uuid=text)
    for mac in ("52:54:00:00:00:0", "52:54:00:AA:00:00", "$(x)"):
        with pytest.raises(ValueError, match="MAC"):
            identity.Interface("52:54:00:00:00:01", mac)


def test_limits_of_single_steps() -> None:
    limits = identity.Limits(step=5, steps={"ssh": 50})
    assert (limits.of("ssh"), limits.of("rng")) == (50, 5)


def test_a_report_is_json() -> None:
    report = work([FakeStep("a", [])])
    assert identity.decode(report.encode()) == report
    assert b'"state":"changed"' in report.encode()
    with pytest.raises(ValueError):
        identity.decode(b"{}")


# Comparing


@given(
    st.dictionaries(st.sampled_from(["a", "a:1", "a:2", "b"]), st.sampled_from("xyz")),
    st.dictionaries(st.sampled_from(["a", "a:1", "a:2", "b"]), st.sampled_from("xyz")),
)
def test_values_are_compared_in_groups(
    mine: dict[str, str], other: dict[str, str]
) -> None:
    found = comparing.shared(identity.Identities(mine), [identity.Identities(other)])
    expected = {
        name
        for name, value in mine.items()
        if any(k[0] == name[0] and v == value for k, v in other.items())
    }
    assert set(found) == expected


def test_a_clock_is_no_identity() -> None:
    right = identity.Identities({"clock": "right"})
    assert comparing.shared(right, [right]) == {}


# The work


def test_all_is_changed_before_anything_is_read_back() -> None:
    log: list[str] = []
    report = work([FakeStep("a", log), FakeStep("b", log)])
    assert log == ["change a", "change b", "read a", "read b"]
    assert report.ok and report.unproven == () and report.compared == 0
    assert [step.before for step in report.steps[:2]] == [{"a": "old"}, {"b": "old"}]
    assert [step.after for step in report.steps[:2]] == [{"a": "new"}, {"b": "new"}]
    assert report.steps[2].name == "hooks"


def test_written_things_are_on_disk_before_they_are_read() -> None:
    log: list[str] = []

    def answer(argv: Sequence[str]) -> Result:
        log.append("sync" if script_of(argv).endswith("sync") else "hooks")
        return Result(0, b"", b"")

    work([FakeStep("a", log)], guest=FakeGuest(answer))
    assert log == ["change a", "hooks", "sync", "read a"]


FAILURES = ("change", "read", "proof")


@pytest.mark.parametrize("fails", FAILURES)
def test_a_step_that_fails(fails: str) -> None:
    log: list[str] = []
    every = [FakeStep("a", log), FakeStep("b", log, fails=fails), FakeStep("c", log)]
    with pytest.raises(errors.IdentityFailed, match="off the network") as caught:
        work(every)
    assert caught.value.details["step"] == "b"
    assert ("change c" in log) == (fails != "change")


@pytest.mark.parametrize("fails", FAILURES)
def test_a_step_that_is_risked(fails: str) -> None:
    every = [FakeStep("a", [], fails=fails), FakeStep("b", [])]
    report = work(every, risk=frozenset({"a"}))
    assert not report.ok and report.unproven == ("a",)
    assert [step.state.value for step in report.steps[:2]] == ["failed", "changed"]
    with pytest.raises(errors.IdentityFailed):
        work(every, risk=frozenset({"b"}))


def test_a_risk_that_was_taken_keeps_it_off_the_network() -> None:
    report = work([FakeStep("a", [])], risk=frozenset({"system"}))
    assert not report.ok and report.unproven == ("system",)


def test_without_an_agent_nothing_is_changed_by_risk() -> None:
    class Silent(FakeGuest):
        def system(self, *, timeout: float) -> System:
            raise Timed(self, timeout).failed("asking it", "silent")

    found = Silent()
    risk = frozenset({"agent"})
    report = identity.change(found, WANTED, LEAST, [], limits=LIMITS, risk=risk)
    assert not report.ok and report.steps == () and found.ran == []
    assert report.unproven[0] == "agent" and "rng" in report.unproven
    assert "rng" in report.not_unique
    with pytest.raises(errors.IdentityFailed, match="step rng"):
        identity.change(FakeGuest(), WANTED, LEAST, [], limits=LIMITS)


def test_a_fault_in_a_step_cannot_be_risked() -> None:
    with pytest.raises(errors.IdentityFailed, match="a fault in the step"):
        work([FakeStep("a", [], fails="fault")], risk=frozenset({"a"}))


def test_what_stays_the_sources_is_found() -> None:
    with pytest.raises(errors.IdentityFailed, match=r"step b: b is the source's"):
        work([FakeStep("a", []), FakeStep("b", [], after="old")])


def test_what_a_sibling_has_is_found() -> None:
    siblings = [identity.Identities({"a": "x"}), identity.Identities({"a:2": "new"})]
    with pytest.raises(errors.IdentityFailed, match="sibling"):
        work([FakeStep("a", [])], siblings=siblings)
    assert work([FakeStep("a", [])], siblings=siblings[:1]).compared == 1


def test_all_of_it_has_a_limit() -> None:
    class Slow(FakeStep):
        def change(self, asked: Timed, wanted: identity.Wanted) -> str:
            time.sleep(0.05)
            return super().change(asked, wanted)

    every = [Slow("a", []), FakeStep("b", [])]
    with pytest.raises(errors.IdentityFailed, match=r"step b: not done within 0.02 s"):
        work(every, limits=identity.Limits(whole=0.02))


def test_an_unwritten_disk_is_a_failure() -> None:
    def answer(argv: Sequence[str]) -> Result:
        return Result(1 if script_of(argv).endswith("sync") else 0, b"", b"I/O error")

    with pytest.raises(errors.IdentityFailed, match=r"step sync: .*I/O error"):
        work([FakeStep("a", [])], guest=FakeGuest(answer))


# Obstacles


def script_of(argv: Sequence[str]) -> str:
    return argv[argv.index("-c") + 1]


def shell(argv: Sequence[str]) -> Result:
    """A guest with a shell that has an answer for each thing that is asked."""
    script = script_of(argv)
    if script == "exit 7":
        return Result(7, b"", b"")
    if script.endswith("uname -m"):
        return Result(0, b"x86_64\n", b"")
    return Result(0, b"0\n" if script.endswith("id -u") else b"", b"")


def test_a_guest_without_obstacles() -> None:
    assert identity.obstacles(FakeGuest(shell), timeout=5) == []


def test_windows_is_refused_by_name() -> None:
    found = FakeGuest(shell)
    found.kind = System("mswindows", "2022", "x86_64", "Microsoft Windows\x1b")
    (line,) = identity.obstacles(found, timeout=5)
    assert line.startswith("system: Microsoft Windows ") and "SID" in line


def test_an_unknown_system_is_refused_until_it_is_proven() -> None:
    found = FakeGuest(shell)
    found.kind = System("debian", "13", "x86_64")
    assert "debian-12" in identity.obstacles(found, timeout=5)[0]
    assert identity.obstacles(found, timeout=5, proven=["debian-13"]) == []


def test_another_machine_is_refused() -> None:
    def answer(argv: Sequence[str]) -> Result:
        if script_of(argv).endswith("uname -m"):
            return Result(0, b"ppc64le\n", b"")
        return shell(argv)

    (line,) = identity.obstacles(FakeGuest(answer), timeout=5)
    assert line.startswith("rng: ") and "x86_64" in line


# What guests say


SAID = {
    "no tab": "rng",
    "another kind": "ssh\tx",
    "no value": "rng\t",
    "an escape": "rng\t\x1b[2J",
    "a long one": f"rng\t{'x' * 2000}",
    "too many": "\n".join(f"rng:{n}\tx" for n in range(300)),
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID.keys())
def test_hostile_identities(said: str) -> None:
    found = FakeGuest(lambda argv: Result(0, said.encode(), b""))
    with pytest.raises(errors.GuestFailed):
        entropy.Rng().read(Timed(found, 5))


@pytest.mark.parametrize("said", ["ssh-rsa", "ssh-rsa !!", "a b c", "ssh-rsa AAA"])
def test_hostile_keys(said: str) -> None:
    found = FakeGuest(lambda argv: Result(0, f"ssh:/a\t{said}\n".encode(), b""))
    with pytest.raises(errors.GuestFailed, match="no public key"):
        keys.Ssh().read(Timed(found, 5))


def test_hooks_with_odd_names_are_not_run() -> None:
    for names_ in ("a b", "../x", "-rf", "\n".join(map(str, range(99)))):
        found = FakeGuest(lambda argv, n=names_: Result(0, n.encode(), b""))  # type: ignore[misc]
        with pytest.raises(errors.GuestFailed, match="plain names"):
            identity.tell(found, hooks.Moment.BEFORE, limits=identity.Limits())
        assert len(found.ran) == 1


def test_a_hook_that_fails_stops_the_others() -> None:
    def answer(argv: Sequence[str]) -> Result:
        if argv[0] == "/bin/sh":
            return Result(0, b"1\n2\n3\n", b"")
        return Result(int(argv[0].endswith("2")), b"", b"not drained")

    found = FakeGuest(answer)
    with pytest.raises(errors.HookFailed, match=r"2: not drained. The hooks before"):
        identity.tell(found, hooks.Moment.BEFORE, limits=identity.Limits())
    assert [argv[1] for argv in found.ran[1:]] == ["before", "before"]


# Others' steps


class Point:
    """An entry point."""

    value = "theirs:It"

    def __init__(self, name: str, what: Any) -> None:
        self.name = name
        self.what = what

    def load(self) -> Any:
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


def install(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)


def test_others_steps_come_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(FakeStep):
        def __init__(self) -> None:
            super().__init__("theirs", [])

    install(monkeypatch, Point("z", FakeStep("z", [])), Point("a", Theirs))
    assert [step.name for step in steps.every()][-2:] == ["theirs", "z"]
    assert steps.every()[0].name == "rng"


@pytest.mark.parametrize(
    "what",
    [ImportError("gone"), object(), FakeStep("rng", [])],
    ids=["not there", "no step", "named as ours"],
)
def test_a_step_is_not_lost_in_silence(
    monkeypatch: pytest.MonkeyPatch, what: Any
) -> None:
    install(monkeypatch, Point("theirs", what))
    with pytest.raises(errors.ConfigurationError, match="identity step"):
        identity.read(FakeGuest(), timeout=5)


# The random generator


def test_the_random_generator_comes_first() -> None:
    assert steps.OURS[0].name == "rng"
    order = [step.name for step in steps.OURS]
    assert order.index("machine-id") < order.index("dhcp")
    assert order.index("mac") < order.index("dhcp") < order.index("address")


def test_what_is_credited() -> None:
    one, other = entropy.entropy(), entropy.entropy()
    assert struct.unpack("@ii", one[:8]) == (512, 64)
    assert len(one) == 72 and one != other


@pytest.mark.skipif(not shutil.which("as"), reason="needs an assembler")
def test_the_program_is_its_text(tmp_path: Path) -> None:
    text = "\n".join(instruction for instruction, _ in reseed.SOURCE) + "\n"
    argv = ["as", "-o", str(tmp_path / "o"), "-"]
    subprocess.run(argv, input=text.encode(), check=True, timeout=30)
    argv = ["objcopy", "-O", "binary", "-j", ".text", "o", "code"]
    subprocess.run(argv, cwd=tmp_path, check=True, timeout=30)
    assert reseed.PROGRAM.endswith((tmp_path / "code").read_bytes())
    assert len(reseed.PROGRAM) == 120 + (tmp_path / "code").stat().st_size


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs x86-64")
def test_the_program_tells_of_errors(tmp_path: Path) -> None:
    path = tmp_path / "reseed"
    path.write_bytes(reseed.PROGRAM)
    path.chmod(0o755)
    assert subprocess.run([path], input=b"short", timeout=30).returncode == 5
    if os.geteuid() == 0:
        done = subprocess.run([path], input=entropy.entropy(), timeout=30)
        assert done.returncode == 0


def test_a_place_where_nothing_runs_is_passed_over() -> None:
    def answer(argv: Sequence[str]) -> Result:
        script = script_of(argv)
        if script == entropy._WAYS or script.endswith(entropy._WAYS):
            return Result(0, b"program\n", b"")
        if "/run/" in argv[-1] and '"$1"; r=$?' in script:
            return Result(126, b"", b"Permission denied")
        return Result(0, b"", b"")

    how = entropy.Rng().change(Timed(FakeGuest(answer), 5), WANTED)
    assert how.endswith("by our own program in /dev/shm")


# Scripts in a directory


class Directory(FakeGuest):
    """Runs scripts with this machine's shell, on files below a directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(self._run)
        self.root = root

    def put(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def _run(self, argv: Sequence[str]) -> Result:
        inside = r"(?<![\w.}/])/(etc|var/lib|run|proc/sys|boot|efi)\b"
        given = [re.sub(inside, rf"{self.root}/\1", each) for each in argv]
        done = subprocess.run(given, capture_output=True, timeout=30)
        return Result(
            done.returncode, done.stdout.replace(str(self.root).encode(), b""), b""
        )


SAFE: dict[str, base.Scripts] = {
    step.name: step
    for step in (
        names.Hostname(),
        names.MachineId(),
        keys.RandomSeed(),
        services.CloudInit(),
        services.Initiator(),
    )
}
"""Those that write files, and nothing else."""


@pytest.fixture
def root(tmp_path: Path) -> Directory:
    found = Directory(tmp_path / "root")
    found.put("proc/sys/kernel/hostname", "origin")
    found.put("run/nothing", "")
    return found


def change(step: base.Scripts, guest: Directory) -> dict[str, str]:
    step.change(Timed(guest, 30), WANTED)
    after = step.read(Timed(guest, 30))
    step.proof(after, WANTED)
    return after


@pytest.mark.parametrize("name", [name for name in SAFE if name != "hostname"])
def test_nothing_is_made_where_nothing_was(name: str, root: Directory) -> None:
    before = list(root.root.rglob("*"))
    assert change(SAFE[name], root) == {}
    made = set(root.root.rglob("*")) - set(before)
    assert {path.name for path in made} <= {"virtmigrate.lock"}


def test_hostname_in_hosts(root: Directory) -> None:
    hosts = root.put(
        "etc/hosts",
        "127.0.0.1 localhost\n"
        "127.0.1.1 origin.example.org origin\n"
        "10.0.0.9 original origin2 my-origin\n"
        "# origin\n",
    )
    after = change(SAFE["hostname"], root)
    assert set(after.values()) == {"other"}
    assert hosts.read_text() == (
        "127.0.0.1 localhost\n"
        "127.0.1.1 other.example.org other\n"
        "10.0.0.9 original origin2 my-origin\n"
        "# origin\n"
    )
    assert change(SAFE["hostname"], root) == after


def test_machine_id_of_both(root: Directory) -> None:
    root.put("etc/machine-id", "0" * 32)
    bus = root.put("var/lib/dbus/machine-id", "")
    bus.unlink()
    bus.symlink_to(root.root / "etc/machine-id")
    assert set(change(SAFE["machine-id"], root).values()) == {UUID.replace("-", "")}
    assert bus.is_symlink()
    bus.unlink()
    bus.write_text("1" * 32)
    assert set(change(SAFE["machine-id"], root).values()) == {UUID.replace("-", "")}


def test_random_seeds_differ_and_are_private(root: Directory) -> None:
    files = [
        root.put(f"var/lib/{each}/random-seed", "x") for each in ("systemd", "urandom")
    ]
    after = change(SAFE["random-seed"], root)
    assert len(set(after.values())) == 2
    assert all(path.stat().st_size == 512 for path in files)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_cloud_init(root: Directory) -> None:
    cloud = root.root / "var/lib/cloud"
    root.put("var/lib/cloud/data/instance-id", "i-1\n")
    root.put("var/lib/cloud/instances/i-1/obj.pkl", "the source's")
    root.put("var/lib/cloud/instances/i-1/sem/once", "done")
    root.put("run/cloud-init/instance-data.json", "the source's")
    root.put("run/cloud-init/.instance-id", "i-1\n")
    (cloud / "instance").symlink_to(cloud / "instances/i-1")
    for _ in range(2):
        assert set(change(SAFE["cloud-init"], root).values()) == {UUID}
        assert (cloud / "data/previous-instance-id").read_text() == "i-1\n"
        assert [path.name for path in (cloud / "instances").iterdir()] == [UUID]
        assert (cloud / "instance/sem/once").read_text() == "done"
        assert not (cloud / "instance/obj.pkl").exists()
        assert not (root.root / "run/cloud-init/instance-data.json").exists()


def test_initiators(root: Directory) -> None:
    name = "iqn.1993-08.org.debian:01:abcdef"
    root.put("etc/iscsi/initiatorname.iscsi", f"## no\nInitiatorName={name}\n")
    root.put("etc/nvme/hostid", "old\n")
    root.put("etc/nvme/hostnqn", "nqn.2014-08.org.nvmexpress:uuid:old\n")
    after = change(SAFE["initiator"], root)
    iscsi = after.pop("initiator:/etc/iscsi/initiatorname.iscsi")
    assert re.fullmatch(r"iqn\.1993-08\.org\.debian:01:[0-9a-f]{12}", iscsi)
    assert set(after.values()) == {UUID, f"nqn.2014-08.org.nvmexpress:uuid:{UUID}"}


def test_a_file_that_cannot_be_replaced_is_a_failure(root: Directory) -> None:
    path = root.put("etc/machine-id", "0" * 32)
    path.unlink()
    path.mkdir()
    (path / "in it").write_text("x")
    (path.parent / "machine-id.virtmigrate").mkdir()
    root.put("var/lib/dbus/machine-id", "0" * 32)
    (root.root / "var/lib/dbus/machine-id.virtmigrate").mkdir()
    with pytest.raises(errors.GuestFailed, match="machine-id"):
        change(SAFE["machine-id"], root)


def test_names_of_steps_are_names() -> None:
    for step in steps.OURS:
        assert re.fullmatch(r"[a-z][a-z0-9-]*", step.name)
    assert model.group_of("mac:eth0") == "mac"
