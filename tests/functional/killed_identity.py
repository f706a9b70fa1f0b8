# SPDX-License-Identifier: Apache-2.0
"""A process that makes a clone somebody else, and is killed in it.

    python -m tests.functional.killed_identity URI COUNT < JSON

It kills itself when the guest was told to run its COUNTth command, and before it is
known how that ended. With 0 it lives, and prints how many commands there were.
"""

import os
import signal
import sys

import msgspec

from virtmigrate import identity
from virtmigrate.host import Host


class Job(msgspec.Struct):
    """What is to be done."""

    wanted: identity.Wanted
    source: identity.Identities
    limits: identity.Limits


class Killed(identity.AgentGuest):
    """Kills its process in the midst of a command."""

    left = 0
    ran = 0

    def _await(self, pid: int, doing: str, until: float) -> identity.Result:
        Killed.ran += 1
        if Killed.ran == Killed.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._await(pid, doing, until)


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    Killed.left = int(sys.argv[2])
    with Host(sys.argv[1], name="alpha") as host:
        guest = Killed(host, job.wanted.uuid)
        identity.change(guest, job.wanted, job.source, [], limits=job.limits)
    print(Killed.ran)


if __name__ == "__main__":
    main()
