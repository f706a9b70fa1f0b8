# SPDX-License-Identifier: Apache-2.0
"""XML trees: parsed safely, edited in small steps, written back.

Nothing outside the text is ever read: a document type, and with it every
entity, is refused before the parser sees it.
"""

from __future__ import annotations

from typing import TypeAlias

from lxml import etree

from virtmigrate import errors, units

# The longest string that libvirt's own protocol carries (REMOTE_STRING_MAX).
MAX_SIZE = 4 * units.MiB

Element: TypeAlias = etree._Element


def parse(text: str) -> Element:
    """Return the root element of a document.

    Raises:
        XmlRefused: it is too long, too deep, not well-formed, or has a
            document type.
    """
    content = _encoded(text)
    # Entities in attributes are expanded whatever the parser's options say,
    # so that a document that could define one must not reach it.
    if "<!DOCTYPE" in text:
        raise errors.XmlRefused(reason="it has a document type")
    try:
        return etree.fromstring(content, _parser())
    except etree.XMLSyntaxError as error:
        raise errors.XmlRefused(reason=str(error)) from error


def write(root: Element) -> str:
    """Return the document of a root element as text."""
    return etree.tostring(root.getroottree(), encoding="unicode")


def element(
    tag: str,
    content: str | None = None,
    attributes: dict[str, str | None] | None = None,
) -> Element:
    """Return a new element; attributes that are None are left out.

    Raises:
        XmlRefused: a name or value has characters that XML cannot carry.
    """
    given = {k: v for k, v in (attributes or {}).items() if v is not None}
    try:
        created = etree.Element(tag, given)
        created.text = content
    except ValueError as error:
        reason = f"{tag} with {content or given!r} cannot be written: {error}"
        raise errors.XmlRefused(reason=reason) from error
    return created


def add(
    parent: Element, tag: str, content: str | None = None, **attributes: str | None
) -> Element:
    """Append a new element to parent and return it."""
    created = element(tag, content, attributes)
    parent.append(created)
    return created


def append(parent: Element, created: Element) -> None:
    """Append a new element to a parent, indented as what is there."""
    last = parent[-1] if len(parent) else None
    parent.append(created)
    if last is None:
        tidy(parent)
        return
    created.tail, last.tail = last.tail, parent.text
    tidy(created)


def insert_after(sibling: Element, created: Element) -> None:
    """Place a new element behind one that has a parent."""
    created.tail, sibling.tail = sibling.tail, None
    sibling.addnext(created)


def set_attribute(target: Element, name: str, value: str | None) -> None:
    """Give an element an attribute, or take it away when value is None.

    Raises:
        XmlRefused: the value has characters that XML cannot carry.
    """
    if value is None:
        target.attrib.pop(name, None)
        return
    try:
        target.set(name, value)
    except ValueError as error:
        reason = f"{name}={value!r} cannot be written: {error}"
        raise errors.XmlRefused(reason=reason) from error


def set_text(target: Element, content: str) -> None:
    """Give an element a text in place of all that it holds.

    Raises:
        XmlRefused: the text has characters that XML cannot carry.
    """
    for child in list(target):
        target.remove(child)
    try:
        target.text = content
    except ValueError as error:
        reason = f"{tag_of(target)} with {content!r} cannot be written: {error}"
        raise errors.XmlRefused(reason=reason) from error


def remove(target: Element) -> None:
    """Take an element out of its parent; the white space around it stays even."""
    parent = target.getparent()
    if parent is None:
        return
    if target.getnext() is None:
        before = target.getprevious()
        if before is not None:
            before.tail = target.tail
        elif len(parent) == 1:
            parent.text = None
    parent.remove(target)


def tag_of(target: Element) -> str:
    """Return an element's tag, with its namespace in braces."""
    return str(target.tag)


def text(target: Element) -> str:
    """Return all text of an element, also what stands behind a comment in it."""
    return str(target.xpath("string()"))


def text_at(parent: Element, path: str) -> str | None:
    """Return the stripped text of the first element at path, None without one."""
    found = parent.find(path)
    return None if found is None else text(found).strip()


def attribute_at(parent: Element, path: str, name: str) -> str | None:
    """Return an attribute of the first element at path, None without one."""
    found = parent.find(path)
    return None if found is None else found.get(name)


def children(parent: Element) -> list[Element]:
    """Return the elements right below parent: no comments, no instructions."""
    return list(parent.iterchildren("*"))


def tidy(target: Element) -> None:
    """Indent what is below an element as libvirt does, two spaces a level."""
    level = sum(1 for _ in target.iterancestors())
    etree.indent(target, space="  ", level=level)


# Private


def _encoded(text: str) -> bytes:
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise errors.XmlRefused(reason=str(error)) from error
    if len(content) > MAX_SIZE:
        limit = units.format_bytes(MAX_SIZE)
        size = units.format_bytes(len(content))
        raise errors.XmlRefused(reason=f"{size} is more than {limit}")
    return content


def _parser() -> etree.XMLParser:
    # The encoding is given so that a declaration inside cannot change it and
    # hide a document type from the search for one.
    return etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        # libxml2's own limits of depth (256 levels; libvirt follows a backing
        # chain for 200) and of expansion stay on.
        huge_tree=False,
        strip_cdata=False,
    )
