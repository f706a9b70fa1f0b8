# SPDX-License-Identifier: Apache-2.0
"""A backend whose cluster does not answer: it is named, and the others go on."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import places
from tests.functional.sides import Kinds, Side
from virtmigrate import errors, mailbox

TIMEOUT = 5.0
"""As places.py sets it."""


@pytest.fixture
def frozen(cluster: Callable[[], Ceph]) -> Iterator[Ceph]:
    """The cluster, thawed in the end."""
    ceph = cluster()
    try:
        yield ceph
    finally:
        ceph.thaw()


@pytest.fixture
def side(
    box: sandbox.Sandbox, tmp_path: Path, cluster: Callable[[], Ceph]
) -> Iterator[Side]:
    host = box.add_host("down-alpha")
    with places.PLACES["rbd"](host, "down", tmp_path, cluster) as values:
        made = Side(host, tmp_path / "a", values, "ceph")
        try:
            yield made
        finally:
            made.close()
    box.remove_host("down-alpha")


@pytest.mark.timeout(240)
def test_a_cluster_that_does_not_answer(
    side: Side, frozen: Ceph, tmp_path: Path
) -> None:
    kinds = Kinds(side, side, tmp_path)
    before = kinds.spawn()
    frozen.freeze()
    began = time.monotonic()
    with pytest.raises(errors.StorageError, match="down") as caught:
        kinds.spawn()
    assert time.monotonic() - began < 12 * TIMEOUT
    assert isinstance(caught.value, errors.StorageDown | errors.NoBackend)
    found = side.driver.settle()
    assert len(found) == 1 and "ceph" in found[0] and "did not answer" in found[0]

    # The other backend works, and the host says what it has.
    other = kinds.spawn(flavor=kinds.flavor_of("files"))
    assert side.state_of(other) == "running"
    assert side.driver.get_available_resource(side.host.name)["local_gb"] > 0
    card = side.driver.node.mailbox.cards.read(mailbox.CARD).body
    assert [each.name for each in card.backends] == ["files"]
    side.driver.destroy(None, other, None)
    assert side.state_of(other) is None

    # What is in the cluster is not forgotten because nobody can look.
    with pytest.raises(errors.StorageError):
        side.driver.destroy(None, before, None)
    assert side.driver.node.instances.find(before.uuid) is not None

    # So it does for one that starts meanwhile.
    side.restart()
    assert list(side.driver.node.down) == ["ceph"]

    frozen.thaw()
    eventually(lambda: settle(side))
    card = side.driver.node.mailbox.cards.read(mailbox.CARD).body
    assert [each.name for each in card.backends] == ["files", "ceph"]
    eventually(lambda: side.driver.destroy(None, before, None))
    assert not [name for name in side.volumes() if "vda" in name]


def settle(side: Side) -> None:
    """See that nothing is left to do."""
    left = side.driver.settle()
    if left:
        raise errors.StorageError(host=side.host.name, pool="?", reason=str(left))


def eventually(call: Callable[[], object]) -> None:
    """Call again while the cluster waits for a client that it lost: up to 30 s."""
    deadline = time.monotonic() + 75
    while True:
        try:
            call()
            return
        except errors.StorageError:
            if time.monotonic() > deadline:
                raise
