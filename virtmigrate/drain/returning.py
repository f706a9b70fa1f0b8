# SPDX-License-Identifier: Apache-2.0
"""The plan that brings instances back to a host that was drained, as a file.

It is read where the instances are: each of those hosts sends its own back.
"""

import os
import tempfile
import time
from pathlib import Path

import msgspec

from virtmigrate import errors
from virtmigrate.drain.mover import Mover
from virtmigrate.drain.values import Outcome, Report, Return, ReturnPlan, Way


def of(report: Report, mover: Mover) -> ReturnPlan:
    """Return how what a drain moved comes back, by the way that it went."""
    entries = [
        Return(
            uuid=result.uuid,
            name=result.name,
            at=result.target,
            way=result.way or Way.COLD,
            bytes=result.sent,
            base=mover.kept(result.uuid),
        )
        for result in report.results
        if result.outcome is Outcome.MOVED and result.target
    ]
    return ReturnPlan(host=report.host, made=time.time(), entries=tuple(entries))


def write(path: Path, plan: ReturnPlan) -> None:
    """Write it whole, or leave what was there; only its owner may read it."""
    text = msgspec.json.format(msgspec.json.encode(plan))
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text + b"\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> ReturnPlan:
    """Read it; PlanDamaged when it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReturnPlan)
    except (OSError, msgspec.MsgspecError) as e:
        raise errors.PlanDamaged(path=path, reason=e) from e


def here(plan: ReturnPlan, host: str) -> dict[str, str]:
    """Return which instances a host sends back, and where to."""
    return {entry.uuid: plan.host for entry in plan.entries if entry.at == host}
