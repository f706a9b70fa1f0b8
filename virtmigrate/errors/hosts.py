# SPDX-License-Identifier: Apache-2.0
"""Hosts that are not reached, not trusted, or refuse."""

from virtmigrate.errors.base import Error


class HostError(Error):
    msg = "host {host}: {reason}"


class HostUnreachable(HostError):
    msg = "host {host} cannot be reached: {reason}"


class HostTimeout(HostError):
    msg = (
        "host {host} did not answer within {seconds:g} s while {doing}; "
        "the connection was cut, and what it was doing there is unknown"
    )


class HostBusy(HostError):
    msg = "host {host}: no {what} place became free in {seconds:g} s ({count} in all)"


class AuthenticationFailed(HostError):
    msg = "host {host} does not let us in: {reason}"


class CertificateRefused(HostError):
    msg = "host {host}: certificate refused ({problem}): {reason}"


class InsecureConnection(HostError):
    msg = (
        "host {host}: {reason}. Nothing was sent. Use qemu+tls:// or SASL with "
        "encryption, or name the host in allow_insecure_peers"
    )


class ReceiverSilent(HostError):
    msg = (
        "host {host}: no receiver answered within {seconds:g} s ({doing}); is the "
        "driver or `virtmigrate receiver` running there?"
    )


class RequestRefused(HostError):
    msg = "host {host}: its receiver refused to {verb} {volume}: {reason}"


class LibvirtFailed(HostError):
    """Any error of libvirt that has no name of its own here.

    `code` is VIR_ERR_*, `domain` VIR_FROM_*.
    """

    msg = "host {host}: {doing}: {reason} (libvirt code {code}, domain {domain})"
