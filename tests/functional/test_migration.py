# SPDX-License-Identifier: Apache-2.0
"""Cold migration between two real hosts."""

import pytest

from tests.functional.conftest import World, digest
from virtmigrate import errors
from virtmigrate.units import GiB, MiB


def test_migrate_and_confirm(world: World) -> None:
    instance = world.spawn(world.a)
    assert world.a.state_of(instance) == "running"
    before = digest(world.a.disk(instance))

    ticket = world.migrate(instance)
    assert world.a.state_of(instance) is None
    world.finish(instance, ticket)
    assert world.b.state_of(instance) == "running"
    assert digest(world.b.disk(instance)) == before

    world.a.driver.confirm_migration(None, None, instance, None)
    world.b.driver.settle()
    assert world.a.files() == []
    kinds = {name.partition("/")[0] for name in world.b.files()}
    assert kinds == {"disks", "records", "instances"}


def test_migrate_and_revert(world: World) -> None:
    instance = world.spawn(world.a)
    before = digest(world.a.disk(instance))
    owned = world.a.files()

    ticket = world.migrate(instance)
    world.finish(instance, ticket)
    with pytest.raises(errors.NotRevertible):
        world.a.driver.finish_revert_migration(None, instance)
    world.b.driver.destroy(None, instance, None)
    assert world.b.state_of(instance) is None
    world.a.driver.finish_revert_migration(None, instance)

    assert world.a.state_of(instance) == "running"
    assert digest(world.a.disk(instance)) == before
    disks = [name for name in owned if name.startswith("disks/")]
    assert [n for n in world.a.files() if n.startswith("disks/")] == disks
    world.b.driver.settle()
    assert [n for n in world.b.files() if "instances/" not in n] == []


def test_resize_grows_root_and_adds_memory(world: World) -> None:
    instance = world.spawn(world.a, root_gb=1)
    ticket = world.migrate(instance, root_gb=2, memory_mb=96, vcpus=2)
    world.finish(instance, ticket, resize_instance=True)

    disk = world.b.disk(instance)
    assert disk.stat().st_size == 2 * GiB
    info = world.b.driver.get_info(instance)
    assert (info.max_memory, info.vcpus) == (96 * MiB, 2)


def test_shrinking_is_refused_before_anything_is_touched(world: World) -> None:
    instance = world.spawn(world.a, root_gb=2)
    with pytest.raises(errors.MigrationRefused, match="shrink"):
        world.migrate(instance, root_gb=1)
    assert world.a.state_of(instance) == "running"
