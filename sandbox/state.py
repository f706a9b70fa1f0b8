# SPDX-License-Identifier: Apache-2.0
"""What is noted of a sandbox: its owner, hosts, machines and clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIRST_HOST = 11
FIRST_MACHINE = 101
FIRST_CLUSTER = 201


def load(path: Path) -> dict[str, Any]:
    """Return what is noted."""
    # Another checkout's sandbox may be older than machines and clusters.
    return {"machines": [], "clusters": [], **json.loads(path.read_text())}


def write(path: Path, noted: dict[str, Any]) -> None:
    """Note it, in one step."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(noted, default=lambda value: value.value))
    new.rename(path)


def numbers(noted: dict[str, Any]) -> dict[str, int]:
    """Return the last octet of the address of each host's name."""
    hosts = {name: FIRST_HOST + n for n, name in enumerate(noted["hosts"])}
    machines = {name: FIRST_MACHINE + n for n, name in enumerate(noted["machines"])}
    return hosts | machines
