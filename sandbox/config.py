# SPDX-License-Identifier: Apache-2.0
"""Configuration files of a sandbox host's daemons."""

from __future__ import annotations

import dataclasses
from typing import Any

from sandbox import pki

SERVICE_GROUP = "libvirt"
QEMU_USER = "libvirt-qemu"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a host differs from the plain one."""

    tcp: bool = False  # also listen on plain TCP 16509, without authentication
    # Ask for SCRAM-SHA-256 beside TLS. On plain TCP too, where libvirt refuses it:
    # it does not encrypt.
    sasl: bool = False
    service_user: bool = False  # QEMU as its own user, socket for group libvirt
    server_certificate: pki.Kind = pki.Kind.TRUSTED  # what the daemon shows
    dn_list: tuple[str, ...] = ()  # client names let in; () lets in all trusted

    @classmethod
    def load(cls, stored: dict[str, Any]) -> Options:
        """Return options from their stored form."""
        kind = pki.Kind(stored["server_certificate"])
        names = tuple(stored["dn_list"])
        return cls(**{**stored, "server_certificate": kind, "dn_list": names})


def libvirtd(options: Options, uuid: str) -> str:
    """Return libvirtd.conf."""
    settings: dict[str, object] = {
        "host_uuid": uuid,
        "listen_tls": 1,
        "listen_tcp": int(options.tcp),
        "auth_tls": "sasl" if options.sasl else "none",
        "auth_tcp": "sasl" if options.sasl else "none",
        "auth_unix_ro": "none",
        "auth_unix_rw": "none",
        "unix_sock_rw_perms": "0770",
        "log_outputs": "2:file:/var/log/libvirt/libvirtd.log",
        # A wrong server certificate is what some tests ask for.
        "tls_no_sanity_certificate": int(
            options.server_certificate is not pki.Kind.TRUSTED
        ),
    }
    if options.service_user:
        settings["unix_sock_group"] = SERVICE_GROUP
    if options.dn_list:
        settings["tls_allowed_dn_list"] = list(options.dn_list)
    return render(settings)


def qemu(options: Options, *, remember_owner: bool) -> str:
    """Return qemu.conf."""
    settings: dict[str, object] = {
        "security_driver": "none",
        "cgroup_controllers": [],
        "namespaces": [],
        "default_tls_x509_cert_dir": "/etc/pki/qemu",
        "migrate_tls_force": 0,
    }
    if options.service_user:
        settings |= {
            "user": QEMU_USER,
            "group": QEMU_USER,
            "dynamic_ownership": 1,
            "remember_owner": int(remember_owner),
        }
    else:
        settings |= {"user": "root", "group": "root", "remember_owner": 0}
    return render(settings)


def sasl() -> str:
    """Return sasl2/libvirt.conf."""
    return "mech_list: scram-sha-256\nsasldb_path: /etc/libvirt/passwd.db\n"


def auth(user: str, password: str) -> str:
    """Return a file for the ``authfile`` of a URI or LIBVIRT_AUTH_FILE."""
    return (
        f"[credentials-sandbox]\nauthname={user}\npassword={password}\n\n"
        "[auth-libvirt-default]\ncredentials=sandbox\n"
    )


def render(settings: dict[str, object]) -> str:
    """Return settings in the syntax of libvirt's configuration files."""
    return "".join(f"{key} = {literal(value)}\n" for key, value in settings.items())


def literal(value: object) -> str:
    """Return one value in that syntax."""
    if isinstance(value, list):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    return str(value) if isinstance(value, int) else f'"{value}"'
