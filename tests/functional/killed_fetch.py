# SPDX-License-Identifier: Apache-2.0
"""Fetches an image, says "there" at a step of it, and waits there to be killed.

Or says "begins" at the beginning, and does not wait, for a step that there is not.
"""

import sys
import time
from pathlib import Path
from typing import Any

from virtmigrate import conf, fetching, filling, imagecache, node, slots, sources


def main(step: str, config: str, backend: str, path: str) -> None:
    kinds = {"fill": slots.Claim, "settle": filling.Filler}
    kind = kinds.get(step, fetching.Fetcher)
    real = getattr(kind, step, None)

    def stop(*args: Any) -> object:
        # Half of it is done, where that can be.
        done = real(*args) if real and step == "_download" else None
        if step == "settle":
            args[0]._backend.accept(args[1].name)
        print("there", flush=True)
        time.sleep(120)
        return done

    if real:
        setattr(kind, step, stop)
    here = node.Node(conf.load(Path(config)))
    here.ensure()
    if not real:
        print("begins", flush=True)
    imagecache.Caches(here).of(here.backend(backend)).obtain(
        sources.LocalFile(Path(path), "raw")
    )


main(*sys.argv[1:])
