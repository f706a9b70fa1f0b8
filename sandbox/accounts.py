# SPDX-License-Identifier: Apache-2.0
"""Accounts of a sandbox: the machine's own, and an unprivileged user."""

from __future__ import annotations

import grp
from pathlib import Path

from sandbox import config, errors

USER = "mover"
USER_ID = 64901


def write(etc: Path, home: Path) -> None:
    """Write passwd and group."""
    passwd = f"{USER}:x:{USER_ID}:{USER_ID}::{home}:/bin/sh\n"
    (etc / "passwd").write_text(Path("/etc/passwd").read_text() + passwd)
    lines = Path("/etc/group").read_text().splitlines()
    (etc / "group").write_text(
        "".join(map(with_user, lines)) + f"{USER}:x:{USER_ID}:\n"
    )


def with_user(line: str) -> str:
    """Return a line of /etc/group, with our user in the group that needs it."""
    name, password, number, members = line.split(":")
    if name == config.SERVICE_GROUP:
        members = ",".join(filter(None, [members, USER]))
    return f"{name}:{password}:{number}:{members}\n"


def service_group() -> int:
    """Return the id of the group that may use libvirt."""
    try:
        return grp.getgrnam(config.SERVICE_GROUP).gr_gid
    except KeyError:
        raise errors.SandboxError(
            f"there is no group {config.SERVICE_GROUP}; run `make setup`"
        ) from None


def variables(home: Path) -> dict[str, str]:
    """Return the environment variables of our user."""
    return {"HOME": str(home), "USER": USER, "LOGNAME": USER}


def identity() -> list[str]:
    """Return the command that runs another one as our user, in the service's group."""
    ids = [f"--reuid={USER_ID}", f"--regid={USER_ID}"]
    return ["setpriv", *ids, f"--groups={USER_ID},{service_group()}", "--"]
