# SPDX-License-Identifier: Apache-2.0
"""Each error says its fields, and the tree in the docstring is the real one."""

import pickle
import re
import string
from collections.abc import Iterator

import pytest

from virtmigrate import errors


def children(cls: type[errors.Error]) -> list[type[errors.Error]]:
    ours = f"{errors.__name__}."
    return [each for each in cls.__subclasses__() if each.__module__.startswith(ours)]


def subclasses(cls: type[errors.Error]) -> Iterator[type[errors.Error]]:
    for each in children(cls):
        yield each
        yield from subclasses(each)


ALL: list[type[errors.Error]] = [errors.Error, *subclasses(errors.Error)]


def details(cls: type[errors.Error]) -> dict[str, object]:
    """Return a value for each field of a class's template."""
    found: dict[str, object] = {}
    for _, name, form, _ in string.Formatter().parse(cls.msg):
        if name is not None:
            found[name] = 1234.5 if form else f"<{name}>"
    return found


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_str_has_every_field(cls: type[errors.Error]) -> None:
    values = details(cls)
    error = cls(**values)
    assert all(str(value) in str(error) for value in values.values())
    assert all(getattr(error, name) == value for name, value in values.items())


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_pickle_round_trip(cls: type[errors.Error]) -> None:
    error = cls(**details(cls), further=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert copy.further == 7


def test_field_missing() -> None:
    with pytest.raises(KeyError):
        errors.HostUnreachable(host="alpha")


def test_attribute_unknown() -> None:
    with pytest.raises(AttributeError):
        _ = errors.Error(reason="x").nonsense


def test_cancelled_is_no_failure() -> None:
    assert not issubclass(errors.Cancelled, errors.Error)


def test_host_timeout_says_condition() -> None:
    error = errors.HostTimeout(host="alpha", seconds=2.0, doing="looking up pool x")
    assert str(error) == (
        "host alpha did not answer within 2 s while looking up pool x; the "
        "connection was cut, and what it was doing there is unknown"
    )


def test_tree_is_current() -> None:
    """Each class stands in the docstring, under its parent, and no other."""
    drawn = dict(drawn_tree())
    real: dict[str, str] = {}
    for parent in ALL:
        real.update({child.__name__: parent.__name__ for child in children(parent)})
    assert drawn == real


def drawn_tree() -> Iterator[tuple[str, str]]:
    """Yield class and parent as the docstring of errors draws them."""
    parents = {0: "Error"}
    for line in str(errors.__doc__).splitlines():
        drawing = re.fullmatch(r"    ([│ ]*[├└]── )(.+)", line)
        if drawing is None:
            continue
        depth = len(drawing[1]) // 4
        for name in drawing[2].split(", "):
            parents[depth] = name
            yield name, parents[depth - 1]
