# SPDX-License-Identifier: Apache-2.0
"""Measures a disk from a warm image cache, beside the tool that one would use by hand.

    make bench
    python -m sandbox exec --own bench -- python -m benchmarks.cache

From the call to the published record, against `qemu-img create -b` in a directory and
`rbd clone` in a cluster, in turns, so that noise hits both. Then what a cache of many
images takes: to find one, to tell which are in use, and to look for what may go. The
records of these are written beside the others, without volumes: nothing reads those.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import errors
from sandbox import Sandbox, SandboxError
from tests.functional import places
from tests.functional.sides import Side
from virtmigrate import filling, imagecache, model, record, slots, sources, stream
from virtmigrate.formats import DiskFormat
from virtmigrate.model import Role, VolumeState
from virtmigrate.units import MiB

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 15
IMAGE = 64 * MiB
MANY = 10_000
GRACE = 10
"""Seconds of record_grace, as it is by default."""

RATIO, PLUS = 1.3, 0.05
"""A clone takes at most so many times what the tool takes, and so many seconds."""
LOOK, PASS = 0.005, 5.0
"""Seconds of a look-up, and of a look for what may go, in a cache of many."""


@dataclass(frozen=True)
class Kind:
    """One kind of backend, with what one would use by hand there."""

    name: str
    by_hand: Callable[[Side, model.Volume, str], list[str]]


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--many", type=int, default=MANY)
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    try:
        box = Sandbox.attach()
        for kind in KINDS:
            with side_of(box, kind.name) as side:
                found[kind.name] = clones(side, kind, arguments.rounds)
        with side_of(box, "dir-xfs") as side:
            found["many"] = many(side, arguments.many)
    except (errors.BenchmarkError, SandboxError) as e:
        print(f"benchmark: {e}", file=sys.stderr)
        return 1
    print(*table(found), sep="\n")
    if arguments.rounds == ROUNDS and arguments.many == MANY:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nWritten to {RESULTS}")
    return 0


@contextlib.contextmanager
def side_of(box: Sandbox, kind: str) -> Iterator[Side]:
    """Yield a host with a backend of a kind."""
    host = box.add_host("cache")
    try:
        with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
            tmp = Path(made)
            place = places.PLACES[kind](host, "bench", tmp / "x", box.add_ceph)
            side = Side(host, tmp / "side", stack.enter_context(place), "bench", GRACE)
            stack.callback(side.close)
            yield side
    finally:
        box.remove_host("cache")


def clones(side: Side, kind: Kind, rounds: int) -> dict[str, float]:
    """Return the medians of ours and of the tool, in seconds."""
    source, cache = an_image(side), cache_of(side)
    image = cache.obtain(source)
    ours, theirs = [], []
    for number in range(rounds):
        argv = kind.by_hand(side, image, f"by-hand-{number}")
        for step in (0, 1) if number % 2 else (1, 0):
            began = time.monotonic()
            if step:
                clone(side, cache, source)
                ours.append(time.monotonic() - began)
            else:
                subprocess.run(argv, check=True, capture_output=True, timeout=60)
                theirs.append(time.monotonic() - began)
    return {
        "ours": statistics.median(ours),
        "by hand": statistics.median(theirs),
    }


def clone(side: Side, cache: imagecache.ImageCache, source: sources.Source) -> None:
    """Make a disk, as a new instance gets it."""
    backend = side.driver.node.backend("bench")
    with stream.Mover() as mover:
        made = cache.clone(source, lambda image: a_disk(side, image), mover)
    filling.Filler(side.driver.node, backend).settle(made)


def many(side: Side, count: int) -> dict[str, float]:
    """Return what a cache of many images takes, in seconds."""
    source, cache = an_image(side), cache_of(side)
    image = cache.obtain(source)
    pool = side.driver.node.backend("bench").volumes.pool
    for number in range(count):
        for name, body in records(image, number):
            path = Path(pool.path) / f"{name}.rec.1"
            path.write_bytes(record.encode(body, name, 1))
    pool.refresh()
    return {
        "first look at all": taken(cache.shelf.all),
        "what may go": taken(cache.prune),
        "look-up": min(taken(lambda: cache.obtain(source)) for _ in range(5)),
        "not in use, changed": taken(lambda: in_use(cache, image)),
        "not in use": quietly(side, lambda: in_use(cache, image)),
        "first disk": taken(lambda: clone(side, cache, source)),
        "in use": min(taken(lambda: in_use(cache, image)) for _ in range(5)),
        "a disk": min(taken(lambda: clone(side, cache, source)) for _ in range(3)),
    }


def in_use(cache: imagecache.ImageCache, image: model.Volume) -> bool:
    return cache.shelf.is_used(image.name)


def quietly(side: Side, call: Callable[[], object]) -> float:
    """Return the seconds of a call when no record changed for a while."""
    volumes = side.driver.node.backend("bench").catalog
    deadline = time.monotonic() + 10 * GRACE
    while volumes.stamp() is None:
        if time.monotonic() > deadline:
            raise errors.BenchmarkError("the records do not come to rest")
        time.sleep(1)
    return min(taken(call) for _ in range(5))


def records(image: model.Volume, number: int) -> Iterator[tuple[str, Any]]:
    """Yield the names and records of one more image."""
    key, operation = f"{number:032x}", f"{number:016x}"
    name = f"image-{number:08x}.{operation}"
    assert image.image is not None
    origin = msgspec.structs.replace(image.image, key=key)
    body = msgspec.structs.replace(image, name=name, operation=operation, image=origin)
    yield name, body
    slot = model.Slot(key=key, source="-", operation=operation, host="-", volume=name)
    yield slots.PREFIX + key, slot


def taken(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def an_image(side: Side) -> sources.Source:
    path = side.config.with_name("image")
    with path.open("wb") as file:
        file.write(bytes(range(256)) * (MiB // 256))
        file.truncate(IMAGE)
    return sources.LocalFile(path, "raw")


def cache_of(side: Side) -> imagecache.ImageCache:
    return side.driver.images.of(side.driver.node.backend("bench"))


def a_disk(side: Side, image: model.Volume) -> model.Volume:
    pool, operation = side.driver.node.backend("bench").incoming, uuid.uuid4().hex[:16]
    return model.Volume(
        name=f"vda.{operation}",
        pool=pool.name,
        path=pool.volume_path(f"vda.{operation}"),
        format=DiskFormat.RAW,
        role=Role.ROOT,
        size=image.size,
        state=VolumeState.INCOMPLETE,
        owner=str(uuid.uuid4()),
        operation=operation,
        origin="bench",
    )


def overlay(side: Side, image: model.Volume, name: str) -> list[str]:
    """qemu-img, over the image."""
    path = str(Path(image.path).with_name(name))
    return ["qemu-img", "create", "-f", "qcow2", "-b", image.path, "-F", "raw", path]


def copy_on_write(side: Side, image: model.Volume, name: str) -> list[str]:
    """rbd, of the snapshot that clones are made of."""
    options = side.driver.node.backend("bench").settings.options
    pool = options["rbd_pool"]
    argv = ["rbd", "-c", options["rbd_ceph_conf"], "--id", options["rbd_user"]]
    parent = f"{pool}/{image.name}@virtmigrate-clones"
    return [*argv, "clone", parent, f"{pool}/{name}"]


KINDS = (Kind("dir-xfs", overlay), Kind("rbd", copy_on_write))


def table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield the figures, and whether they are what is to be reached."""
    for name, figures in found.items():
        if "ours" in figures:
            ours, theirs = figures["ours"], figures["by hand"]
            limit = RATIO * theirs + PLUS
            yield f"{name:10} ours {ours * 1000:.0f} ms, by hand {theirs * 1000:.0f} ms"
            yield verdict(f"at most {limit * 1000:.0f} ms", ours <= limit)
        else:
            for what, seconds in figures.items():
                yield f"{name:10} {what:20} {seconds * 1000:8.1f} ms"
            for what in ("look-up", "not in use", "in use"):
                yield verdict(f"{what} in {LOOK * 1000:.0f} ms", figures[what] <= LOOK)
            yield verdict(f"what may go in {PASS:g} s", figures["what may go"] <= PASS)


def verdict(what: str, is_reached: bool) -> str:
    return f"{'':10} {'reached' if is_reached else 'NOT reached'}: {what}"


if __name__ == "__main__":
    sys.exit(main())
