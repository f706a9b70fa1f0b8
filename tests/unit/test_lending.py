# SPDX-License-Identifier: Apache-2.0
"""What others stand on: found through any number of layers, handed to an heir."""

import contextlib
import types
from collections.abc import Iterable, Iterator
from typing import Any, cast

import msgspec

from virtmigrate import lending, model
from virtmigrate.backends import base
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role, VolumeState


def volume(
    name: str, owner: str, backing: str | None = None, parent: str | None = None
) -> model.Volume:
    frozen = name.startswith("f")
    return model.Volume(
        name=name,
        pool="disks",
        path=f"/disks/{name}",
        format=DiskFormat.QCOW2,
        role=Role.IMAGE if not owner else Role.ROOT,
        size=1,
        state=VolumeState.FROZEN if frozen else VolumeState.USABLE,
        owner=owner,
        operation="0" * 16,
        origin="here",
        backing=backing,
        parent=parent,
    )


class Fake:
    """A backend's records, and its lock."""

    def __init__(self, *volumes: model.Volume) -> None:
        self.found = {each.name: each for each in volumes}
        self.held: list[str] = []
        self.strict = 0
        self.catalog = types.SimpleNamespace(all=self._all)
        self.volumes = types.SimpleNamespace(read=self._read)
        self.locks = types.SimpleNamespace(held=self._held)

    def update(self, changed: model.Volume) -> model.Volume:
        assert self.held
        self.found[changed.name] = changed
        return changed

    def owners(self) -> dict[str, str]:
        return {each.name: each.owner for each in self.found.values()}

    def _all(self, *, strict: bool = False) -> Iterator[Any]:
        self.strict += strict
        return iter(map(self._stored, self.found.values()))

    def _read(self, name: str) -> Any:
        return self._stored(self.found[name])

    @staticmethod
    def _stored(found: model.Volume) -> Any:
        return types.SimpleNamespace(name=found.name, body=found)

    @contextlib.contextmanager
    def _held(self, names: Iterable[str], *, timeout: float) -> Iterator[None]:
        self.held += names
        yield
        self.held.clear()


def lent(fake: Fake, uuid: str) -> dict[str, str]:
    return lending.lent(cast(base.Backend, fake), uuid)


def settle(fake: Fake, uuid: str) -> set[str]:
    with lending.settled(cast(base.Backend, fake), uuid, 1.0) as kept:
        return kept


def test_through_layers() -> None:
    """All below is lent, an image that is nobody's is not, what stands above is not."""
    fake = Fake(
        volume("image", ""),
        volume("f1", "source", "image"),
        volume("f2", "source", "f1"),
        volume("top", "source", "f2"),
        volume("clone", "other", "f2"),
    )
    assert lent(fake, "source") == {"f1": "other", "f2": "other"}
    assert lent(fake, "other") == {}


def test_through_others() -> None:
    """A clone of a clone stands on the first one's source."""
    fake = Fake(
        volume("f1", "source"),
        volume("top", "source", "f1"),
        volume("f2", "first", "f1"),
        volume("first", "first", "f2"),
        volume("second", "second", "f2"),
    )
    assert set(lent(fake, "source")) == {"f1"}
    assert lent(fake, "first") == {"f2": "second"}


def test_retired_copies_inherit_nothing() -> None:
    """They are of an instance that has left: nobody here would ever remove it."""
    gone = volume("a", "gone", "f1")
    gone = msgspec.structs.replace(gone, state=VolumeState.RETIRED)
    fake = Fake(volume("f1", "source"), volume("top", "source", "f1"), gone)
    assert lent(fake, "source") == {} and settle(fake, "source") == set()
    fake.found["b"] = volume("b", "other", "f1")
    assert settle(fake, "source") == {"f1"}
    assert fake.owners()["f1"] == "other"


def test_shared_blocks() -> None:
    fake = Fake(volume("f1", "source"), volume("c", "other", parent="f1"))
    assert lent(fake, "source") == {"f1": "other"}


def test_without_frozen_volumes_nothing_is_read() -> None:
    """A broken record of somebody else keeps nobody from going."""
    fake = Fake(volume("top", "source"), volume("c", "other", "elsewhere"))
    assert lent(fake, "source") == {}
    assert fake.strict == 0
    assert settle(fake, "source") == set()


def test_handed_on() -> None:
    fake = Fake(
        volume("f1", "source"),
        volume("top", "source", "f1"),
        volume("a", "first", "f1"),
        volume("b", "second", "f1"),
    )
    assert settle(fake, "source") == {"f1"}
    assert fake.owners()["f1"] == "first"
    assert fake.owners()["top"] == "source"
    # Again, as after a kill: it is not its any more.
    del fake.found["top"]
    assert settle(fake, "source") == set()
    del fake.found["a"]
    assert settle(fake, "first") == {"f1"}
    assert fake.owners()["f1"] == "second"
    del fake.found["b"]
    assert settle(fake, "second") == set()


def test_a_circle_ends() -> None:
    fake = Fake(
        volume("f1", "source", "f2"),
        volume("f2", "source", "f1"),
        volume("c", "o", "f1"),
    )
    assert set(lent(fake, "source")) == {"f1", "f2"}
