# SPDX-License-Identifier: Apache-2.0
"""The certificates that libvirt uses here, and how long they last."""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from virtmigrate import address

SOON = 30
"""Days before its end that a certificate is worth a warning."""

SERVER = Path("/etc/pki/libvirt/servercert.pem")

_SYSTEM = (Path("/etc/pki/CA/cacert.pem"), Path("/etc/pki/libvirt/clientcert.pem"))
_NAMES = ("cacert.pem", "clientcert.pem")


@dataclass(frozen=True)
class Certificate:
    """What of a certificate matters to an operator."""

    subject: str
    days_left: int
    """Whole days; negative when it has expired."""


def used(where: address.Address) -> list[Path]:
    """Return the authority's and our own file, as libvirt's client picks them.

    Nothing when the transport is not TLS.
    """
    if where.transport != "tls":
        return []
    if "pkipath" in where.query:
        return [Path(where.query["pkipath"]) / name for name in _NAMES]
    own = [Path.home() / ".pki/libvirt" / name for name in _NAMES]
    return [
        mine if os.geteuid() != 0 and mine.exists() else system
        for mine, system in zip(own, _SYSTEM, strict=True)
    ]


def shown() -> list[Path]:
    """Return the certificate that this host's libvirtd shows, if there is one."""
    return [SERVER] if os.access(SERVER, os.R_OK) else []


def read(file: Path) -> Certificate:
    """Read a PEM file's first certificate. Raises OSError, ValueError."""
    # Only the command needs it: the driver runs without the package.
    from cryptography import x509

    found = x509.load_pem_x509_certificate(file.read_bytes())
    left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return Certificate(found.subject.rfc4514_string(), left.days)
