# SPDX-License-Identifier: Apache-2.0
"""First process of a namespace: makes its mounts, says so, reaps until killed.

Started as a file (``python3 -I -S init.py SPEC``), with the standard library
only, so that it is up in a few milliseconds. Steps:

1. write the record (pid as seen outside, start time, boot id), so that a later
   run can end this process even when the one that started it was killed;
2. make the mounts of the specification, set the host name;
3. print ``ready`` and collect dead children for ever.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def main() -> None:
    """Run the specification named on the command line."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    write_record(Path(spec["record"]))
    if spec.get("hostname"):
        socket.sethostname(spec["hostname"])
    for arguments in spec["mounts"]:
        subprocess.run(["mount", *arguments], check=True, stdout=sys.stderr)
    print("ready", flush=True)
    detach()
    reap()


def write_record(path: Path) -> None:
    """Publish who this process is, in one atomic step."""
    # /proc is still the one of the outer PID namespace here.
    pid = int(Path("/proc/self").readlink().name)
    stat = Path("/proc/self/stat").read_text()
    record = {
        "pid": pid,
        "start": int(stat.rpartition(")")[2].split()[19]),
        "boot": BOOT_ID.read_text().strip(),
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record))
    new.rename(path)


def detach() -> None:
    """Let go of the starter's pipe and directory."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    os.chdir("/")


def reap() -> None:
    """Collect children until SIGKILL: orphans of the namespace end up here."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        while collect_one():
            pass
        signal.sigwait({signal.SIGCHLD})


def collect_one() -> bool:
    """Return whether a dead child was there to collect."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    main()
