# SPDX-License-Identifier: Apache-2.0
"""Copies by the engine, for tests that judge them by the files themselves.

Run as a program, it copies a file into a volume that is there: `copies.py PLAN`,
a JSON file. It goes on with what a process before it, that was killed, left.
"""

import dataclasses
import filecmp
import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from virtmigrate import (
    account,
    errors,
    host,
    known,
    limit,
    manifest,
    reading,
    storagepool,
    stream,
    writing,
)
from virtmigrate.known import Known
from virtmigrate.manifest import UNKNOWN, Manifest
from virtmigrate.progress import Progress, Report
from virtmigrate.units import KiB, MiB

STRETCH = 2 * MiB
TUNING = stream.Tuning(workers=2, stretch=STRETCH)
SECONDS = 30.0
"""Within which any copy here fails or ends."""

Runs = list[tuple[int, int, str]]
"""The hole before, the length, and what: noise, zeros or text."""


class Copy:
    """A source file, and its copy as a fresh volume."""

    def __init__(
        self, pool: storagepool.Pool, source: Path, tuning: stream.Tuning = TUNING
    ) -> None:
        self.pool = pool
        self.source = source
        self.size = source.stat().st_size
        self.tuning = tuning
        self.name = f"vol-{random.getrandbits(64):016x}"
        self.target = Path(pool.volume_path(self.name))
        self.known = Known(Manifest(self.size))
        self.account = account.Account()
        pool.create_raw(self.name, self.size)

    def send(
        self,
        progress: Progress | None = None,
        source: reading.Source | None = None,
        pool: storagepool.Pool | None = None,
        limits: limit.Limits | None = None,
        retry: float = 0.0,
    ) -> Manifest:
        """Copy, and learn what arrived; call it again to go on."""
        source = source or reading.FileSource(self.source, self.size)
        target = writing.VolumeTarget(pool or self.pool, self.name, self.size)
        with stream.Mover(
            dataclasses.replace(self.tuning, retry=retry),
            progress=progress,
            counted=self.account,
            limits=limits,
        ) as mover:
            return mover.copy(source, target, self.known)

    def reader(self) -> reading.VolumeSource:
        return reading.VolumeSource(self.pool, self.name, self.size)

    def survey(
        self, progress: Progress | None = None, counted: account.Account | None = None
    ) -> Manifest:
        with stream.Mover(self.tuning, progress=progress, counted=counted) as mover:
            return mover.survey(self.reader())

    def expected(self) -> Manifest:
        with stream.Mover() as mover:
            return mover.survey(reading.FileSource(self.source, self.size))

    def is_equal(self) -> bool:
        """Compare the files, byte for byte, by nothing of ours."""
        return filecmp.cmp(self.source, self.target, shallow=False)

    def expect_known_is_true(self) -> None:
        """What is said to be at the target is there."""
        expect_true(self.known, self.target)

    def hurt(
        self,
        hurt: Callable[[], None],
        work: Callable[[Progress], object] | None = None,
        *,
        at: int = 50,
        retry: float = 0.0,
    ) -> BaseException | None:
        """Copy, do something to it at so many percent, and return its error."""
        once = iter([hurt])
        caught: list[BaseException | None] = []

        def listen(report: Report) -> None:
            if report.done * 100 >= self.size * at:
                for each in once:
                    each()

        def run() -> None:
            progress = Progress(listen, interval=0)
            try:
                if work is None:
                    self.send(progress, retry=retry)
                else:
                    work(progress)
            except BaseException as e:
                caught.append(e)
            else:
                caught.append(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(SECONDS)
        assert caught, "the copy neither failed nor ended"
        return caught[0]

    def remove(self) -> None:
        self.pool.delete(self.name)


def expect_true(found: Known | Manifest, path: Path) -> None:
    """What is said of a file's blocks is so."""
    span = Manifest(found.size).span
    with path.open("rb") as file:
        for index in range(Manifest(found.size).count):
            if found[index] != UNKNOWN:
                start, end = span(index)
                file.seek(start)
                truth = manifest.digest_of(file.read(end - start))
                assert found[index] == truth, f"block {index}"


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def write_runs(path: Path, runs: Runs, tail: int = 0) -> None:
    position = 0
    with path.open("wb") as file:
        for gap, length, kind in runs:
            position += gap
            file.seek(position)
            if kind == "noise":
                file.write(noise(length, seed=length))
            else:
                file.write((b"\0" if kind == "zeros" else b"x") * length)
            position += length
        file.truncate(position + tail)


def pool_of(opened: host.Host, directory: Path) -> storagepool.Pool:
    pool = storagepool.Pool(opened, directory.name)
    pool.ensure_directory(str(directory))
    return pool


# The program


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    counted = account.Account()
    size = plan["size"]
    # Up to here: what Python and libvirt take without any copy.
    with host.Host(plan["uri"]) as opened:
        pool = storagepool.Pool(opened, plan["pool"])
        pool.physical(plan["volume"])
        before = memory("VmRSS")
        copy(plan, size, pool, counted)
    figures = counted.figures()
    print(
        json.dumps(
            {
                "grown": memory("VmHWM") - before,
                "sent": figures.sent,
                "resent": figures.resent,
                "total": figures.total,
            }
        )
    )


def copy(
    plan: dict[str, Any], size: int, pool: storagepool.Pool, counted: account.Account
) -> None:
    kept = Path(plan["known"]) if plan.get("known") else None
    initial = known.load(kept) if kept else None
    mine = Known(initial or Manifest(size), kept)
    target = writing.VolumeTarget(pool, plan["volume"], size)
    tuning = stream.Tuning(**plan["tuning"])
    with stream.Mover(tuning, counted=counted) as mover:
        sent = mover.copy(reading.FileSource(Path(plan["source"]), size), target, mine)
        if plan.get("survey"):
            found = mover.survey(reading.VolumeSource(pool, plan["volume"], size))
            if found.root() != sent.root():
                raise errors.VerificationFailed(
                    volume=plan["volume"],
                    host=pool.host.name,
                    found=found.root(),
                    expected=sent.root(),
                )


def memory(kind: str) -> int:
    """Return the bytes that this process takes, or took at most.

    getrusage() would count what its parent took before it became this program.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * KiB
    raise KeyError(kind)


if __name__ == "__main__":
    main()
