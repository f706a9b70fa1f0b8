# SPDX-License-Identifier: Apache-2.0
"""What a look at an image is given, and what it says."""

from __future__ import annotations

from dataclasses import dataclass

from oslo_config import cfg

from virtmigrate.units import GiB, MiB

RULES = 1
"""Version of the rules. A higher one refuses more."""


@dataclass(frozen=True)
class Limits:
    """What an image may be, and what reading it may cost."""

    formats: tuple[str, ...] = ("raw", "iso", "qcow2")
    max_size: int = 1024 * GiB
    """Bytes, of the file and of the disk in it."""
    memory: int = 1024 * MiB
    """Bytes of address space of a process that reads the image."""
    look_seconds: int = 30
    """Seconds of processor time of one look; twice as many by the clock."""
    convert_seconds: int = 3600
    """Seconds of a conversion, by the clock and of processor time."""

    @classmethod
    def configured(cls, conf: cfg.ConfigOpts) -> Limits:
        """Return the limits that an operator set."""
        group = conf["virtmigrate"]
        return cls(
            formats=tuple(group.image_formats),
            max_size=group.image_max_size_gib * GiB,
            memory=group.image_memory_mib * MiB,
            look_seconds=group.image_cpu_seconds,
            convert_seconds=group.image_convert_timeout,
        )


@dataclass(frozen=True)
class Found:
    """An image that may come in."""

    format: str
    virtual_size: int
    """Bytes that a guest sees; of raw and iso those of the file."""
    rules: int = RULES
    """Version of the rules that let it in."""


class Refusal(Exception):
    """Why an image does not come in; inside the look only."""
