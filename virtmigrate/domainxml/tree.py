# SPDX-License-Identifier: Apache-2.0
"""A domain's tree: its root, its parts, and what to say when they are amiss."""

from __future__ import annotations

from virtmigrate import errors, xml
from virtmigrate.xml import Element


def parse(text: str) -> Element:
    """Return the root of a domain's XML.

    Raises:
        XmlRefused: it is not safe or not well-formed.
        DomainNotUnderstood: it is no domain.
    """
    root = xml.parse(text)
    if root.tag != "domain":
        raise not_understood(root, f"the XML's root is {xml.tag_of(root)}, not domain")
    return root


def not_understood(part: Element, reason: str) -> errors.DomainNotUnderstood:
    """Return the error to raise about a domain, of which any element is given."""
    root = part.getroottree().getroot()
    name = xml.text_at(root, "name") or "without a name"
    return errors.DomainNotUnderstood(domain=name, reason=reason)


def required(root: Element, path: str) -> Element:
    """Return the one element at path.

    Raises:
        DomainNotUnderstood: there is none, or more than one.
    """
    found = root.findall(path)
    if len(found) != 1:
        raise not_understood(root, f"{len(found)} elements {path} where one must be")
    return found[0]


def integer(root: Element, content: str, what: str) -> int:
    """Return a whole number that is not negative.

    Raises:
        DomainNotUnderstood: it is none.
    """
    if not (content.isascii() and content.isdecimal()):
        raise not_understood(root, f"{what} is {content!r}, which is no number")
    return int(content)


def disk(root: Element, target: str) -> Element:
    """Return the disk with a target device.

    Raises:
        DomainNotUnderstood: there is none, or more than one.
    """
    found = [
        each
        for each in root.findall("devices/disk")
        if xml.attribute_at(each, "target", "dev") == target
    ]
    if len(found) != 1:
        raise not_understood(root, f"{len(found)} disks {target} where one must be")
    return found[0]
