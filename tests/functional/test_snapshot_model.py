# SPDX-License-Identifier: Apache-2.0
"""Random changes of snapshots, against a plain model of what each of them holds.

`make test` takes 8 seeded sequences of 12 steps, --full 200 of 30.
"""

import dataclasses
import subprocess
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from tests.functional.conftest import World, guest_view
from tests.functional.guestdisk import LENGTH, OFFSET, write
from virtmigrate import consistency, errors
from virtmigrate.formats import DiskFormat
from virtmigrate.snapshot import Kind, Memory, Place, Return, Wanted

BLOCKS = 3
"""Places on the disk that are written to."""


@dataclasses.dataclass
class Kept:
    """What a snapshot must hold."""

    name: str
    parent: str | None
    data: tuple[int, ...]
    wanted: Wanted
    power: str


class Machine(stateful.RuleBasedStateMachine):
    """One instance, and the model of it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.guest: Any = world.spawn(world.a)
        self.data = (0,) * BLOCKS
        self.kept: dict[str, Kept] = {}
        self.current: str | None = None
        self.count = 0
        self.power = "off"
        self.is_written = False
        """Its memory was, since it was paused: QEMU does that once."""
        for block in range(BLOCKS):
            self._write(block, 0)
        self._do("power_off", self.guest)

    @stateful.rule(block=st.integers(0, BLOCKS - 1), value=st.integers(1, 255))
    def write(self, block: int, value: int) -> None:
        self._write(block, value)
        data = list(self.data)
        data[block] = value
        self.data = tuple(data)

    @stateful.rule(kind=st.sampled_from(Kind))
    def create(self, kind: Kind) -> None:
        self._create(Wanted(self._name(), kind=kind))

    @stateful.precondition(lambda self: self._is_layer())
    @stateful.rule(saved=st.booleans())
    def create_inside(self, saved: bool) -> None:
        outside = saved and not self.is_written
        memory = Memory.EXTERNAL if outside else Memory.INTERNAL
        self._create(
            Wanted(
                self._name(),
                kind=Kind.CHECKPOINT,
                memory=Memory.NONE if self.power == "off" else memory,
                places={"vda": Place.INTERNAL},
            )
        )
        if outside:
            self.is_written = False

    @stateful.precondition(lambda self: self.power != "off" and not self.is_written)
    @stateful.rule()
    def create_with_memory(self) -> None:
        memory = Memory.EXTERNAL
        self._create(Wanted(self._name(), kind=Kind.CHECKPOINT, memory=memory))
        self.is_written = self.power == "paused"

    @stateful.precondition(lambda self: self.kept)
    @stateful.rule(
        pick=st.integers(0, 99),
        keep=st.booleans(),
        prune=st.booleans(),
        wanted=st.sampled_from(["", "", "running", "paused", "off"]),
    )
    def revert(self, pick: int, keep: bool, prune: bool, wanted: str) -> None:
        chosen, last = self._pick(pick), self._name() if keep else ""
        back = Return(chosen.name, power=wanted, keep=last, delete_children=prune)
        try:
            self.world.a.driver.snapshots.revert(self.guest.uuid, back)
        except errors.SnapshotRefused:
            self._demand_an_inside_one()
            return
        if prune:
            self._forget(self._below(chosen.name))
        if keep:
            self.kept[last] = Kept(
                last, self.current, self.data, Wanted(last), self.power
            )
        self.data, self.current = chosen.data, chosen.name
        then = self.power
        if chosen.wanted.kind is Kind.CHECKPOINT:
            then = chosen.power
        self.power = wanted or then
        self.is_written = False

    @stateful.precondition(lambda self: self.kept)
    @stateful.rule(
        pick=st.integers(0, 99),
        what=st.sampled_from(["one", "one", "with children", "children"]),
    )
    def delete(self, pick: int, what: str) -> None:
        chosen = self._pick(pick)
        children, itself = what != "one", what != "children"
        gone = [
            *(self._below(chosen.name) if children else []),
            *([chosen.name] if itself else []),
        ]
        try:
            self.world.a.driver.snapshots.delete(
                self.guest.uuid, chosen.name, children=children, itself=itself
            )
        except errors.SnapshotRefused:
            # Those that are not inside may be gone by then.
            self._demand_an_inside_one()
            left = {each.name for each in self._tree()}
            gone = [name for name in gone if name not in left]
        self._forget(gone)

    @stateful.rule()
    def restart(self) -> None:
        assert self.world.a.new_driver().settle() == []

    @stateful.rule(wanted=st.sampled_from(["running", "paused", "off"]))
    def turn(self, wanted: str) -> None:
        if wanted == "off":
            self._do("power_off", self.guest)
        else:
            self._do("power_on", None, self.guest, None)
            self._do("pause" if wanted == "paused" else "unpause", self.guest)
        self.is_written = self.is_written and wanted == "paused"
        self.power = wanted

    @stateful.invariant()
    def is_as_it_should_be(self) -> None:
        state = self.world.a.state_of(self.guest)
        assert state == {"off": "shutoff"}.get(self.power, self.power)
        assert self._read() == self.data
        found = {each.id: each for each in self._tree()}
        names = {None: None, **{key: each.name for key, each in found.items()}}
        parents = {each.name: names[each.parent] for each in found.values()}
        assert parents == {name: each.parent for name, each in self.kept.items()}
        _, current = self.world.a.driver.snapshots.all(self.guest.uuid)
        assert names[current] == self.current

    def teardown(self) -> None:
        try:
            self._check_all()
        finally:
            self._do("destroy", None, self.guest, None)
        assert self.world.a.files() == []

    # Private

    def _check_all(self) -> None:
        """What every snapshot holds; then all of them go, and one volume stays."""
        snapshots, uuid = self.world.a.driver.snapshots, self.guest.uuid
        unreached = set(self.kept)
        while unreached:
            # What is inside of a volume below others is reached when they have gone.
            reached = {name for name in unreached if self._is_right(name)}
            assert reached, unreached
            for name in reached:
                snapshots.delete(uuid, name)
            unreached -= reached
        assert snapshots.all(uuid) == ((), None)
        assert len(self._volumes()) == 1, self._volumes()
        assert consistency.check(self.world.a.driver.node) == []

    def _is_right(self, name: str) -> bool:
        off = self.kept[name].wanted.memory is Memory.NONE
        back = Return(name, power="off" if off else "")
        try:
            self.world.a.driver.snapshots.revert(self.guest.uuid, back)
        except errors.SnapshotRefused:
            self._demand_an_inside_one()
            return False
        assert self._read() == self.kept[name].data, name
        self._do("power_off", self.guest)
        return True

    def _demand_an_inside_one(self) -> None:
        inside = [k for k in self.kept.values() if k.wanted.places]
        assert inside, "it was refused"

    def _do(self, method: str, *args: Any) -> None:
        getattr(self.world.a.driver, method)(*args)

    def _name(self) -> str:
        self.count += 1
        return f"s{self.count}"

    def _create(self, wanted: Wanted) -> None:
        self.world.a.driver.snapshots.create(self.guest.uuid, wanted)
        self.kept[wanted.name] = Kept(
            wanted.name, self.current, self.data, wanted, self.power
        )
        self.current = wanted.name

    def _pick(self, number: int) -> Kept:
        return list(self.kept.values())[number % len(self.kept)]

    def _below(self, name: str) -> list[str]:
        found = []
        for each in list(self.kept.values()):
            if each.parent == name:
                found += [*self._below(each.name), each.name]
        return found

    def _forget(self, gone: list[str]) -> None:
        for name in gone:
            parent = self.kept.pop(name).parent
            for each in self.kept.values():
                if each.parent == name:
                    each.parent = parent
            if self.current == name:
                self.current = parent

    def _tree(self) -> Any:
        return self.world.a.driver.snapshots.all(self.guest.uuid)[0]

    def _volumes(self) -> list[str]:
        catalog = self.world.a.driver.node.files.catalog.all()
        return [s.name for s in catalog if s.body.owner == self.guest.uuid]

    def _layers(self) -> Any:
        here = self.world.a.driver.node
        (ref,) = here.entitled(self.guest.uuid).disks
        return here.backend(ref.backend).layers(ref.volume)

    def _is_layer(self) -> bool:
        return bool(self._layers()[0].fmt is DiskFormat.QCOW2)

    def _write(self, block: int, value: int) -> None:
        offset = OFFSET + block * LENGTH
        if self.power != "off" or self.world.a.state_of(self.guest) == "running":
            write(self.world.a, self.guest, value, offset)
            return
        line = f"write -P {value} {offset} {LENGTH}"
        argv = ["qemu-io", "-c", line, guest_view(self._layers())]
        subprocess.run(argv, check=True, capture_output=True, timeout=30)

    def _read(self) -> tuple[int, ...]:
        found = self.world.read(self.world.a, self.guest)
        blocks = [
            set(found[start : start + LENGTH])
            for start in range(OFFSET, OFFSET + BLOCKS * LENGTH, LENGTH)
        ]
        assert all(len(each) == 1 for each in blocks)
        return tuple(each.pop() for each in blocks)


@pytest.fixture
def chains(world: World) -> Iterator[World]:
    """A world in which no sequence comes to a limit."""
    world.a.overrides = {"max_chain": 64, "max_snapshots": 64}
    world.a.new_driver()
    yield world


@pytest.mark.timeout(14000)
def test_random_changes(chains: World, request: pytest.FixtureRequest) -> None:
    is_full = request.config.getoption("--full")
    options = hypothesis.settings(
        max_examples=200 if is_full else 8,
        stateful_step_count=30 if is_full else 12,
        deadline=None,
        derandomize=True,
        database=None,
        # Going on after a failure would take hours.
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    class Bound(Machine):
        def __init__(self) -> None:
            super().__init__(chains)

    stateful.run_state_machine_as_test(Bound, settings=options)
