# SPDX-License-Identifier: Apache-2.0
"""Live moves between kinds of backends; snapshots that both hosts see go along."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import sides
from tests.functional.conftest import World
from tests.functional.livehosts import accept, settle
from tests.functional.test_snapshots_move import expect_tree, grown
from virtmigrate import consistency, errors
from virtmigrate.livemigration import Outcome

KINDS = [
    ("rbd", "rbd"),
    ("shared_dir", "shared_dir"),
    ("dir-ext4", "rbd"),
    ("rbd", "dir-ext4"),
]


@pytest.fixture(params=KINDS, ids="-".join)
def kinds(
    request: pytest.FixtureRequest,
    pair: tuple[sandbox.Host, sandbox.Host],
    tmp_path: Path,
    cluster: Callable[[], Ceph],
) -> Iterator[sides.Kinds]:
    if len(set(request.param)) > 1 and not request.config.getoption("--full"):
        pytest.skip("with --full")
    with sides.between(request.param, pair, tmp_path, cluster) as made:
        for side in (made.a, made.b):
            side.configure(accept_moves=True)
        yield made


def test_it_goes_on_there(kinds: sides.Kinds) -> None:
    a, b = kinds.a, kinds.b
    instance = kinds.spawn()
    before = a.root(instance)
    outcome = a.driver.live.migrate(instance.uuid, b.host.name)
    assert isinstance(outcome, Outcome)
    assert (a.state_of(instance), b.state_of(instance)) == (None, "running")
    for _ in range(2):
        left = [*a.driver.settle(), *b.driver.settle()]
    assert left == []
    assert b.root(instance) == before
    b.driver.power_off(instance)
    b.driver.power_on(None, instance)
    assert b.state_of(instance) == "running"
    assert consistency.check(b.driver.node) == []
    b.driver.destroy(None, instance)
    for side in (a, b):
        backend = side.driver.node.backends[side.name]
        backend.drain(60)
        assert [v for v in side.volumes() if v.startswith(f"{side.name}/vda")] == []


def test_a_tree_goes_along_where_both_see_it(world: World) -> None:
    world.share()
    accept(world)
    instance = grown(world)
    world.a.driver.live.migrate(instance.uuid, world.b.host.name)
    assert world.b.state_of(instance) == "running"
    assert settle(world) == []
    expect_tree(world, world.b, instance)
    world.b.driver.destroy(None, instance, None)
    assert world.b.files() == []


def test_a_tree_is_left_to_cold_moves_elsewhere(world: World) -> None:
    accept(world)
    instance = grown(world)
    with pytest.raises(errors.MigrationRefused, match="has snapshots"):
        world.a.driver.live.migrate(instance.uuid, world.b.host.name)
    assert world.a.state_of(instance) == "running"


def test_a_layer_over_an_image_is_sent_whole(world: World) -> None:
    """What the guest sees becomes one raw volume at the peer."""
    accept(world)
    a, b, instance = world.a, world.b, world.instance()
    meta = {"path": str(world.image()), "id": "some-image", "disk_format": "raw"}
    a.driver.spawn(None, instance, meta)
    record = a.driver.node.entitled(instance.uuid)
    assert len(a.driver.node.files.chain(record.disks[0].volume)) == 2
    before = world.read(a, instance)
    a.driver.live.migrate(instance.uuid, b.host.name)
    assert settle(world) == []
    world.tmp.joinpath("guest-view").unlink()
    assert world.read(b, instance) == before
    assert len(b.driver.node.files.chain("vda." + b_operation(world, instance))) == 1
    assert (a.state_of(instance), b.state_of(instance)) == (None, "running")
    for node in (a, b):
        assert consistency.check(node.driver.node) == []


def b_operation(world: World, instance: Any) -> str:
    return world.b.driver.node.entitled(instance.uuid).operation
