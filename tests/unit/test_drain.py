# SPDX-License-Identifier: Apache-2.0
"""Ladders, lanes, the diary and the end of a drain, with a mover that fails on wish.

The mover is a fake: what it does by libvirt is tried in tests/functional.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from virtmigrate import drainnote, errors
from virtmigrate.drain import diary, execution, ladder, preflight, returning, rolling
from virtmigrate.drain.lanes import Lanes
from virtmigrate.drain.mover import Moved, Mover, Watch
from virtmigrate.drain.values import (
    Instance,
    Leftovers,
    Line,
    Outcome,
    Prospect,
    Report,
    Result,
    ReturnPlan,
    Target,
    Way,
)

Failure = Callable[[str, str, Way], BaseException | None]


class FakeMover:
    """Moves instances between lists. Safe to share between threads."""

    host = "here"

    def __init__(
        self, *instances: Instance, targets: Sequence[str] = ("b", "c")
    ) -> None:
        self.here = {each.uuid: each for each in instances}
        self.names = targets
        self.closed: dict[tuple[str, Way], str] = {}
        """Obstacles, by target and way."""
        self.fail: Failure = lambda uuid, target, way: None
        self.memory = 100
        self.calls: list[tuple[str, str, Way]] = []
        self.looks = 0
        self.under_way: set[str] = set()
        self.kept_reason = ""
        self.lock = threading.Lock()
        self.busy: dict[str, int] = {}
        self.most = 0
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.leave.set()

    def targets(self) -> list[Target]:
        return [Target(name=name, memory=self.memory) for name in self.names]

    def complaints(self) -> dict[str, str]:
        return {}

    def instances(self) -> list[Instance]:
        return sorted(self.here.values(), key=lambda each: each.uuid)

    def prospects(
        self, instance: Instance, target: str, ways: Sequence[Way]
    ) -> list[Prospect]:
        with self.lock:
            self.looks += 1
        return [
            Prospect(
                target=target, way=way, obstacle=self.closed.get((target, way), "")
            )
            for way in ways
        ]

    def move(self, instance: Instance, target: str, way: Way, watch: Watch) -> Moved:
        with self.lock:
            self.calls.append((instance.uuid, target, way))
            self.busy[target] = self.busy.get(target, 0) + 1
            self.most = max(self.most, *self.busy.values())
        self.entered.set()
        try:
            while not self.leave.wait(0.01):
                watch.check()
            if failure := self.fail(instance.uuid, target, way):
                raise failure
        finally:
            with self.lock:
                self.busy[target] -= 1
        self.here.pop(instance.uuid, None)
        return Moved(downtime=1.0, sent=5, kept=self.kept_reason)

    def stop(self, instance: Instance) -> None:
        self.calls.append((instance.uuid, "", Way.STOP))

    def is_under_way(self, uuid: str) -> bool:
        return uuid in self.under_way

    def close_host(self, rolling: str) -> None:
        pass

    def kept(self, uuid: str) -> str:
        return "a retired volume"

    def settle(self) -> None:
        pass

    def leftovers(self, gone: Sequence[str]) -> Leftovers:
        return Leftovers(domains=tuple(sorted(self.here)))


def guest(
    uuid: str, *policy: Way, power: str = "running", memory: int = 10
) -> Instance:
    return Instance(
        uuid=uuid,
        name=f"name-{uuid}",
        power=power,
        memory=memory,
        policy=policy or (Way.LIVE,),
    )


def drain(mover: FakeMover, path: Path, **limits: float) -> execution.Drain:
    checked: Mover = mover
    values = {"moves": 2, "per_target": 1, "tries": 2, "seconds": 60.0, **limits}
    return execution.Drain(
        checked,
        preflight.Preflight(checked),
        path,
        execution.Limits(
            moves=int(values["moves"]),
            per_target=int(values["per_target"]),
            tries=int(values["tries"]),
            seconds=values["seconds"],
        ),
    )


def outcomes(report: Report) -> dict[str, Outcome]:
    return {result.uuid: result.outcome for result in report.results}


def rolled_back(uuid: str = "1") -> errors.MigrationRolledBack:
    return errors.MigrationRolledBack(
        instance=uuid, operation="op", reason="no", state="running", host="h", debts=""
    )


def refused(uuid: str = "1") -> errors.MigrationRefused:
    return errors.MigrationRefused(instance=uuid, reason="never")


# Policies


@pytest.mark.parametrize(
    "policy, power, ways",
    [
        ((Way.LIVE,), "running", (Way.LIVE,)),
        ((Way.LIVE, Way.COLD), "off", (Way.OFFLINE,)),
        ((Way.COLD, Way.STOP, Way.LIVE), "running", (Way.COLD, Way.STOP)),
        ((Way.LEAVE,), "off", (Way.LEAVE,)),
        ((Way.LIVE, Way.LEAVE), "off", (Way.OFFLINE, Way.LEAVE)),
    ],
)
def test_ways(policy: tuple[Way, ...], power: str, ways: tuple[Way, ...]) -> None:
    assert ladder.ways(guest("1", *policy, power=power)) == ways


@pytest.mark.parametrize("words", [["fly"], ["live", "live"], ["offline"], [""]])
def test_bad_policy_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="first choice first"):
        ladder.read(words)


# Plans


def test_plan_says_what_blocks() -> None:
    mover = FakeMover(guest("1"), targets=["b"])
    mover.closed["b", Way.LIVE] = "a local device"
    (line,) = preflight.Preflight(mover).plan().lines
    assert line.target == "" and "b: live: a local device" in line.blocked


def test_plan_packs_by_memory_and_what_is_off_takes_none() -> None:
    mover = FakeMover(
        guest("1", memory=80),
        guest("2", memory=60),
        guest("3", memory=90, power="off"),
        targets=["b"],
    )
    plan = preflight.Preflight(mover).plan()
    by_uuid = {line.instance.uuid: line for line in plan.lines}
    assert by_uuid["1"].target == "b" and by_uuid["3"].target == "b"
    assert "40 bytes of memory too little" in by_uuid["2"].blocked
    assert [line.instance.uuid for line in plan.lines] == ["1", "3", "2"]


def test_no_room_falls_to_what_the_policy_ends_with() -> None:
    mover = FakeMover(guest("1", Way.LIVE, Way.STOP, memory=500), targets=["b"])
    (line,) = preflight.Preflight(mover).plan().lines
    assert [rung.way for rung in line.rungs] == [Way.STOP] and not line.blocked


# Ladders


def test_all_move_and_the_diary_goes(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"), guest("2"), guest("3"))
    report = drain(mover, tmp_path).run()
    assert set(outcomes(report).values()) == {Outcome.MOVED}
    assert report.is_done and report.leftovers.is_empty
    assert list((tmp_path / "drain").iterdir()) == []


def test_falls_to_the_next_way_that_the_policy_names(tmp_path: Path) -> None:
    mover = FakeMover(guest("1", Way.LIVE, Way.COLD), targets=["b"])
    mover.fail = lambda uuid, target, way: rolled_back() if way is Way.LIVE else None
    (result,) = drain(mover, tmp_path).run().results
    assert (result.outcome, result.way, result.tries) == (Outcome.MOVED, Way.COLD, 3)
    assert result.reason.count("live: ") == 2


def test_one_rung_is_one_rung(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"), targets=["b"])
    mover.fail = lambda uuid, target, way: rolled_back()
    (result,) = drain(mover, tmp_path).run().results
    assert (result.outcome, result.tries) == (Outcome.STAYED, 2)
    assert {way for _, _, way in mover.calls} == {Way.LIVE}


def test_refused_is_not_tried_again_here_but_there(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"))
    mover.fail = lambda uuid, target, way: refused() if target == "b" else None
    (result,) = drain(mover, tmp_path).run().results
    assert (result.outcome, result.target, result.tries) == (Outcome.MOVED, "c", 2)
    assert "b: live:" in result.reason


def test_each_host_is_tried_once_then_it_stays(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"))
    mover.fail = lambda uuid, target, way: refused()
    (result,) = drain(mover, tmp_path).run().results
    assert result.outcome is Outcome.STAYED
    assert sorted(target for _, target, _ in mover.calls) == ["b", "c"]


@pytest.mark.parametrize(
    "failure",
    [
        errors.MigrationUndecided(instance="1", operation="o", peer="b", reason="gone"),
        errors.NotArrived(instance="1", operation="o", peer="b", reason="full"),
        RuntimeError("a fault of ours"),
    ],
    ids=["undecided", "not arrived", "fault"],
)
def test_between_two_hosts_nothing_else_is_tried(
    tmp_path: Path, failure: BaseException
) -> None:
    mover = FakeMover(guest("1", Way.LIVE, Way.COLD), guest("2"))
    mover.fail = lambda uuid, target, way: failure if uuid == "1" else None
    report = drain(mover, tmp_path).run()
    assert outcomes(report) == {"1": Outcome.UNDECIDED, "2": Outcome.MOVED}
    assert [uuid for uuid, _, _ in mover.calls].count("1") == 1
    assert not report.is_done
    # The next drain goes on with it.
    mover.under_way, mover.fail = {"1"}, lambda uuid, target, way: None
    assert outcomes(drain(mover, tmp_path).run())["1"] is Outcome.MOVED
    assert list((tmp_path / "drain").iterdir()) == []


def test_policies_that_stay(tmp_path: Path) -> None:
    mover = FakeMover(guest("1", Way.STOP), guest("2", Way.LEAVE))
    report = drain(mover, tmp_path).run()
    assert outcomes(report) == {"1": Outcome.STOPPED, "2": Outcome.LEFT}
    assert mover.calls == [("1", "", Way.STOP)]


def test_copy_that_cannot_be_given_up_is_told(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"))
    mover.kept_reason = "not confirmable"
    report = drain(mover, tmp_path).run()
    assert outcomes(report) == {"1": Outcome.ARRIVED} and not report.is_done
    mover.kept_reason, mover.under_way = "", {"1"}
    assert outcomes(drain(mover, tmp_path).run()) == {"1": Outcome.MOVED}


def test_a_try_has_its_time(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"), targets=["b"])
    mover.leave.clear()
    (result,) = drain(mover, tmp_path, seconds=0.05, tries=1).run().results
    assert result.outcome is Outcome.STAYED and "longer than 0.05 s" in result.reason


# Limits


def test_one_lane_for_each_host(tmp_path: Path) -> None:
    mover = FakeMover(*(guest(str(n)) for n in range(8)), targets=["b"])
    report = drain(mover, tmp_path, moves=4).run()
    assert report.count(Outcome.MOVED) == 8
    assert mover.most == 1


def test_a_busy_host_is_passed_over() -> None:
    lines = [
        Line(instance=guest(str(n)), target=target, rungs=())
        for n, target in enumerate(["b", "b", "c"])
    ]
    lanes = Lanes(lines, 1)
    assert lanes.take() is lines[0] and lanes.take() is lines[2]
    lanes.done(lines[0])
    assert lanes.take() is lines[1]
    assert lanes.take() is None


def test_looks_grow_with_the_instances_only(tmp_path: Path) -> None:
    def looks(count: int) -> int:
        mover = FakeMover(*(guest(f"{n:03}", memory=1) for n in range(count)))
        assert drain(mover, tmp_path).run().count(Outcome.MOVED) == count
        assert len(mover.calls) == count
        return mover.looks

    assert looks(40) == 4 * looks(10)


# Cancelled


@pytest.mark.parametrize("abort", [False, True])
def test_cancelled(tmp_path: Path, abort: bool) -> None:
    mover = FakeMover(guest("1"), guest("2"), targets=["b"])
    mover.leave.clear()
    running = drain(mover, tmp_path)
    reports: list[Report] = []
    thread = threading.Thread(target=lambda: reports.append(running.run()))
    thread.start()
    assert mover.entered.wait(30)
    running.cancel(abort=abort)
    if not abort:
        mover.leave.set()
    thread.join(30)
    (report,) = reports
    assert report.cancelled
    begun = Outcome.CANCELLED if abort else Outcome.MOVED
    assert outcomes(report) == {"1": begun, "2": Outcome.CANCELLED}
    assert len(mover.calls) == 1


# Killed


class Killed(BaseException):
    """As a SIGKILL would, it leaves everything as it stands."""


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("arrived", [True, False])
def test_killed_goes_on(tmp_path: Path, noted: bool, arrived: bool) -> None:
    """Killed after the move began: it is under way, or over, or was undone."""
    mover = FakeMover(guest("1"), guest("2"))
    written = diary.Diary.open_in(tmp_path, "op", time=3.0)
    written.moving("1", "b", Way.LIVE)
    if noted:
        moved = Result(uuid="1", name="n", outcome=Outcome.MOVED, way=Way.LIVE)
        written.ended(moved)
    if arrived or noted:
        del mover.here["1"]
    report = drain(mover, tmp_path).run()
    assert outcomes(report) == {"1": Outcome.MOVED, "2": Outcome.MOVED}
    assert [uuid for uuid, _, _ in mover.calls].count("1") == (
        0 if arrived or noted else 1
    )
    assert report.began == 3.0


def test_killed_before_its_files_are_written_reports_again(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"))

    def kill(report: Report) -> None:
        raise Killed

    with pytest.raises(Killed):
        drain(mover, tmp_path).run(then=kill)
    reports: list[Report] = []
    drain(mover, tmp_path).run(then=reports.append)
    assert outcomes(reports[0]) == {"1": Outcome.MOVED} and len(mover.calls) == 1


def test_came_back_meanwhile_is_moved_again(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"))
    written = diary.Diary.open_in(tmp_path, "op", time=3.0)
    written.ended(Result(uuid="1", name="n", outcome=Outcome.MOVED, way=Way.LIVE))
    assert outcomes(drain(mover, tmp_path).run()) == {"1": Outcome.MOVED}
    assert len(mover.calls) == 1


# The way back


def test_return_plan_is_for_who_moved(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"), guest("2", Way.LEAVE), targets=["b"])
    report = drain(mover, tmp_path).run()
    file = tmp_path / "back.json"
    returning.write(file, returning.of(report, mover))
    plan = returning.read(file)
    assert [(e.uuid, e.at, e.base) for e in plan.entries] == [
        ("1", "b", "a retired volume")
    ]
    assert returning.here(plan, "b") == {"1": "here"}
    assert returning.here(plan, "c") == {}
    file.write_text("{}")
    with pytest.raises(errors.PlanDamaged):
        returning.read(file)


def test_only_those_of_a_return_plan_move(tmp_path: Path) -> None:
    mover = FakeMover(guest("1"), guest("2"))
    report = drain(mover, tmp_path).run(only={"2": "c"})
    assert outcomes(report) == {"2": Outcome.MOVED}
    assert mover.calls == [("2", "c", Way.LIVE)]


# Rounds


def note(name: str, *, draining: bool) -> drainnote.Note:
    return drainnote.Note(host="x", draining=draining, since=0.0, rolling=name)


def test_each_host_waits_for_those_before_it() -> None:
    hosts = ["a", "b", "c"]
    name = rolling.name(hosts, "s")
    assert rolling.before("c", hosts, "s") == ("b", "a", "s")
    assert rolling.waits_for("a", hosts, name, {}) == ""
    assert "had no turn" in rolling.waits_for("b", hosts, name, {"a": None})
    waiting = {"a": note(name, draining=True)}
    assert "--stop" in rolling.waits_for("b", hosts, name, waiting)
    other = {"a": note("another", draining=False)}
    assert "had no turn" in rolling.waits_for("b", hosts, name, other)
    done = {"a": note(name, draining=False)}
    assert rolling.waits_for("b", hosts, name, done) == ""


@pytest.mark.parametrize(
    "hosts, spare", [(["b"], "s"), (["a"], "a"), (["a", "a"], "s")]
)
def test_a_round_that_cannot_be(hosts: list[str], spare: str) -> None:
    with pytest.raises(ValueError):
        rolling.before("a", hosts, spare)


# What is left


def test_what_counts_as_empty() -> None:
    assert Leftovers().is_empty
    stopped = Leftovers(domains=("a",))
    assert not stopped.is_empty and not stopped.is_busy
    for name in ("running", "processes", "operations"):
        found = msgspec.structs.replace(stopped, **{name: ("x",)})
        assert found.is_busy and len(found.texts()) == 2


def test_plan_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """Its place is a directory: the rename fails, and what was written goes."""
    taken = tmp_path / "back.json"
    taken.mkdir()
    with pytest.raises(OSError):
        returning.write(taken, ReturnPlan(host="a", made=0.0, entries=()))
    assert list(tmp_path.iterdir()) == [taken]


def test_a_diary_that_cannot_be_written_ends_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing begins that would not be known after a kill."""
    mover = FakeMover(*(guest(str(n)) for n in range(4)), targets=["b"])

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(diary.Diary, "moving", full)
    with pytest.raises(OSError, match="no space"):
        drain(mover, tmp_path).run()
    assert mover.calls == []
