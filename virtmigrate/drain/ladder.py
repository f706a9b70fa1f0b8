# SPDX-License-Identifier: Apache-2.0
"""Which way is tried, and which one next: what a policy makes of an instance.

A policy names ways, first choice first. One that has one word has one rung. What ends
it (stop, leave) always works, so nothing after it is read.
"""

from collections.abc import Iterable, Mapping

from virtmigrate.drain.values import POLICY, Instance, Prospect, Way

_ENDS = (Way.STOP, Way.LEAVE)


def read(words: Iterable[str]) -> tuple[Way, ...]:
    """Return the policy that words name.

    Raises ValueError, which says what the words are.
    """
    known = {way.value: way for way in POLICY}
    found = []
    for word in words:
        if word not in known or known[word] in found:
            raise ValueError(
                f"{word!r}: name each of {', '.join(known)} once, first choice first"
            )
        found.append(known[word])
    return tuple(found)


def ways(instance: Instance) -> tuple[Way, ...]:
    """Return the ways that an instance may go, in their order.

    One that is off goes as it is by any policy that lets it go at all.
    """
    found: list[Way] = []
    for way in instance.policy:
        if instance.power == "off" and way not in _ENDS:
            way = Way.OFFLINE
        if way not in found:
            found.append(way)
        if way in _ENDS:
            break
    return tuple(found)


def rungs(instance: Instance, found: Iterable[Prospect]) -> tuple[Prospect, ...]:
    """Return what can be tried with one target, in the order of the policy."""
    usable: Mapping[Way, Prospect] = {p.way: p for p in found if not p.obstacle}
    climbed = []
    for way in ways(instance):
        if way in _ENDS:
            climbed.append(Prospect(target="", way=way))
        elif way in usable:
            climbed.append(usable[way])
    return tuple(climbed)


def end(instance: Instance) -> Prospect | None:
    """Return what is done with an instance that goes nowhere; None: nothing."""
    last = ways(instance)[-1:]
    if last and last[0] in _ENDS:
        return Prospect(target="", way=last[0])
    return None
