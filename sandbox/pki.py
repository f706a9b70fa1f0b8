# SPDX-License-Identifier: Apache-2.0
"""Certificates of a private authority, in the layouts of libvirt and QEMU."""

from __future__ import annotations

import datetime
import enum
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import trustme

from sandbox import errors

WRONG_NAME = "somebody-else.example"


class Kind(enum.Enum):
    """What is right or wrong with a certificate."""

    TRUSTED = "trusted"
    """Valid, from the sandbox's authority, with the right name."""

    EXPIRED = "expired"
    """From the sandbox's authority, but its time is over."""

    OTHER_CA = "other-ca"
    """From an authority that no host knows; knows none of the hosts."""

    WRONG_NAME = "wrong-name"
    """Valid, from the sandbox's authority, with another host's name."""


class Authority:
    """The certificate authority of one sandbox, and a foreign one for tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self) -> None:
        """Make both authorities, unless they are there."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("own", "other"):
            path = self.directory / f"{name}.pem"
            if not path.exists():
                ca = trustme.CA(organization_name=f"virtmigrate sandbox {name}")
                write(path, ca.cert_pem.bytes() + ca.private_key_pem.bytes(), 0o600)

    def server(self, target: Path, names: Sequence[str], kind: Kind) -> None:
        """Fill a host's /etc/pki: its daemon's certificate, and as a client.

        Arguments:
          target: the directory that the host sees as /etc/pki.
          names: the host's name and addresses, the name first.
          kind: what is to be wrong with the server certificate; the one that
            the host shows as a client of its peers is always in order.
        """
        good = self._issue(names, Kind.TRUSTED)
        shown = self._issue(names, kind)
        libvirt = target / "libvirt"
        put_pair(libvirt / "private/serverkey.pem", libvirt / "servercert.pem", shown)
        put_pair(libvirt / "private/clientkey.pem", libvirt / "clientcert.pem", good)
        write(target / "CA/cacert.pem", self._ca("own").cert_pem.bytes(), 0o644)
        qemu = target / "qemu"
        write(qemu / "ca-cert.pem", self._ca("own").cert_pem.bytes(), 0o644)
        for role, pair in (("server", shown), ("client", good)):
            put_pair(qemu / f"{role}-key.pem", qemu / f"{role}-cert.pem", pair)

    def client(self, target: Path, kind: Kind, group: int) -> None:
        """Fill a directory that serves as ``pkipath`` of a libvirt URI.

        Arguments:
          group: the group id that may read the key.
        """
        if target.exists():
            shutil.rmtree(target)
        known = "other" if kind is Kind.OTHER_CA else "own"
        pair = self._issue(["client.sandbox"], kind)
        put_pair(target / "clientkey.pem", target / "clientcert.pem", pair)
        write(target / "cacert.pem", self._ca(known).cert_pem.bytes(), 0o644)
        os.chown(target / "clientkey.pem", -1, group)
        (target / "clientkey.pem").chmod(0o640)

    # Private

    def _ca(self, name: str) -> trustme.CA:
        path = self.directory / f"{name}.pem"
        if not path.exists():
            raise errors.SandboxError(f"no certificate authority at {path}")
        pem = path.read_bytes()
        return trustme.CA.from_pem(cert_bytes=pem, private_key_bytes=pem)

    def _issue(self, names: Sequence[str], kind: Kind) -> trustme.LeafCert:
        ca = self._ca("other" if kind is Kind.OTHER_CA else "own")
        if kind is Kind.WRONG_NAME:
            names = [WRONG_NAME]
        now = datetime.datetime.now(datetime.UTC)
        over = kind is Kind.EXPIRED
        return ca.issue_cert(
            *names,
            common_name=names[0],
            not_before=now - datetime.timedelta(days=30),
            not_after=now + datetime.timedelta(days=-1 if over else 365),
        )


def put_pair(key: Path, certificate: Path, pair: trustme.LeafCert) -> None:
    """Write a private key and its certificate."""
    write(key, pair.private_key_pem.bytes(), 0o600)
    write(certificate, pair.cert_chain_pems[0].bytes(), 0o644)


def write(path: Path, content: bytes, mode: int) -> None:
    """Write a file that never has wider rights than mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "wb") as output:
        output.write(content)
