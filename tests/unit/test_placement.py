# SPDX-License-Identifier: Apache-2.0
"""Which backend a disk comes to, by what its flavor asks for and by room."""

import types
from typing import Any

import pytest

from virtmigrate import errors, placement, storagepool
from virtmigrate.formats import DiskFormat
from virtmigrate.units import GiB


def backend(
    name: str, room: int, *traits: str, fmt: DiskFormat = DiskFormat.RAW
) -> Any:
    return types.SimpleNamespace(
        name=name,
        room=room,
        settings=types.SimpleNamespace(traits=traits, reserved=GiB),
        capabilities=types.SimpleNamespace(formats=(fmt,)),
    )


def host(*backends: Any) -> Any:
    return types.SimpleNamespace(
        name="alpha",
        up=lambda: list(backends),
        room=lambda each: storagepool.Room(100 * GiB, each.room + GiB),
    )


@pytest.mark.parametrize(
    ("specs", "wanted"),
    [
        ({}, placement.ANY),
        ({"hw:cpu_policy": "dedicated"}, placement.ANY),
        ({"virtmigrate:backend": " "}, placement.ANY),
        ({"virtmigrate:backend": "fast"}, placement.Demand("fast")),
        (
            {"virtmigrate:traits": "media=ssd, tier=1,"},
            placement.Demand(None, frozenset({"media=ssd", "tier=1"})),
        ),
    ],
)
def test_what_a_flavor_asks_for(
    specs: dict[str, object], wanted: placement.Demand
) -> None:
    assert placement.demand(specs) == wanted


def test_the_first_that_fits_and_has_room() -> None:
    here = host(
        backend("small", GiB),
        backend("qcow", 9 * GiB, fmt=DiskFormat.QCOW2),
        backend("slow", 5 * GiB),
        backend("fast", 9 * GiB, "media=ssd"),
    )
    assert placement.choose(here, placement.ANY, 2 * GiB).name == "slow"
    ssd = placement.Demand(traits=frozenset({"media=ssd"}))
    assert placement.choose(here, ssd, 2 * GiB).name == "fast"
    assert placement.choose(here, placement.Demand("small"), 2 * GiB).name == "small"
    assert placement.choose(here, placement.ANY, 20 * GiB).name == "fast"


@pytest.mark.parametrize(
    "wanted",
    [
        placement.Demand("gone"),
        placement.Demand("slow", frozenset({"media=ssd"})),
        placement.Demand(traits=frozenset({"media=ssd", "tier=1"})),
    ],
)
def test_none_that_fits(wanted: placement.Demand) -> None:
    here = host(backend("slow", GiB), backend("fast", GiB, "media=ssd"))
    with pytest.raises(errors.NoBackend, match="host alpha has no backend") as caught:
        placement.choose(here, wanted, GiB)
    for word in (wanted.backend, *wanted.traits):
        assert word is None or word in str(caught.value)
