# SPDX-License-Identifier: Apache-2.0
"""Serial ports, consoles, channels and their like: what is at the host's end."""

from __future__ import annotations

import re
from collections.abc import Iterator

from virtmigrate import xml
from virtmigrate.xml import Element

# What QEMU makes anew at every start, wherever that is.
_OWN = frozenset(["pty", "null", "vc", "spicevmc", "spiceport", "qemu-vdagent", "unix"])

# libvirt's directories for the sockets that it names by itself.
_GIVEN_PATH = re.compile(r"(/var/lib|/run|/var/run)/libvirt/qemu/(.*/)?channel/.*")


def obstacles(device: Element) -> Iterator[str]:
    """Say what of a character device cannot be carried."""
    label = _label(device)
    kind = device.get("type", "pty" if device.tag == "console" else "none")
    if device.tag == "smartcard" and device.get("mode") != "passthrough":
        yield f"{label}: mode {device.get('mode')} uses what is on this host"
    elif kind not in _OWN:
        yield f"{label}: type {kind} leads to {_end(device)} of this host"
    elif kind == "unix":
        yield from _socket(label, device)
    if device.find("log") is not None and not _is_console(device):
        log = xml.attribute_at(device, "log", "file")
        yield f"{label}: only the first serial port's log is carried, not {log}"


def is_given_socket(source: Element) -> bool:
    """Tell whether libvirt chose the path of a socket by itself."""
    path = source.get("path", "")
    return source.get("mode") == "bind" and _GIVEN_PATH.fullmatch(path) is not None


# Private


def _is_console(device: Element) -> bool:
    """Tell whether it is the first serial port, or the console that stands for it."""
    if device.tag == "console":
        return xml.attribute_at(device, "target", "type") == "serial"
    parent = device.getparent()
    first = None if parent is None else parent.find("serial")
    return device is first


def _socket(label: str, device: Element) -> Iterator[str]:
    for source in device.findall("source"):
        if source.get("path") and not is_given_socket(source):
            yield f"{label}: socket {source.get('path')} of this host"
        elif source.get("mode", "bind") != "bind":
            yield f"{label}: it connects to a socket of this host"


def _end(device: Element) -> str:
    source = device.find("source")
    if source is None:
        return "something"
    values = [source.get(key) for key in ("path", "host", "master", "channel")]
    return next((value for value in values if value), "something")


def _label(device: Element) -> str:
    """Return "serial port 0", "channel org.qemu.guest_agent.0" and the like."""
    target = device.find("target")
    name = None if target is None else target.get("name") or target.get("port")
    tag = xml.tag_of(device)
    return f"{tag} {name}" if name else tag
