# SPDX-License-Identifier: Apache-2.0
"""How copies are proven, and what holds for those that are not."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import World, digest
from tests.functional.test_failures import At, flip
from virtmigrate import errors, journal
from virtmigrate.model import Proof
from virtmigrate.progress import Progress
from virtmigrate.units import MiB


def choose(world: World, **options: object) -> None:
    """Give the source these options."""
    world.a.overrides |= options
    world.a.new_driver()


def move(world: World) -> tuple[Any, str]:
    """Move an instance with a dense disk; return it and its disk's digest."""
    image = world.tmp / "dense"
    image.write_bytes(os.urandom(16 * MiB))
    instance = world.spawn(world.a, image)
    before = digest(world.a.disk(instance))
    world.finish(instance, world.migrate(instance))
    return instance, before


def proof_of(world: World, instance: Any) -> Proof:
    record = world.b.driver.node.entitled(instance.uuid)
    volumes = world.b.driver.node.backend("local").volumes
    return volumes.read(record.disks[0].volume).body.proof


@pytest.mark.parametrize("verify", ["sampled", "none"])
def test_what_is_not_proven_is_not_confirmed(world: World, verify: str) -> None:
    choose(world, verify=verify)
    instance, _ = move(world)
    assert proof_of(world, instance) is Proof(verify)
    with pytest.raises(errors.NotConfirmable, match=f"verify = {verify}"):
        world.confirm(instance)
    assert world.a.driver.open_operations()
    world.a.driver.settle()
    assert list((world.a.path / "disks").iterdir()), "the source's volumes stay"
    world.a.driver.confirm_migration(None, None, instance, None, accept_unproven=True)
    world.expect_one(instance, world.b)


def test_the_word_given_is_kept_over_a_crash(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONFIRMED was won with it, and cannot be undone: it is not asked for again."""
    choose(world, verify="none")
    instance, _ = move(world)
    real = journal.Journal.done

    def crash(self: journal.Journal, step: str, **facts: object) -> None:
        if step == "confirmed":
            raise OSError("killed")
        real(self, step, **facts)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(journal.Journal, "done", crash)
        world.a.driver.confirm_migration(
            None, None, instance, None, accept_unproven=True
        )
    world.a.new_driver()
    world.confirm(instance)
    world.expect_one(instance, world.b)


@pytest.mark.parametrize("verify", ["sampled", "none"])
def test_what_is_not_proven_can_be_taken_back(world: World, verify: str) -> None:
    choose(world, verify=verify)
    instance, before = move(world)
    world.b.driver.destroy(None, instance, None)
    world.a.driver.finish_revert_migration(None, instance, power_on=False)
    assert digest(world.a.disk(instance)) == before
    world.expect_one(instance, world.a, "shutoff")


def test_proven_in_full_is_confirmed(world: World) -> None:
    instance, _ = move(world)
    assert proof_of(world, instance) is Proof.FULL
    world.confirm(instance)
    world.expect_one(instance, world.b)


def test_a_sample_finds_a_copy_that_is_wrong_all_over(world: World) -> None:
    choose(world, verify="sampled")
    image = world.tmp / "dense"
    image.write_bytes(os.urandom(16 * MiB))
    instance = world.spawn(world.a, image)

    def spoil() -> None:
        (path,) = (world.b.path / "incoming").glob("vda.*")
        with path.open("r+b") as file:
            file.write(bytes(16 * MiB))

    trouble = At("verifying", 0, spoil)
    world.a.progress = trouble.progress
    ticket = world.migrate(instance)
    assert trouble.happened
    # All of the sample was wrong: all of it was sent again.
    assert world.a.progress.sent == 32 * MiB
    world.finish(instance, ticket)


class TestWithoutReceiver:
    """A peer where nobody answers: the copy is read back over the network."""

    @pytest.fixture
    def silent(self, world: World) -> World:
        world.b.overrides["receiver"] = False
        world.b.new_driver()
        choose(world, receiver_timeout=0.3)
        return world

    def test_it_is_proven_all_the_same(self, silent: World) -> None:
        instance, _ = move(silent)
        assert proof_of(silent, instance) is Proof.FULL
        silent.confirm(instance)
        silent.expect_one(instance, silent.b)

    @pytest.mark.parametrize("verify", ["full", "sampled"])
    def test_a_flipped_byte_is_sent_again(self, silent: World, verify: str) -> None:
        choose(silent, verify=verify)
        image = silent.tmp / "dense"
        image.write_bytes(os.urandom(16 * MiB))
        instance = silent.spawn(silent.a, image)
        before = digest(silent.a.disk(instance))
        trouble = At("verifying", 0, lambda: flip(silent))
        silent.a.progress = trouble.progress
        ticket = silent.migrate(instance)
        assert silent.a.progress.sent == 17 * MiB
        assert digest(arrived(silent)) == before
        silent.finish(instance, ticket)

    def test_the_guest_still_runs_while_it_is_found_out(self, silent: World) -> None:
        """The first request, which nobody answers, comes before the guest is off."""
        choose(silent, receiver_timeout=4.0)
        began: dict[str, float] = {}
        instance = silent.spawn(silent.a, silent.image())
        silent.a.progress = Progress(
            lambda report: began.setdefault(report.phase, time.monotonic())
        )
        silent.migrate(instance)
        assert began["stopping"] - began["preparing"] >= 4
        assert began["handing over"] - began["verifying vda"] < 4

    def test_no_request_stays(self, silent: World) -> None:
        move(silent)
        box = silent.b.path / "mailbox" / silent.b.host.name
        names = [path.name for path in box.iterdir()]
        assert all(".rec." in name for name in names)


def arrived(world: World) -> Path:
    (path,) = (world.b.path / "incoming").glob("vda.*")
    return path
