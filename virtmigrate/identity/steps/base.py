# SPDX-License-Identifier: Apache-2.0
"""What a step is, and what the steps of a POSIX system have in common.

A step knows one kind of identity: how to read it, whether it can be changed here, and
how. It can be done again after any interruption: what is already changed is changed
once more, or left. Whether that made the clone unique is judged by others.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from virtmigrate.identity import guest, model

PRELUDE = """
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
export PATH LC_ALL
umask 022
say() { printf '%s\\t%s\\n' "$1" "$2"; }
print() { d=$(sha256sum <"$2") && say "$1" "sha256:${d%% *}"; }
has() { command -v "$1" >/dev/null 2>&1; }
put() {
    ( umask 077; cat >"$1.virtmigrate" ) && chmod "$2" "$1.virtmigrate" &&
        mv -f "$1.virtmigrate" "$1"
}
! has flock || { exec 9>/run/virtmigrate.lock; flock 9; }
is_systemd() { [ -d /run/systemd/system ] && has systemctl; }
"""
"""What scripts begin with. put FILE MODE replaces a file by what it reads, whole or not
at all. What is said is a name and a value. A script waits for an earlier one whose
caller was killed: the lock is held until the last program that it started has ended."""

MEMBERS = 256
"""Identities of one kind that a guest may have."""

_VALUE = re.compile(r"[ -~]{1,1024}")
_NAME = re.compile(r"[a-z][a-z0-9-]*(:[!-~]{1,300})?")


class Step(Protocol):
    """A kind of identity. Its objects have no state, and are shared between threads.

    All of it raises GuestFailed. Each call gets a guest with a deadline.
    """

    name: str
    """Lower case, digits, hyphens; names of identities begin with it."""

    def obstacle(self, asked: guest.Timed) -> str | None:
        """Return why it cannot be changed in this guest; asked of the source."""
        ...

    def read(self, asked: guest.Timed) -> dict[str, str]:
        """Return the guest's identities of this kind, secrets as fingerprints."""
        ...

    def change(self, asked: guest.Timed, wanted: model.Wanted) -> str:
        """Change them, and return how that was done."""
        ...

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """Return what was read back proves; ValueError when it does not."""
        ...


class Scripts:
    """A step by three scripts for sh: one that tells of obstacles, one that says what
    is there, one that changes it."""

    name: str
    OBSTACLE = ""
    """Says why it cannot be done, or nothing."""
    READ = ""
    CHANGE = ""
    HOW = ""

    def obstacle(self, asked: guest.Timed) -> str | None:
        """Return what the script says."""
        if not self.OBSTACLE:
            return None
        said = sh(asked, self.name, self.OBSTACLE).decode(errors="replace").strip()
        return "".join(c if c.isprintable() else " " for c in said[:300]) or None

    def read(self, asked: guest.Timed) -> dict[str, str]:
        """Return what the script says."""
        return parsed(asked, self.name, sh(asked, f"reading {self.name}", self.READ))

    def change(self, asked: guest.Timed, wanted: model.Wanted) -> str:
        """Run the script with arguments()."""
        said = sh(asked, self.name, self.CHANGE, *self.arguments(wanted))
        more = "; ".join(said.decode(errors="replace").split("\n")).strip("; ")[:500]
        return f"{self.HOW} ({more})" if more else self.HOW

    def arguments(self, wanted: model.Wanted) -> Sequence[str]:
        """Return what the script needs to know."""
        return ()

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """Say that it was read back; who compares says the rest."""
        return "read back"


def sh(asked: guest.Timed, doing: str, script: str, *arguments: str) -> bytes:
    """Run a script that stops at its first error, and return what it wrote.

    Arguments reach it as such: nothing of them is read as a script.
    """
    argv = ["/bin/sh", "-eu", "-c", PRELUDE + script, "virtmigrate", *arguments]
    result = asked.run(argv)
    if result.code:
        raise asked.failed(doing, guest.told(result))
    return result.out


def parsed(asked: guest.Timed, name: str, said: bytes) -> dict[str, str]:
    """Return what a script said; GuestFailed for what is no identity of this kind."""
    found = {}
    for line in said.decode(errors="replace").splitlines():
        key, _, value = line.partition("\t")
        if not _NAME.fullmatch(key) or not _VALUE.fullmatch(value):
            raise asked.failed(f"reading {name}", f"{line[:80]!r} is no identity")
        if model.group_of(key) != name:
            raise asked.failed(f"reading {name}", f"it says something of {key[:80]!r}")
        found[key] = value
    if len(found) > MEMBERS:
        raise asked.failed(f"reading {name}", f"{len(found)} are too many")
    return found
