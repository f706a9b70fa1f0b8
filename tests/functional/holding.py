# SPDX-License-Identifier: Apache-2.0
"""A process that holds locks of a backend until its standard input ends.

    python -m tests.functional.holding CONFIGURATION URI NAME...

It says "held", then to each line whether they are "ours" or "lost", and "released".
"""

import sys
from pathlib import Path

from virtmigrate import backends, conf, errors, host


def main() -> None:
    path, uri, *names = sys.argv[1:]
    with host.Host(uri, name="holder") as here:
        (backend,) = backends.load(conf.load(Path(path)), here).values()
        with backend.locks.held(names, timeout=60) as lease:
            print("held", flush=True)
            for _ in sys.stdin:
                try:
                    lease.demand()
                    print("ours", flush=True)
                except errors.LockLost:
                    print("lost", flush=True)
        print("released", flush=True)
        backend.close()


if __name__ == "__main__":
    main()
