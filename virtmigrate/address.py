# SPDX-License-Identifier: Apache-2.0
"""A libvirt URI, read as far as the way to the host is concerned."""

import urllib.parse
from dataclasses import dataclass
from pathlib import Path

PORTS = {"tls": 16514, "tcp": 16509}
TRANSPORTS = {"tls", "tcp", "unix"}


@dataclass(frozen=True)
class Address:
    """How a URI reaches its daemon."""

    uri: str
    transport: str  # tls, tcp, unix, another of libvirt's, or "" for in-process
    host: str  # "" for this host
    port: int  # 0 for a local one
    query: dict[str, str]  # the URI's parameters

    @property
    def is_local(self) -> bool:
        """Whether the way to the daemon stays on this host."""
        return self.transport in ("", "unix")

    @property
    def is_known(self) -> bool:
        """Whether the transport is libvirt's own; others run a command or SSH."""
        return self.transport in TRANSPORTS | {""}

    @property
    def verifies(self) -> bool:
        """Whether libvirt checks the certificate of the host."""
        return self.query.get("no_verify", "0") == "0"

    @property
    def auth_file(self) -> Path | None:
        """The file with SASL user and password that the URI names."""
        name = self.query.get("authfile")
        return Path(name) if name else None

    @property
    def name(self) -> str:
        """What errors call the host."""
        return self.host or "local"


def parse(uri: str) -> Address:
    """Read a URI as libvirt does. Raises ValueError."""
    parts = urllib.parse.urlsplit(uri)
    if not parts.scheme:
        # libvirt would look it up as an alias, or take its default: either may
        # lead anywhere, SSH included.
        raise ValueError("it has no scheme")
    host = parts.hostname or ""
    transport = parts.scheme.partition("+")[2]
    if not transport and host:
        transport = "tls"
    port = 0 if transport not in PORTS else parts.port or PORTS[transport]
    query = dict(urllib.parse.parse_qsl(parts.query))
    return Address(uri, transport, host, port, query)
