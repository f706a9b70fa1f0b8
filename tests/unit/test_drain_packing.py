# SPDX-License-Identifier: Apache-2.0
"""No host is overfilled, groups stay apart, and the same input gives the same plan."""

import collections
import random
import time

from hypothesis import given
from hypothesis import strategies as st

from virtmigrate.drain import packing, rolling
from virtmigrate.drain.values import Item, Packing, Share, Target
from virtmigrate.units import GiB

NAMES = ["h0", "h1", "h2", "h3"]
BACKENDS = ["fast", "slow"]
GROUPS = ["db", "web"]

shares = st.lists(
    st.builds(Share, backend=st.sampled_from(BACKENDS), size=st.integers(0, 50)),
    max_size=3,
).map(tuple)
rooms = st.fixed_dictionaries({name: st.integers(0, 120) for name in BACKENDS}).map(
    lambda found: tuple(Share(backend=name, size=n) for name, n in found.items())
)
few = st.lists(st.sampled_from(NAMES), max_size=2, unique=True).map(tuple)
groups = st.lists(st.sampled_from(GROUPS), max_size=2, unique=True).map(tuple)
orders = st.sampled_from(packing.Order)


@st.composite
def targets(draw: st.DrawFn) -> list[Target]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    return [
        Target(
            name=name,
            memory=draw(st.integers(0, 100)),
            rooms=draw(rooms),
            groups=draw(groups),
        )
        for name in names
    ]


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    return [
        Item(
            uuid=f"u{number}",
            memory=draw(st.integers(0, 60)),
            disks=draw(shares),
            elsewhere=draw(st.dictionaries(st.sampled_from(NAMES), shares, max_size=2)),
            apart=draw(groups),
            refused=draw(few),
            only=draw(few),
        )
        for number in range(draw(st.integers(0, 12)))
    ]


@given(items(), targets(), orders)
def test_nothing_is_overfilled_and_all_is_said(
    wanted: list[Item], hosts: list[Target], order: packing.Order
) -> None:
    found = packing.pack(wanted, hosts, order)
    demand_fits(wanted, hosts, found)
    placed = [each.uuid for each in found.placed]
    assert len(set(placed)) == len(placed)
    assert sorted([*placed, *found.left]) == sorted(item.uuid for item in wanted)
    assert all(found.left.values())


@given(items(), targets(), orders, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(
    wanted: list[Item], hosts: list[Target], order: packing.Order, chance: random.Random
) -> None:
    found = packing.pack(wanted, hosts, order)
    chance.shuffle(wanted)
    again = packing.pack(wanted, sorted(hosts, key=lambda h: chance.random()), order)
    assert again.placed == found.placed
    assert set(again.left) == set(found.left)


@given(items(), targets())
def test_what_is_left_fits_nowhere(wanted: list[Item], hosts: list[Target]) -> None:
    """Of one instance alone: it is left only where no host could take it."""
    for item in wanted:
        found = packing.pack([item], hosts)
        assert bool(found.left) == (not any(could(item, host) for host in hosts))


def could(item: Item, host: Target) -> bool:
    wanted: dict[str, int] = collections.Counter()
    for share in item.needs(host.name):
        wanted[share.backend] += share.size
    has = {share.backend: share.size for share in host.rooms}
    return (
        host.name not in item.refused
        and (not item.only or host.name in item.only)
        and item.memory <= host.memory
        and not set(item.apart) & set(host.groups)
        and all(size <= has.get(name, 0) for name, size in wanted.items())
    )


def demand_fits(wanted: list[Item], hosts: list[Target], found: Packing) -> None:
    by_uuid = {item.uuid: item for item in wanted}
    for host in hosts:
        here = [by_uuid[p.uuid] for p in found.placed if p.target == host.name]
        assert sum(item.memory for item in here) <= host.memory
        for room in host.rooms:
            taken = sum(
                share.size
                for item in here
                for share in item.needs(host.name)
                if share.backend == room.backend
            )
            assert taken <= room.size
        members = [*host.groups, *(group for item in here for group in item.apart)]
        assert all(members.count(group) == 1 for item in here for group in item.apart)
        assert all(host.name not in item.refused for item in here)
        assert all(not item.only or host.name in item.only for item in here)


def test_fill_keeps_room_for_what_is_large() -> None:
    hosts = [Target(name="a", memory=8), Target(name="b", memory=4)]
    small = [Item(uuid="1", memory=4), Item(uuid="2", memory=4)]
    found = packing.pack([*small, Item(uuid="3", memory=4)], hosts)
    assert [each.target for each in found.placed] == ["b", "a", "a"]


def test_spread_goes_to_who_has_most() -> None:
    hosts = [Target(name="a", memory=8), Target(name="b", memory=6)]
    small = [Item(uuid=str(n), memory=2) for n in range(3)]
    found = packing.pack(small, hosts, packing.Order.SPREAD)
    assert [each.target for each in found.placed] == ["a", "b", "a"]


def test_why_one_is_left() -> None:
    item = Item(
        uuid="1", memory=4, apart=("db",), disks=(Share(backend="fast", size=9),)
    )
    hosts = [
        Target(name="small", memory=3),
        Target(name="met", memory=9, groups=("db",)),
        Target(name="full", memory=9, rooms=(Share(backend="fast", size=8),)),
    ]
    reason = packing.pack([item], hosts).left["1"]
    assert "small: 1 bytes of memory too little" in reason
    assert "met: it has a member of group db" in reason
    assert "full: 1 bytes too little room in fast" in reason


def fleet(hosts: int, each: int) -> dict[str, list[Item]]:
    """Hosts of one size whose instances fill three quarters of it."""
    chance = random.Random(20)
    return {
        f"host-{number:03}": [
            Item(
                uuid=f"{number:03}-{one:02}",
                memory=chance.choice((2, 4, 8)) * GiB,
                disks=(Share(backend="local", size=chance.choice((20, 40)) * GiB),),
                apart=(f"group-{(number * 7 + one) % 2000}",),
            )
            for one in range(each)
        ]
        for number in range(hosts)
    }


ROOM = 256 * GiB
DISK = (Share(backend="local", size=4096 * GiB),)


def test_twenty_thousand_instances_on_five_hundred_hosts() -> None:
    wanted = [item for items in fleet(500, 40).values() for item in items]
    hosts = [
        Target(name=f"new-{number:03}", memory=ROOM, rooms=DISK)
        for number in range(500)
    ]
    for order in packing.Order:
        began = time.process_time()
        found = packing.pack(wanted, hosts, order)
        assert time.process_time() - began < 10
        assert not found.left
        demand_fits(wanted, hosts, found)


def test_a_round_of_five_hundred_hosts_with_one_spare() -> None:
    instances = fleet(500, 40)
    hosts = {name: Target(name=name, memory=ROOM, rooms=DISK) for name in instances}
    spare = Target(name="spare", memory=ROOM, rooms=DISK)
    began = time.process_time()
    stages = rolling.plan(instances, hosts, spare)
    assert time.process_time() - began < 10
    moved = [placed.uuid for stage in stages for placed in stage.packing.placed]
    assert len(set(moved)) == len(moved)
    assert sum(len(stage.packing.left) for stage in stages) == 0
    order = ["spare", *instances]
    for stage in stages:
        for placed in stage.packing.placed:
            assert order.index(placed.target) < order.index(stage.host)
