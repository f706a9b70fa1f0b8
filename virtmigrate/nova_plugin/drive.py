# SPDX-License-Identifier: Apache-2.0
"""The config drive of a new instance, made by Nova's own builder."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nova.conf
from nova import exception
from nova.api.metadata import base as metadata
from nova.virt import configdrive

CONF = nova.conf.CONF


@contextlib.contextmanager
def made(
    context: Any,
    instance: Any,
    network_info: Any,
    injected_files: Any,
    admin_password: str | None,
) -> Iterator[Path | None]:
    """Yield an image of a CD for as long as it is read; None where none is wanted.

    Raises InvalidInput for files to inject without a drive that could hold them.
    """
    if not configdrive.required_by(instance):
        if injected_files:
            raise exception.InvalidInput(
                reason="files are injected by a config drive only: ask for one"
            )
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="virtmigrate-drive-") as directory:
        path = Path(directory) / "config.iso"
        data = metadata.InstanceMetadata(
            instance,
            content=injected_files,
            extra_md={"admin_pass": admin_password} if admin_password else {},
            network_info=network_info,
        )
        with configdrive.ConfigDriveBuilder(instance_md=data) as builder:
            builder.make_drive(str(path))
        yield path
