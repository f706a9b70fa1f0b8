# SPDX-License-Identifier: Apache-2.0
"""Reading and writing RBD images for the transfer engine, by librbd."""

import bisect
import contextlib
import threading
import types
from typing import TYPE_CHECKING, Self

from virtmigrate import errors, writing
from virtmigrate.backends.cluster import Cluster
from virtmigrate.backends.objects import extents

if TYPE_CHECKING:
    import rbd


class ImageSource:
    """An image, read by several threads; what was never written is a hole.

    Arguments:
        size: bytes to read.
        is_live: a guest may write to it meanwhile.
        snapshot: read what this one keeps of it; "" is what it is now.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        size: int,
        *,
        is_live: bool = False,
        snapshot: str = "",
    ) -> None:
        self.name = name
        self.size = size
        self._cluster = cluster
        self._is_live = is_live
        self._snapshot = snapshot
        self._opened = contextlib.ExitStack()
        self._image: rbd.Image | None = None
        self._extents: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            image = stack.enter_context(
                self._cluster.image(
                    self.name, f"reading {self.name}", snapshot=self._snapshot
                )
            )
            size = int(image.size())
            if size != self.size and not self._is_live:
                raise self._changed(f"it has {size} bytes instead of {self.size}")
            self._image, self._extents = image, extents(image)
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._image = None
        self._opened.close()

    def read(self, start: int, end: int) -> bytes | None:
        assert self._image is not None
        if self.skip(start) >= end:
            return None
        with self._cluster.translated(f"reading {self.name}", self.name):
            data = bytes(self._image.read(start, end - start))
        if len(data) < end - start and not self._is_live:
            raise self._changed(f"it ends at {start + len(data)}")
        return data.ljust(end - start, b"\0")

    def skip(self, start: int) -> int:
        index = bisect.bisect_right(self._extents, start, key=lambda each: each[1])
        if index == len(self._extents):
            return self.size
        return min(max(start, self._extents[index][0]), self.size)

    def demand_unchanged(self) -> None:
        if self._is_live:
            return
        assert self._image is not None
        with self._cluster.translated(f"looking at {self.name}", self.name):
            size = int(self._image.size())
        if size != self.size:
            raise self._changed(f"it has {size} bytes instead of {self.size}")

    # Private

    def _changed(self, reason: str) -> errors.SourceChanged:
        return errors.SourceChanged(volume=self.name, reason=reason)


class ImageTarget:
    """An image that is being filled. Safe to share between threads.

    All writers share one handle: librbd gives the right to write to one at a time.
    """

    def __init__(self, cluster: Cluster, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.host = cluster.host
        self.cluster = cluster
        self._lock = threading.Lock()
        self._users = 0
        self._opened = contextlib.ExitStack()
        self._image: rbd.Image | None = None

    def writer(self, until: int, acknowledge: writing.Acknowledge) -> "ImageWriter":
        """Return a writer for one thread."""
        return ImageWriter(self, acknowledge)

    def open(self) -> "rbd.Image":
        """Return the image, until close()."""
        with self._lock:
            if self._image is None:
                opening = self.cluster.image(
                    self.name, f"writing {self.name}", read_only=False
                )
                self._image = self._opened.enter_context(opening)
            self._users += 1
            return self._image

    def close(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._image = None
                self._opened.close()


class ImageWriter:
    """Writes to an image. Belongs to one thread."""

    def __init__(self, target: ImageTarget, acknowledge: writing.Acknowledge) -> None:
        self._target = target
        self._acknowledge = acknowledge
        self._image: rbd.Image | None = None

    def __enter__(self) -> Self:
        self._image = self._target.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._image = None
            self._target.close()

    def write(self, offset: int, data: bytes) -> None:
        assert self._image is not None
        with self._translated():
            self._image.write(data, offset)

    def finish(self) -> None:
        assert self._image is not None
        with self._translated():
            self._image.flush()
        self._acknowledge()

    # Private

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        name = self._target.name
        return self._target.cluster.translated(f"writing {name}", name)
