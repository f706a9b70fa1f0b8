# SPDX-License-Identifier: Apache-2.0
"""Fetches an image, says "there" at a step of it, and waits there to be killed."""

import sys
import time
from pathlib import Path
from typing import Any

from virtmigrate import conf, fetching, imagecache, node, slots, sources


def main(step: str, config: str, backend: str, path: str) -> None:
    kind = slots.Claim if step == "fill" else fetching.Fetcher
    real = getattr(kind, step)

    def stop(*args: Any) -> object:
        # Half of it is done, where that can be.
        done = real(*args) if step == "_download" else None
        print("there", flush=True)
        time.sleep(120)
        return done

    setattr(kind, step, stop)
    here = node.Node(conf.load(Path(config)))
    here.ensure()
    imagecache.Caches(here).of(here.backend(backend)).obtain(
        sources.LocalFile(Path(path), "raw")
    )


main(*sys.argv[1:])
