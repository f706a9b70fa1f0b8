# SPDX-License-Identifier: Apache-2.0
"""What the peer has already: a receiver, images of its cache, disks that were retired.

What lies there is known by its record and its manifest, as after a real move; both
are written here by the package itself, the bytes are a file that is moved in.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import ours
from benchmarks.disks import Disk
from benchmarks.place import Place, service
from virtmigrate import conf, model, node, reading, stream
from virtmigrate.formats import DiskFormat
from virtmigrate.manifest import Manifest

BEFORE = "00000000000000aa"
"""The operation by which it came."""


class Stock:
    """The peer's backend, under its storage. Files of it are seen here, too."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._root = place.beta.storage / "vm"
        self._config = place.directory / "virtmigrate.conf"
        self._config.write_text(
            f"[virtmigrate]\nuri = {place.beta.local_uri}\n"
            f"address = {place.beta.name}\nstate_path = {place.directory}/state\n"
            f"[local]\npath = {self._root}\n"
        )

    @contextlib.contextmanager
    def receiver(self) -> Iterator[None]:
        """Run a receiver on the peer, with its pools made."""
        log = self._place.directory / "receiver.log"
        program = Path(sys.executable).with_name("virtmigrate")
        argv = [str(program), "--config-file", str(self._config), "-v", "receiver"]

        def serves() -> bool:
            return "receiver serves" in log.read_text()

        with service(self._place.beta, argv, log, serves):
            yield

    def incoming(self, disk: Disk, operation: str) -> Path:
        """Return where a disk's copy arrives."""
        return self._root / "incoming" / ours.incoming(disk.name, operation)

    @contextlib.contextmanager
    def image(self, file: Path) -> Iterator[model.Digest]:
        """Have a file in the image cache for a while."""
        with self._kept(file, model.Role.IMAGE, model.VolumeState.USABLE) as found:
            yield found.digest()

    @contextlib.contextmanager
    def retired(self, file: Path) -> Iterator[None]:
        """Have a file as what an earlier move left; it may be taken from there."""
        with self._kept(file, model.Role.ROOT, model.VolumeState.RETIRED):
            yield

    # Private

    @contextlib.contextmanager
    def _kept(
        self, file: Path, role: model.Role, state: model.VolumeState
    ) -> Iterator[Manifest]:
        name = ours.incoming(file.name, BEFORE)
        path = self._root / "disks" / name
        with contextlib.closing(node.Node(conf.load(self._config))) as here:
            here.ensure()
            backend = here.backends["local"]
            found = _manifest(file)
            body = model.Volume(
                name=name,
                pool=backend.disks.name,
                path=str(path),
                format=DiskFormat.RAW,
                role=role,
                size=found.size,
                state=state,
                owner=ours.INSTANCE,
                operation=BEFORE,
                origin=self._place.alpha.name,
                digest=found.digest(),
            )
            backend.allocate(body)
            backend.keep_manifest(name, found)
            file.rename(path)
            try:
                yield found
            finally:
                if path.exists():
                    path.rename(file)
                backend.remove(name)


def _manifest(file: Path) -> Manifest:
    with stream.Mover() as mover:
        return mover.survey(reading.FileSource(file, file.stat().st_size))
