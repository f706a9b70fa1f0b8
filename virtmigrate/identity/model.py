# SPDX-License-Identifier: Apache-2.0
"""What is wanted of a clone, what was read from guests, and what was done."""

import enum
import re
import uuid

import msgspec

_NAME = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Interface(msgspec.Struct, frozen=True):
    """The address of a network interface, before and after."""

    old_mac: str  # as it came with the memory image
    new_mac: str  # as QEMU has it on its command line

    def __post_init__(self) -> None:
        for mac in (self.old_mac, self.new_mac):
            if not _MAC.fullmatch(mac):
                raise ValueError(f"{mac!r} is no MAC, or not in lower case")


class Wanted(msgspec.Struct, frozen=True):
    """Who a clone is to be. Raises ValueError for what no guest can be."""

    name: str  # its hostname, without a domain
    uuid: str  # the instance's; machine-id and cloud-init's instance id follow it
    interfaces: tuple[Interface, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no hostname")
        if str(uuid.UUID(self.uuid)) != self.uuid:
            raise ValueError(f"{self.uuid!r} is no UUID in its usual form")


def hostname(name: str, uuid: str) -> str:
    """Return a hostname for an instance, as like its name as can be.

    Of a name without a letter or digit of ASCII nothing is left: then it is made of
    the UUID.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].strip("-")
    return plain or f"host-{uuid[:8]}"


class Identities(msgspec.Struct, frozen=True):
    """What a guest believes to be.

    A name is `group` or `group:member`, as `ssh:/etc/ssh/ssh_host_rsa_key`. Values of
    one group may be in no other guest, whichever member has them. Of secrets only
    fingerprints are here.
    """

    values: dict[str, str]

    def group(self, name: str) -> set[str]:
        """Return all values of a group."""
        return {value for key, value in self.values.items() if group_of(key) == name}


def group_of(name: str) -> str:
    return name.partition(":")[0]


class State(enum.Enum):
    """How a step ended."""

    CHANGED = "changed"
    """Done, read back, and unlike the source and all siblings."""
    ABSENT = "absent"
    """The guest has nothing of this kind."""
    FAILED = "failed"
    """Not done, or not proven; the caller had taken that risk by name."""


class Step(msgspec.Struct, frozen=True):
    """What was done about some identities."""

    name: str
    before: dict[str, str]  # of the source
    after: dict[str, str]  # of the clone, read when all steps were done
    how: str
    proof: str
    seconds: float
    state: State


class Report(msgspec.Struct, frozen=True):
    """How unique a clone is: to be kept with it, as JSON."""

    steps: tuple[Step, ...]
    not_unique: tuple[str, ...]
    """What nobody changed: its programs' and its disks', by name."""
    unproven: tuple[str, ...]
    """What was risked. With any of these the clone stays off the network."""
    ok: bool  # it may come on the network
    compared: int = 0  # with how many siblings, beside the source
    began: float = 0.0  # seconds since 1970, by this host's clock
    seconds: float = 0.0  # all of it

    def encode(self) -> bytes:
        """Return it as JSON."""
        return msgspec.json.encode(self)


def decode(text: bytes) -> Report:
    """Read a report. Raises ValueError for what is none."""
    return msgspec.json.decode(text, type=Report)


class Limits(msgspec.Struct, frozen=True):
    """How long a guest may take, in seconds."""

    step: float = 60.0  # to change one kind of identity, or to read it
    whole: float = 600.0  # for all of it
    hook: float = 60.0  # for one hook of the guest's own
    steps: dict[str, float] = msgspec.field(default_factory=dict)
    """For single steps, by name, instead of `step`."""

    def of(self, name: str) -> float:
        """Return how long a step may take."""
        return self.steps.get(name, self.step)
