# SPDX-License-Identifier: Apache-2.0
"""A resize that stays on its host, within a backend and from one to another."""

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.sides import SIZE, Kinds, Side, put_layer, spoil
from virtmigrate import errors
from virtmigrate.formats import DiskFormat
from virtmigrate.mailbox import CARD
from virtmigrate.model import InstanceState
from virtmigrate.progress import Progress, Report
from virtmigrate.units import MiB

FILES, IMAGES = "files", "images"
WAYS = [(FILES, FILES), (IMAGES, IMAGES), (FILES, IMAGES), (IMAGES, FILES)]
"""Backends before and after."""

SEED = 20
"""Chooses the points that are killed at without --full."""


@pytest.fixture(scope="module")
def host(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("same-alpha")
    box.remove_host("same-alpha")


class Place:
    """One host with files and images, and what is done there."""

    def __init__(self, side: Side, tmp: Path) -> None:
        self.side = side
        self._kinds = Kinds(side, side, tmp)

    def spawn(self, backend: str) -> Any:
        return self._kinds.spawn(Kinds.flavor_of(backend))

    def resize(self, instance: Any, backend: str, **values: int) -> None:
        flavor = Kinds.flavor_of(backend, **{"memory_mb": 80, **values})
        driver, name = self.side.driver, self.side.host.name
        ticket = driver.migrate_disk_and_power_off(None, instance, name, flavor, None)
        driver.finish_migration(None, None, instance, ticket, None)

    def confirm(self, instance: Any) -> None:
        self.side.driver.confirm_migration(None, None, instance, None)

    def revert(self, instance: Any) -> None:
        """As a compute service does, whose peer is itself."""
        self.side.driver.destroy(None, instance, None)
        self.side.driver.finish_revert_migration(None, instance)

    def memory(self, instance: Any) -> int:
        return self.side.driver.node.domains.info(instance.uuid).max_memory // MiB

    def expect_one(self, instance: Any, backend: str, memory: int, root: str) -> None:
        """One instance that runs, of one volume, and nothing that a move left."""
        self.side.driver.settle()
        assert self.side.driver.settle() == []
        assert self.side.driver.open_operations() == []
        node = self.side.driver.node
        assert node.mailbox.transfers.names() == [CARD]
        assert node.entitled(instance.uuid).state is InstanceState.HERE
        assert self.side.state_of(instance) == "running"
        assert self.memory(instance) == memory
        name, volume = self.side.disk(instance)
        assert (name, volume.format) == (backend, DiskFormat.RAW)
        assert self.side.root(instance) == root
        assert self.volumes() == {f"{name}/{volume.name}"}
        # Other hosts see where the images lie, and are told who may run it.
        tenure = node.backend(IMAGES).tenures.find(instance.uuid)
        assert (tenure is not None) == (backend == IMAGES)
        assert tenure is None or tenure.body.host == node.name

    def volumes(self) -> set[str]:
        """All volumes of disks, without their records."""
        found = {n for n in self.side.volumes() if ".rec." not in n}
        return {n for n in found if "/vda" in n}


@pytest.fixture
def place(
    host: sandbox.Host, tmp_path: Path, cluster: Callable[[], Ceph]
) -> Iterator[Place]:
    with places.PLACES["rbd"](host, "same", tmp_path / "a", cluster) as values:
        side = Side(host, tmp_path / "a", values, IMAGES)
        try:
            yield Place(side, tmp_path)
        finally:
            side.close()


@pytest.fixture(params=WAYS, ids="-to-".join)
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


def test_resized_and_confirmed(place: Place, way: tuple[str, str]) -> None:
    instance = place.spawn(way[0])
    before = place.side.root(instance)
    place.resize(instance, way[1], vcpus=2)
    assert place.side.state_of(instance) == "running"
    assert place.memory(instance) == 80
    assert place.side.root(instance) == before
    state = place.side.driver.node.entitled(instance.uuid).state
    assert state is InstanceState.ARRIVED
    place.confirm(instance)
    place.expect_one(instance, way[1], 80, before)
    place.side.driver.destroy(None, instance, None)
    assert place.volumes() == set()


def test_resized_and_reverted(place: Place, way: tuple[str, str]) -> None:
    instance = place.spawn(way[0])
    before, volumes = place.side.root(instance), place.volumes()
    place.resize(instance, way[1], root_gb=1)
    assert place.side.disk(instance)[1].size == 1024 * MiB
    if way[0] != way[1] or way[0] == IMAGES:
        spoil(place.side, instance)
    place.revert(instance)
    assert place.volumes() == volumes
    assert place.side.disk(instance)[1].size == SIZE
    place.expect_one(instance, way[0], 64, before)
    place.side.driver.destroy(None, instance, None)
    assert place.volumes() == set()


def test_there_and_back(place: Place) -> None:
    instance = place.spawn(FILES)
    before = place.side.root(instance)
    for backend, memory in ((IMAGES, 80), (FILES, 64), (IMAGES, 96)):
        place.resize(instance, backend, memory_mb=memory)
        place.confirm(instance)
        place.expect_one(instance, backend, memory, before)
    place.side.driver.destroy(None, instance, None)


def test_a_reverted_one_can_be_resized_again(place: Place) -> None:
    instance = place.spawn(FILES)
    before = place.side.root(instance)
    place.resize(instance, IMAGES)
    place.revert(instance)
    place.resize(instance, IMAGES)
    place.confirm(instance)
    place.expect_one(instance, IMAGES, 80, before)
    place.side.driver.destroy(None, instance, None)


def test_layers_do_not_cross_backends(place: Place) -> None:
    instance = place.spawn(FILES)
    put_layer(place.side, instance, 2 * SIZE, f"write -P 17 {30 * MiB} {MiB}")
    before = place.side.root(instance)
    place.resize(instance, IMAGES)
    place.confirm(instance)
    place.expect_one(instance, IMAGES, 80, before)
    place.side.driver.destroy(None, instance, None)


@pytest.mark.parametrize("phase", ["copying vda", "verifying vda", "handing over"])
def test_a_failure_leaves_nothing(place: Place, phase: str) -> None:
    instance = place.spawn(FILES)
    before = place.side.root(instance)

    def fail(report: Report) -> None:
        if report.phase == phase and report.done >= report.total / 2:
            raise OSError("injected")

    place.side.driver._progress = lambda: Progress(fail, interval=0)
    with pytest.raises(errors.MigrationRolledBack, match="injected"):
        place.resize(instance, IMAGES)
    place.expect_one(instance, FILES, 64, before)
    place.side.driver.destroy(None, instance, None)


def test_what_is_half_undone_is_not_destroyed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says again that it is here, and a giving back is a destroy."""
    instance = place.spawn(FILES)
    before, driver = place.side.root(instance), place.side.driver
    place.resize(instance, FILES)
    driver.destroy(None, instance, None)

    def fail(*_: object) -> None:
        raise OSError("injected")

    with monkeypatch.context() as patch:
        patch.setattr("virtmigrate.migration.undo.Undo._drop_layers", fail)
        with pytest.raises(OSError, match="injected"):
            driver.finish_revert_migration(None, instance)
    with pytest.raises(errors.InvalidState, match="is open"):
        driver.destroy(None, instance, None)
    driver.finish_revert_migration(None, instance)
    place.expect_one(instance, FILES, 64, before)
    driver.destroy(None, instance, None)


def test_no_room_is_told_before_the_stop(place: Place) -> None:
    instance = place.spawn(FILES)
    before = place.side.root(instance)
    with pytest.raises(errors.MigrationRefused, match="has room for"):
        place.resize(instance, IMAGES, root_gb=10_000)
    place.expect_one(instance, FILES, 64, before)
    place.side.driver.destroy(None, instance, None)


def test_what_is_away_elsewhere_is_not_taken(place: Place) -> None:
    """Who writes to the mailbox cannot bring back what was given to another host."""
    instance = place.spawn(FILES)
    driver, name = place.side.driver, place.side.host.name
    flavor = Kinds.flavor_of(IMAGES)
    ticket = driver.migrate_disk_and_power_off(None, instance, name, flavor, None)
    node = driver.node
    own = node.instances.read(instance.uuid).body
    node.publish_instance(msgspec.structs.replace(own, peer="another"))
    with pytest.raises(errors.NotEntitled, match="says away"):
        driver.finish_migration(None, None, instance, ticket, None)
    node.publish_instance(own)
    driver.finish_migration(None, None, instance, ticket, None)
    place.revert(instance)
    driver.destroy(None, instance, None)


# Killed


KILLED = [(FILES, FILES), (FILES, IMAGES), (IMAGES, FILES)]


@pytest.mark.parametrize("way", KILLED, ids="-to-".join)
@pytest.mark.parametrize("then", ["confirm", "revert"])
@pytest.mark.timeout(3600)
def test_killed(
    place: Place, request: pytest.FixtureRequest, way: tuple[str, str], then: str
) -> None:
    count = Case(place, way, then).run(0)
    assert count is not None and count > 50
    points = list(range(1, count + 1))
    part, parts = map(int, request.config.getoption("--part").split("/"))
    points = [point for point in points if point % parts == part]
    if not request.config.getoption("--full"):
        points = sorted(random.Random(f"{SEED}{then}{way}").sample(points, 2))
    for point in points:
        Case(place, way, then).run(point)


class Case:
    """One instance, resized by a process that is killed."""

    def __init__(self, place: Place, way: tuple[str, str], then: str) -> None:
        self._place = place
        self._way = way
        self._then = then
        self._instance = place.spawn(way[0])
        self._before = place.side.root(self._instance)

    def run(self, point: int) -> int | None:
        """Kill at a point, recover as a compute service would, and check."""
        driver = self._place.side.driver
        driver.cleanup_host(self._place.side.host.name)
        result = self._run_killed(point)
        try:
            expected = -signal.SIGKILL if point else 0
            assert result.returncode == expected, result.stderr
            self._place.side.restart()
            if point:
                self._go_on()
            self._check()
        except BaseException as e:
            e.add_note(f"killed at point {point}: {self._then}, {self._way}")
            raise
        return int(result.stdout) if not point else None

    # Private

    def _run_killed(self, point: int) -> "subprocess.CompletedProcess[str]":
        path = self._place.side.config.with_name("plan.json")
        settings = {
            "config": str(self._place.side.config),
            "values": {"address": self._place.side.host.name},
        }
        plan = {
            "a": settings,
            "b": settings,
            "instance": self._instance.uuid,
            "flavor": vars(Kinds.flavor_of(self._way[1], memory_mb=80)),
            "point": point,
            "then": self._then,
        }
        path.write_text(json.dumps(plan))
        argv = [sys.executable, "-m", "tests.functional.killed", str(path)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=100)

    def _go_on(self) -> None:
        """Do what was being done once more, from whatever state it is in."""
        driver = self._place.side.driver
        if self._then == "revert":
            if driver.open_operations():
                try:
                    self._place.revert(self._instance)
                except errors.InvalidState:
                    # It was not taken yet.
                    driver.finish_revert_migration(None, self._instance)
            return
        try:
            self._place.confirm(self._instance)
        except errors.NotConfirmable:
            self._place.resize(self._instance, self._way[1])
            self._place.confirm(self._instance)
        if self._place.memory(self._instance) != 80:
            self._place.resize(self._instance, self._way[1])
            self._place.confirm(self._instance)

    def _check(self) -> None:
        confirmed = self._then == "confirm"
        self._place.expect_one(
            self._instance,
            self._way[1 if confirmed else 0],
            80 if confirmed else 64,
            self._before,
        )
        self._place.side.driver.destroy(None, self._instance, None)
        assert self._place.volumes() == set()
