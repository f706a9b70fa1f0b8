# SPDX-License-Identifier: Apache-2.0
"""Images of disks that a backend freezes itself, images in a cache, and the command."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.ceph import Ceph
from tests.functional import guestdisk, places, test_cli
from tests.functional.conftest import World
from tests.functional.sides import Kinds, Side
from tests.functional.test_live_snapshot import (
    Gate,
    expect_clean,
    raw_of,
    save,
    to_file,
)
from tests.functional.test_live_snapshot import gate as gate
from tests.functional.test_snapshot_rbd import destroyed
from virtmigrate import errors
from virtmigrate.cli import main
from virtmigrate.livesnapshot import Kind, Target, Wanted

# RBD


@pytest.fixture(scope="module")
def host(box: sandbox.Sandbox) -> Iterator[sandbox.Host]:
    yield box.add_host("image-rbd")
    box.remove_host("image-rbd")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_disk_in_a_cluster(
    host: sandbox.Host,
    tmp_path: Path,
    cluster: Callable[[], Ceph],
    gate: Gate,
    fmt: str,
) -> None:
    """Frozen by a snapshot of the cluster, which is read while the guest writes."""
    with places.PLACES["rbd"](host, f"live{fmt}", tmp_path, cluster) as values:
        side = Side(host, tmp_path / "side", values, "therbd")
        try:
            guest = Kinds(side, side, tmp_path).spawn()
            guestdisk.write(side, guest, 7)
            expected, path = side.content(guest), tmp_path / "saved"
            saves = side.driver.saves
            gate.run(lambda: saves.save(guest.uuid, to_file(path, fmt)))
            guestdisk.write(side, guest, 9)
            assert gate.end() is None
            assert raw_of(path, fmt, tmp_path) == expected
            assert side.content(guest)[guestdisk.OFFSET] == 9
            assert side.driver.snapshots.all(guest.uuid) == ((), None)
            assert side.state_of(guest) == "running"
            assert side.driver.settle() == []
            destroyed(side, guest)
        finally:
            side.close()


# The image cache


def cached(name: str, fmt: str = "raw") -> Wanted:
    return Wanted(target=Target(kind=Kind.CACHE, where="local", name=name), format=fmt)


@pytest.fixture
def instance(world: World) -> Any:
    made = world.spawn(world.a)
    guestdisk.write(world.a, made, 7)
    return made


def test_a_cached_image_is_what_others_are_made_of(world: World, instance: Any) -> None:
    (saved,) = save(world.a, instance, cached("golden"))
    driver = world.a.driver
    name = saved.place.removeprefix("cache:local/")
    cache = driver.images.of(driver.node.backends["local"])
    (found,) = cache.shelf.all()
    assert found.origin.pinned and found.origin.checksum == saved.digest
    assert cache.prune() == []
    other = world.instance()
    driver.spawn(None, other, {"saved": name})
    assert guestdisk.byte(world, other) == 7
    expect_clean(world.a, instance)
    driver.destroy(None, other, None)
    cache.pin(found, pinned=False)
    (found,) = cache.shelf.all()
    cache.remove(found)
    with pytest.raises(errors.ImageUnavailable, match="not any more"):
        driver.spawn(None, world.instance(), {"saved": name})


def test_a_cache_takes_no_other_format(world: World, instance: Any) -> None:
    with pytest.raises(errors.ImageNotSaved, match="takes raw ones"):
        save(world.a, instance, cached("golden", "qcow2"))
    expect_clean(world.a, instance)


def test_nothing_stays_in_a_cache(
    world: World, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When what comes after it fails: as of another disk."""
    from virtmigrate.livesnapshot import cached as caches

    def fail(*_: object) -> str:
        raise errors.ImageNotTaken(image="?", reason="on purpose")

    before = world.a.files()
    monkeypatch.setattr(caches.CacheSink, "publish", fail)
    with pytest.raises(errors.ImageNotSaved, match="on purpose"):
        save(world.a, instance, cached("golden"))
    expect_clean(world.a, instance)
    names = {name.rpartition(".rec.")[0] or name for name in world.a.files()}
    kept = {name.rpartition(".rec.")[0] or name for name in before}
    assert {each for each in names - kept if "image-" not in each} == set()
    assert world.a.driver.images.of(world.a.driver.node.files).shelf.all() == []


# The command


def test_command(
    world: World,
    instance: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "virtmigrate.conf"
    config.write_text(test_cli.configuration(world))
    path = tmp_path / "saved.qcow2"

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        argv = ["--config-file", str(config), "image", "save", instance.name, *words]
        found = main.main(argv)
        said = capsys.readouterr()
        assert found == code, said.out + said.err
        return said.out, said.err

    out, err = run("--to", f"file:{path}", "--bandwidth", "50", "-f", "json")
    (row,) = json.loads(out)
    assert row["disk"] == "vda" and row["image"] == f"file:{path}"
    assert "saving vda" in err
    assert raw_of(path, "qcow2", tmp_path)[guestdisk.OFFSET] == 7
    _, err = run("--to", f"file:{path}", code=1)
    assert "such a file already" in err
    _, err = run("--to", "elsewhere:x", code=1)
    assert "file:PATH, glance:NAME or cache:BACKEND" in err
    _, err = run("--to", "cache:nowhere", code=1)
    assert "has no backend nowhere" in err
    _, err = run("--to", "glance:x", code=1)
    assert "image_service_cloud" in err
    out, _ = run("--to", "cache:local", "--keep-layer", "-f", "json")
    assert json.loads(out)[0]["image"].startswith(f"cache:local/{instance.name}.")
    ((kept,), _) = world.a.driver.snapshots.all(instance.uuid)
    world.a.driver.snapshots.delete(instance.uuid, kept.name)
    expect_clean(world.a, instance)
