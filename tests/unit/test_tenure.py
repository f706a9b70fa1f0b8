# SPDX-License-Identifier: Apache-2.0
"""Who may run an instance: races and refusals, with storage in memory.

On the real thing: tests/functional/test_tenures.py.
"""

from collections.abc import Callable
from typing import Any, cast

import pytest

from virtmigrate import errors, instance, model, record, tenure
from virtmigrate.backends import terms
from virtmigrate.backends.base import Backend
from virtmigrate.backends.dir import DirBackend

UUID = "11111111-2222-3333-4444-555555555555"
DOWN = errors.StorageDown(host="a", pool="p", seconds=1, reason="test")


class Records:
    """The newest generation; `meanwhile` is what another host does before a write."""

    def __init__(self) -> None:
        self.stored: record.Stored[model.Tenure] | None = None
        self.meanwhile: list[Callable[[], None]] = []
        self.failing: errors.Error | None = None

    def find(self, uuid: str) -> record.Stored[model.Tenure] | None:
        if self.failing:
            raise self.failing
        return self.stored

    def publish(self, uuid: str, body: model.Tenure, *, after: int) -> None:
        if self.meanwhile:
            self.meanwhile.pop()()
        if after != (self.stored.generation if self.stored else 0):
            raise errors.RecordConflict(
                host="a", pool="p", record=uuid, expected=after, found="?"
            )
        self.stored = record.Stored(uuid, after + 1, body)

    def remove(self, uuid: str) -> None:
        self.stored = None


class Storage:
    """A backend that several hosts see."""

    def __init__(self, name: str, *, shared: bool = True, fences: bool = True) -> None:
        self.name = name
        self.tenures = Records()
        self.open: set[str] = set()
        self.fenced: list[set[str]] = []
        self.failing: errors.Error | None = None
        values = {"shared": shared, "fences": fences}
        known = DirBackend.capabilities.__dict__ | values
        self.capabilities = terms.Capabilities(**known)

    def clients(self, name: str) -> set[str]:
        if self.failing:
            raise self.failing
        return set(self.open)

    def fence(self, clients: set[str]) -> None:
        self.fenced.append(clients)

    @property
    def now(self) -> model.Tenure:
        assert self.tenures.stored is not None
        return self.tenures.stored.body


class Domains:
    def __init__(self) -> None:
        self.killed = False

    def forbid_autostart(self, uuid: str) -> None:
        """Nothing is started here."""

    def xml(self, uuid: str) -> str:
        return "<domain/>"

    def kill(self, uuid: str) -> None:
        self.killed = True


def told(host: str, *storages: Storage) -> tenure.Tenures:
    found = {each.name: cast(Backend, each) for each in storages}
    return tenure.Tenures(found, host)


def of(*backends: str) -> model.Instance:
    return model.Instance(
        uuid=UUID,
        name="guest",
        owner="nova",
        host="a",
        state=model.InstanceState.HERE,
        operation="0123456789abcdef",
        memory=1,
        vcpus=1,
        disks=tuple(
            model.DiskRef(
                target=f"vd{n}", volume="v", backend=each, role=model.Role.DATA
            )
            for n, each in enumerate(backends)
        ),
    )


def start(host: str, storage: Storage, meanwhile: Callable[[], None]) -> Domains:
    domains = Domains()
    known = cast(instance.Domains, domains)
    with told(host, storage).starting(of(storage.name), known):
        meanwhile()
    return domains


def test_clients_are_noted_after_the_start() -> None:
    one = Storage("one")
    seen: list[Any] = []

    def started() -> None:
        seen.append(one.now.clients)
        one.open = {"client"}

    start("a", one, started)
    assert seen == [None]
    assert one.now.clients == ("client",)


def test_clients_that_cannot_be_noted_do_not_stop_it() -> None:
    one = Storage("one")
    one.failing = DOWN
    domains = start("a", one, lambda: None)
    assert not domains.killed
    assert one.now.clients is None


def test_what_the_storage_does_not_show_of_a_disk_is_not_known() -> None:
    one = Storage("one")
    start("a", one, lambda: None)
    assert one.now.clients is None


def test_clients_of_another_start_are_not_those_of_this_one() -> None:
    """What watches the disk may be left of an earlier start."""
    one = Storage("one")
    one.open = {"old"}
    one.failing = DOWN
    start("a", one, lambda: None)
    one.failing = None
    with pytest.raises(errors.TakeOverRefused, match="a was starting it"):
        told("b", one).seize(of("one"), is_down=False)
    assert (one.fenced, one.now.host) == ([], "a")
    told("b", one).seize(of("one"), is_down=True)
    assert (one.fenced, one.now.host) == ([{"old"}], "b")


@pytest.mark.parametrize("is_off", [False, True])
def test_noted_late(is_off: bool) -> None:
    one = Storage("one")
    start("a", one, lambda: None)
    one.open = {"client"}
    told("b", one).note_late(of("one"), is_off=is_off)
    assert one.now.clients is None
    told("a", one).note_late(of("one"), is_off=is_off)
    assert one.now.clients == (() if is_off else ("client",))


def test_overtaken_between_start_and_note() -> None:
    one = Storage("one", fences=False)
    domains = Domains()
    known = cast(instance.Domains, domains)
    with (
        pytest.raises(errors.HeldElsewhere, match="are b's"),
        told("a", one).starting(of("one"), known),
    ):
        told("b", one).seize(of("one"), is_down=True)
    assert domains.killed


def test_refused_before_the_start_kills_nothing() -> None:
    one = Storage("one")
    told("b", one).take(of("one"))
    domains = Domains()
    with (
        pytest.raises(errors.HeldElsewhere),
        told("a", one).starting(of("one"), cast(instance.Domains, domains)),
    ):
        raise AssertionError("it was started")
    assert not domains.killed


def test_a_seizure_that_lost_a_race_fences_again() -> None:
    one = Storage("one")
    one.open = {"old"}
    start("a", one, lambda: None)

    def restarted() -> None:
        one.open = {"new"}
        start("a", one, lambda: None)

    one.tenures.meanwhile = [restarted]
    told("b", one).seize(of("one"), is_down=False)
    assert one.fenced == [{"old"}, {"new"}]
    assert one.now.host == "b"


def test_a_refusal_by_one_backend_changes_none() -> None:
    one, two = Storage("one"), Storage("two", fences=False)
    told("a", one, two).take(of("one", "two"))
    with pytest.raises(errors.TakeOverRefused, match="backend two cannot keep a"):
        told("b", one, two).seize(of("one", "two"), is_down=False)
    assert one.fenced == []
    assert (one.now.host, two.now.host) == ("a", "a")


def test_taken_from_a_third_host_only_if_that_is_meant() -> None:
    one = Storage("one")
    told("c", one).take(of("one"))
    holders = frozenset({"a", "b"})
    with pytest.raises(errors.HeldElsewhere, match="are c's"):
        told("a", one).seize(of("one"), is_down=True, holders=holders)
    assert (one.fenced, one.now.host) == ([], "c")


def test_passed_on_it_may_be_taken_by_either() -> None:
    one = Storage("one")
    told("a", one).take(of("one"))
    told("a", one).pass_on(of("one"), "b")
    for host in ("a", "b"):
        told(host, one).demand(of("one"))
    with pytest.raises(errors.HeldElsewhere):
        told("c", one).demand(of("one"))
    told("b", one).take(of("one"))
    told("a", one).pass_on(of("one"), "c")
    assert (one.now.host, one.now.peer) == ("b", None)


def test_of_an_open_move_a_third_host_takes_nothing() -> None:
    """The peer may run a copy elsewhere, and no client of it is known here."""
    one = Storage("one")
    told("a", one).take(of("one"))
    told("a", one).pass_on(of("one"), "b")
    with pytest.raises(errors.TakeOverRefused, match="moving it to b"):
        told("c", one).seize(of("one"), is_down=False)
    assert (one.now.host, one.fenced) == ("a", [])
    told("c", one).seize(of("one"), is_down=True)
    assert one.now.host == "c"


def test_from_whom_it_was_taken_may_not_begin_anew() -> None:
    """Not even when it has left the storage: only he does not know of that."""
    one = Storage("one")
    told("a", one).take(of("one"))
    told("b", one).seize(of("one"), is_down=True)
    assert one.now.lost == ("a",)
    told("b", one).drop(UUID, ["one"])
    with pytest.raises(errors.TakenAway, match="b took it over"):
        start("a", one, lambda: None)
    with pytest.raises(errors.TakenAway):
        told("a", one).take(of("one"))
    with pytest.raises(errors.TakenAway):
        told("a", one).seize(of("one"), is_down=True)
    assert told("a", one).holder(cast(Backend, one), UUID) == "b"
    one.tenures.failing = DOWN
    told("a", one).renounce(UUID, [cast(Backend, one)])
    one.tenures.failing = None
    assert one.now.lost == ("a",)
    told("a", one).renounce(UUID, [cast(Backend, one)])
    assert one.tenures.stored is None


def test_nobody_takes_it_while_its_disks_are_put_back() -> None:
    one = Storage("one")
    one.open = {"client"}
    start("a", one, lambda: None)
    with told("a", one).rewriting(of("one")):
        with pytest.raises(errors.TakeOverRefused, match="putting its disks back"):
            told("b", one).seize(of("one"), is_down=False)
        assert one.now.host == "a"
    assert one.now.clients == ()
    told("b", one).seize(of("one"), is_down=False)
    with pytest.raises(errors.HeldElsewhere), told("a", one).rewriting(of("one")):
        raise AssertionError("it was put back")


def test_what_could_not_be_put_back_is_not_taken() -> None:
    one = Storage("one")
    with pytest.raises(OSError), told("a", one).rewriting(of("one")):
        raise OSError
    with pytest.raises(errors.TakeOverRefused):
        told("b", one).seize(of("one"), is_down=False)


def test_others_may_have_what_has_left() -> None:
    one = Storage("one")
    told("a", one).take(of("one"))
    told("b", one).seize(of("one"), is_down=True)
    told("b", one).drop(UUID, ["one"])
    told("c", one).take(of("one"))
    assert (one.now.host, one.now.lost) == ("c", ("a",))
    told("c", one).drop(UUID, ["one"])
    assert one.now.gone
    told("a", one).drop(UUID, ["one"])
    assert one.tenures.stored is None


def test_all_that_had_a_move_may_come_back() -> None:
    one = Storage("one")
    told("a", one).take(of("one"))
    told("a", one).pass_on(of("one"), "b")
    told("c", one).seize(of("one"), is_down=True)
    start("c", one, lambda: None)
    assert " ".join(one.now.lost) == "a b"
    told("c", one).pass_on(of("one"), "b")
    told("b", one).take(of("one"))
    assert (one.now.host, " ".join(one.now.lost)) == ("b", "a")
    told("a", one).drop(UUID, ["one"])
    assert (one.now.host, " ".join(one.now.lost)) == ("b", "")


def test_seized_while_it_is_dropped() -> None:
    """One of the two comes first; what somebody has then is not removed."""
    one = Storage("one")
    told("a", one).take(of("one"))
    one.tenures.meanwhile = [lambda: told("b", one).seize(of("one"), is_down=True)]
    told("a", one).drop(UUID, ["one"])
    assert (one.now.host, one.now.lost) == ("b", ())


def test_only_its_own_is_dropped() -> None:
    one, two = Storage("one"), Storage("two")
    told("a", one, two).take(of("one", "two"))
    told("b", one, two).drop(UUID, ["one", "two"])
    assert one.now.host == "a"
    told("a", one, two).drop(UUID, ["one"])
    assert one.tenures.stored is None
    assert two.now.host == "a"


def test_local_disks_are_not_asked_about() -> None:
    one = Storage("one", shared=False)
    start("a", one, lambda: None)
    assert one.tenures.stored is None
    assert not told("a", one).concern(of("one"))
