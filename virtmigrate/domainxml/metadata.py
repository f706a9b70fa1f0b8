# SPDX-License-Identifier: Apache-2.0
"""What we note of an instance inside its domain's XML."""

from __future__ import annotations

from collections.abc import Mapping

from lxml import etree

from virtmigrate import errors, xml
from virtmigrate.domainxml import tree
from virtmigrate.xml import Element

URI = "https://virtmigrate.org/xmlns/instance/1"
PREFIX = "virtmigrate"

_INSTANCE = f"{{{URI}}}instance"


def metadata_of(text: str) -> dict[str, str] | None:
    """Return what a domain's XML says of the instance, None when it has no word.

    Raises:
        DomainNotUnderstood: it says it twice.
    """
    return read(tree.parse(text))


def with_metadata(text: str, values: Mapping[str, str]) -> str:
    """Return a domain's XML that says this of the instance, and nothing older."""
    root = tree.parse(text)
    write(root, values)
    return xml.write(root)


def metadata_element(values: Mapping[str, str]) -> str:
    """Return what virDomainSetMetadata() takes with PREFIX and URI."""
    instance = xml.element("instance")
    for name, value in values.items():
        _check_name(name)
        xml.add(instance, name, value)
    return xml.write(instance)


def metadata_values(text: str) -> dict[str, str]:
    """Return what an element from virDomainGetMetadata() says."""
    return _values(xml.parse(text))


# For the other modules of this package


def read(root: Element) -> dict[str, str] | None:
    """Return the instance's values in a tree, None when there are none."""
    found = root.findall(f"metadata/{_INSTANCE}")
    if len(found) > 1:
        raise tree.not_understood(root, "its metadata names the instance twice")
    return _values(found[0]) if found else None


def write(root: Element, values: Mapping[str, str]) -> None:
    """Put the instance's values into a tree in place of older ones."""
    for old in root.findall(f"metadata/{_INSTANCE}"):
        xml.remove(old)
    instance = etree.Element(_INSTANCE, nsmap={PREFIX: URI})
    for name, value in values.items():
        _check_name(name)
        xml.add(instance, f"{{{URI}}}{name}", value)
    xml.append(_holder(root), instance)


# Private


def _holder(root: Element) -> Element:
    found = root.find("metadata")
    if found is None:
        found = xml.element("metadata")
        xml.insert_after(tree.required(root, "name"), found)
    return found


def _values(instance: Element) -> dict[str, str]:
    values: dict[str, str] = {}
    for child in xml.children(instance):
        name = etree.QName(child).localname
        if name in values:
            raise errors.XmlRefused(reason=f"the metadata has {name} twice")
        values[name] = xml.text(child)
    return values


def _check_name(name: str) -> None:
    if not name or ":" in name or "{" in name:
        raise errors.XmlRefused(reason=f"{name!r} cannot be the name of an element")
