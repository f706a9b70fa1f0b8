# SPDX-License-Identifier: Apache-2.0
"""XML: hostile documents are refused, edits leave the rest alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtmigrate import errors, xml

LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE lolz [
 <!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
 <!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">
]>
<lolz>&c;</lolz>"""

HOSTILE = {
    "laughs": LAUGHS,
    "internal entity": '<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>',
    "entity in an attribute": '<!DOCTYPE a [<!ENTITY x "y">]><a b="&x;"/>',
    "external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
    "external type": '<!DOCTYPE a SYSTEM "http://192.0.2.1/a.dtd"><a/>',
    "undefined entity": "<a>&x;</a>",
    "too long": f"<a>{'x' * 10 * 1024 * 1024}</a>",
    "too deep": "<a>" * 100_000 + "</a>" * 100_000,
    "not well-formed": "<a><b></a>",
    "empty": "",
    "NUL": "<a>\0</a>",
    "control character": "<a>&#1;</a>",
    "lone surrogate": "<a>\ud800</a>",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_parse_hostile(text: str) -> None:
    with pytest.raises(errors.XmlRefused):
        xml.parse(text)


def test_parse_encoding_cannot_hide_document_type() -> None:
    # In UTF-7 this is <!DOCTYPE a [<!ENTITY x "y">]>.
    hidden = "+ADw-!DOCTYPE a +AFs-+ADw-!ENTITY x +ACI-y+ACI-+AD4-+AF0-+AD4-"
    with pytest.raises(errors.XmlRefused):
        xml.parse(f'<?xml version="1.0" encoding="utf-7"?>{hidden}<a>&x;</a>')


def test_parse_reads_no_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    include = f'<i:include xmlns:i="http://www.w3.org/2001/XInclude" href="{secret}"/>'
    assert "secret<" not in xml.write(xml.parse(f"<a>{include}</a>"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_parse_text_with_declared_encoding(encoding: str) -> None:
    root = xml.parse(f'<?xml version="1.0" encoding="{encoding}"?><a>é</a>')
    assert root.text == "é"


def test_parse_the_longest_chain_of_libvirt() -> None:
    assert xml.parse("<a>" * 205 + "</a>" * 205).tag == "a"


def test_write_keeps_what_is_around() -> None:
    text = '<!-- before --><a>\n  <b c="1"/>\n\n   <!-- in --><d> x </d>\n</a>'
    assert xml.write(xml.parse(text)) == text


def test_text_goes_on_behind_a_comment() -> None:
    root = xml.parse("<a><b>one<!-- x -->two</b></a>")
    assert xml.text_at(root, "b") == "onetwo"
    assert xml.text_at(root, "c") is None


@pytest.mark.parametrize(
    ("tag", "left"),
    [
        ("b", "<a>\n  <c/>\n  <d/>\n</a>"),
        ("c", "<a>\n  <b/>\n  <d/>\n</a>"),
        ("d", "<a>\n  <b/>\n  <c/>\n</a>"),
    ],
)
def test_remove_keeps_indentation(tag: str, left: str) -> None:
    root = xml.parse("<a>\n  <b/>\n  <c/>\n  <d/>\n</a>")
    found = root.find(tag)
    assert found is not None
    xml.remove(found)
    assert xml.write(root) == left


def test_remove_last_child_leaves_an_empty_element() -> None:
    root = xml.parse("<a>\n  <b/>\n</a>")
    xml.remove(root[0])
    assert xml.write(root) == "<a/>"


def test_append_keeps_indentation() -> None:
    root = xml.parse("<a>\n  <b/>\n</a>")
    created = xml.element("c")
    xml.add(created, "d")
    xml.append(root, created)
    xml.append(root[0], xml.element("e"))
    assert xml.write(root) == (
        "<a>\n  <b>\n    <e/>\n  </b>\n  <c>\n    <d/>\n  </c>\n</a>"
    )


@pytest.mark.parametrize("value", ["\0", "\x1b", "\ud800", "\uffff"])
def test_values_that_xml_cannot_carry(value: str) -> None:
    target = xml.element("a")
    with pytest.raises(errors.XmlRefused):
        xml.add(target, "b", value)
    with pytest.raises(errors.XmlRefused):
        xml.add(target, "b", c=value)
    with pytest.raises(errors.XmlRefused):
        xml.set_attribute(target, "b", value)
    with pytest.raises(errors.XmlRefused):
        xml.set_text(target, value)
    assert xml.write(target) == "<a/>"


CARRIED = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff")
    | st.sampled_from("\t\n\r<>&'\"")
)


@given(CARRIED, CARRIED)
def test_values_round_trip(content: str, attribute: str) -> None:
    written = xml.write(xml.element("a", content, {"b": attribute}))
    read = xml.parse(written)
    assert (xml.text(read), read.get("b")) == (content, attribute)


@given(st.text())
def test_parse_anything(text: str) -> None:
    try:
        xml.parse(text)
    except errors.XmlRefused:
        pass
