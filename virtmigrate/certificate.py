# SPDX-License-Identifier: Apache-2.0
"""Why a host's certificate was refused.

libvirt says "Failed to verify peer's certificate" whatever is wrong, so a
handshake of our own asks again. Nothing is decided by it: the connection has
been refused already.
"""

import os
import socket
import ssl
from pathlib import Path

from virtmigrate import address

SYSTEM_AUTHORITY = Path("/etc/pki/CA/cacert.pem")
USER_AUTHORITY = Path(".pki/libvirt/cacert.pem")  # below the home directory

# Numbers of OpenSSL's X509_V_ERR_*, which the ssl module passes on.
_PROBLEMS = {
    9: "not yet valid",
    10: "expired",
    23: "revoked",
    62: "wrong name",
    64: "wrong name",
}


def diagnose(where: address.Address, seconds: float) -> tuple[str, str]:
    """Return in few words, and in full, why the host's certificate is refused.

    Arguments:
        seconds: how long the host may take.
    """
    try:
        _shake_hands(where, seconds)
    except ssl.SSLCertVerificationError as e:
        problem = _PROBLEMS.get(e.verify_code, "untrusted")
        return problem, f"{e.verify_message} ({_authority(where)})"
    except (OSError, ValueError) as e:
        return "untrusted", f"asking why failed: {e}"
    return "untrusted", "OpenSSL accepts it, GnuTLS does not"


# Private


def _shake_hands(where: address.Address, seconds: float) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(_authority(where))
    target = (where.host, where.port)
    with (
        socket.create_connection(target, seconds) as plain,
        context.wrap_socket(plain, server_hostname=where.host),
    ):
        pass


def _authority(where: address.Address) -> Path:
    """Return the file of the authority that libvirt trusts for a URI."""
    if "pkipath" in where.query:
        return Path(where.query["pkipath"]) / "cacert.pem"
    own = Path.home() / USER_AUTHORITY
    return own if os.geteuid() != 0 and own.exists() else SYSTEM_AUTHORITY
