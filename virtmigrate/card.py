# SPDX-License-Identifier: Apache-2.0
"""What a host says of itself to its peers."""

from virtmigrate import model, xml
from virtmigrate.backends import base


def host_uuid(capabilities: str) -> str:
    """Return the UUID of the host, from libvirt's capabilities."""
    return xml.parse(capabilities).findtext("host/uuid") or ""


def of(backend: base.Backend, files: base.Backend) -> model.BackendCard:
    """Return what peers are told of a backend.

    Arguments:
        files: the host's backend for files.
    """
    return model.BackendCard(
        name=backend.name,
        kind=backend.kind,
        disks=backend.disks.name,
        incoming=backend.incoming.name,
        records=backend.records,
        formats=backend.capabilities.formats,
        files=backend.capabilities.files,
        thick=backend.capabilities.thick,
        preallocates=backend.preallocates,
        granularity=backend.granularity(),
        pieces="" if backend.capabilities.streams else files.incoming.name,
        reserved=backend.settings.reserved,
        traits=backend.settings.traits,
    )
