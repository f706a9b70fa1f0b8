# SPDX-License-Identifier: Apache-2.0
"""What works and what does not, on this host and towards a peer.

Looking changes nothing but this: volumes of random names come and go, and what a
failure left is settled, as at every start.
"""

import enum
import getpass
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from oslo_config import cfg

from virtmigrate import (
    address,
    certificates,
    emulator,
    errors,
    mailbox,
    node,
    storagepool,
    units,
    xml,
)
from virtmigrate import conf as options
from virtmigrate import peer as peers
from virtmigrate.backends import base
from virtmigrate.backends.terms import Reach
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.host import Host


class State(enum.Enum):
    WORKS = "works"
    WARNING = "warning"
    """It works for now, or slower than it could."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    detail: str
    remedy: str = ""


def host(conf: cfg.ConfigOpts) -> list[Finding]:
    """Look at this host."""
    return list(_guarded("this host", lambda: _host(conf)))


def peer(conf: cfg.ConfigOpts, dest: str) -> list[Finding]:
    """Look at a host that instances are to be moved to."""
    return list(_guarded(f"peer {dest}", lambda: _peer(conf, dest)))


# Private

Findings = Iterator[Finding]

_LOCAL_SOCKET = (
    "start libvirtd, and let this user use its socket: `usermod -aG libvirt USER`, "
    "then log in again; or correct `uri`"
)

_REMEDIES: dict[type[errors.Error], str] = {
    errors.HostUnreachable: "start libvirtd there with a TLS socket (port 16514), let "
    "the firewalls pass it, and see that the name resolves; or correct peer_uri",
    errors.HostTimeout: "see whether libvirtd there hangs; raise call_timeout where a "
    "pool is slow",
    errors.AuthenticationFailed: "give the URI an ?authfile= with user and password, "
    "or have this user let in there",
    errors.InsecureConnection: "use qemu+tls:// or SASL with encryption",
    errors.PoolNotFound: "the first `instance migrate` to it makes its pools, or the "
    "driver of its own compute service does",
    errors.RecordMissing: "the first `instance migrate` to it sets it up, or the "
    "driver of its own compute service does",
    errors.RecordTooNew: "upgrade virtmigrate on this host",
    errors.ConfigurationError: "correct the configuration",
}

_CERTIFICATES = {
    "expired": "renew the host's certificate",
    "not yet valid": "set the clocks, or wait",
    "wrong name": "name the host as its certificate does, or renew that with this name",
    "our own certificate": "look at the certificates listed here, and at "
    "tls_allowed_dn_list there",
}


def _guarded(what: str, look: Callable[[], Findings]) -> Findings:
    """Yield what is found, and what ended the looking as the last finding."""
    try:
        yield from look()
    except errors.Error as e:
        yield Finding(what, State.FAILED, str(e), remedy(e))
    except OSError as e:
        yield Finding(what, State.FAILED, str(e), "give this user the right to it")


def remedy(error: errors.Error) -> str:
    """Return what a person can do about an error."""
    if isinstance(error, errors.CertificateRefused):
        default = "have both hosts' certificates signed by one authority, and put its "
        return _CERTIFICATES.get(
            str(error.problem), default + "cacert.pem where libvirt looks on both"
        )
    for kind, text in _REMEDIES.items():
        if isinstance(error, kind):
            return text
    return ""


# This host


def _host(conf: cfg.ConfigOpts) -> Findings:
    uri = str(conf[options.GROUP].uri)
    yield from _certificates(conf)
    state = Path(conf[options.GROUP].state_path)
    yield from _guarded("state_path", lambda: _state_path(state))
    # A look is over too soon to serve peers.
    conf.set_override("receiver", False, options.GROUP)
    driver = VirtMigrateDriver(conf=conf)
    try:
        yield from _libvirt(conf, uri)
        driver.init_host("check")
        for backend in driver.node.backends.values():
            yield from _guarded(f"backend {backend.name}", _looker(backend))
        yield from _operations(driver)
        yield from _emulators(driver.node)
    finally:
        driver.cleanup_host("check")


def _libvirt(conf: cfg.ConfigOpts, uri: str) -> Findings:
    user = getpass.getuser()
    try:
        with Host(uri, timeouts=node.timeouts(conf)) as local:
            yield Finding(
                "libvirt", State.WORKS, f"{uri}, {_versions(local)}, as {user}"
            )
            yield _virt_type(local, str(conf[options.GROUP].virt_type))
    except (errors.HostUnreachable, errors.AuthenticationFailed) as e:
        remedy_text = _LOCAL_SOCKET.replace("USER", user)
        yield Finding("libvirt", State.FAILED, str(e), remedy_text)


def _versions(host: Host) -> str:
    with host.session("asking its versions") as session:
        numbers = (session.conn.getLibVersion(), session.conn.getVersion())
    libvirt_version, qemu_version = (version(number) for number in numbers)
    return f"libvirt {libvirt_version}, QEMU {qemu_version}"


def version(number: int) -> str:
    """Return libvirt's form of a version, 9000000, as people write it."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _virt_type(host: Host, wanted: str) -> Finding:
    with host.session("asking what it runs") as session:
        root = xml.parse(session.conn.getCapabilities())
    found = {each.get("type") for each in root.iterfind("guest/arch/domain")}
    if wanted in found:
        return Finding("virt_type", State.WORKS, wanted)
    return Finding(
        "virt_type",
        State.FAILED,
        f"{wanted} is not there, but {', '.join(sorted(filter(None, found)))} is",
        "switch virtualization on in the firmware and load the kvm modules, or set "
        "virt_type = qemu for tests",
    )


def _state_path(path: Path) -> Findings:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path, prefix="check."):
        yield Finding("state_path", State.WORKS, f"{path} can be written")


_OPEN = {
    "parked": "`virtmigrate instance migrate` goes on with what was sent; else it "
    "goes when resume_age is over",
    "restored": "`virtmigrate host settle` cleans up at the peer",
}
"""Remedies by a move's newest step."""


def _operations(driver: VirtMigrateDriver) -> Findings:
    left = driver.settle()
    for each in left:
        yield Finding(
            "debt",
            State.FAILED,
            each,
            "`virtmigrate host settle` when the peer is back",
        )
    for operation, uuid, dest, step in driver.open_operations():
        if not any(each.startswith(operation) for each in left):
            yield Finding(
                "open move",
                State.WARNING,
                f"operation {operation}: instance {uuid} to {dest}, {step}",
                _OPEN.get(step, "`virtmigrate instance confirm` or `revert`"),
            )
    if not left and not driver.open_operations():
        yield Finding("open moves", State.WORKS, "none, and nothing is owed")


def _emulators(here: node.Node) -> Findings:
    """Name the guests whose QEMU is not the one that is installed."""
    programs, installed = emulator.running(), emulator.installed(here)
    older = [
        f"{name} ({programs[uuid]})"
        for uuid, name in here.domains.all()
        if uuid in programs and emulator.is_older(programs[uuid], installed)
    ]
    if not older:
        yield Finding(
            "QEMU", State.WORKS, f"no guest runs on one older than {installed}"
        )
        return
    yield Finding(
        "QEMU",
        State.WARNING,
        f"{installed} is installed, and these run on an older one: {', '.join(older)}",
        "move them to another host, and back: `virtmigrate host drain`; or start them "
        "anew",
    )


# Backends

_LOCK_TIMEOUT = 10.0
"""Seconds to wait for another that looks at the same moment."""


def _looker(backend: base.Backend) -> Callable[[], Findings]:
    return lambda: _backend(backend)


def _backend(backend: base.Backend) -> Findings:
    what = f"backend {backend.name}"
    room = units.format_bytes(backend.room())
    yield Finding(what, State.WORKS, f"{backend.disks.path}, {room} free")
    yield from _guarded(f"{what}: locks", lambda: _locks(backend))
    if not backend.disks.is_local():
        yield Finding(
            f"{what}: rights",
            State.WARNING,
            f"{backend.disks.path} of the libvirt host is not seen from here: disks "
            "are read through libvirt, and cannot be made durable or confirmed here",
            "run virtmigrate on the host itself, as a user who may enter the directory",
        )
        return
    yield _reading(backend)
    yield _moving(backend)


def _locks(backend: base.Backend) -> Findings:
    what, can = f"backend {backend.name}: locks", backend.capabilities
    if can.locks is Reach.STORAGE:
        with backend.locks.held(["check"], timeout=_LOCK_TIMEOUT) as lease:
            lease.demand()
        yield Finding(what, State.WORKS, "hosts lock against each other")
    elif can.shared:
        yield Finding(
            what,
            State.WARNING,
            "this host's processes lock against each other, other hosts do not: what "
            "they publish at once goes well for one of them, and the others' work was "
            "for nothing",
            "set lock_url, or lock_files where the file system is fit for it",
        )


def _reading(backend: base.Backend) -> Finding:
    """Make a volume as disks are made and see whether this user may read it."""
    what = f"backend {backend.name}: reading disks"
    with backend.disks.nonce() as name:
        if backend.local_file(backend.disks, name) is not None:
            return Finding(what, State.WORKS, "directly")
    return Finding(
        what,
        State.WARNING,
        "this user may not read the files: they are read through libvirt, slower",
        "set volume_gid to a group of this user and volume_mode to 0640",
    )


def _moving(backend: base.Backend) -> Finding:
    what = f"backend {backend.name}: moving disks"
    places = (backend.incoming.path, backend.disks.path)
    closed = [path for path in places if not os.access(path, os.W_OK | os.X_OK)]
    if not closed:
        return Finding(what, State.WORKS, "from incoming to disks, by rename")
    return Finding(
        what,
        State.WARNING,
        f"this user may not write to {' and '.join(closed)}: disks that arrive stay "
        "in incoming, which libvirt looks through at every upload",
        "set volume_gid to a group of this user and volume_mode to 0660 before the "
        "pools are made, or change the directories' mode",
    )


# Certificates


def _certificates(conf: cfg.ConfigOpts) -> Findings:
    template = str(conf[options.GROUP].peer_uri)
    for file in certificates.used(address.parse(template.replace("{dest}", "peer"))):
        yield _certificate(file)
    for file in certificates.shown():
        yield _certificate(file)


def _certificate(file: Path) -> Finding:
    what = f"certificate {file.name}"
    try:
        found = certificates.read(file)
    except (OSError, ValueError) as e:
        return Finding(
            what,
            State.FAILED,
            f"{file}: {e}",
            "put it there, readable by this user; docs/operators.md says how",
        )
    text = f"{file}: {found.subject}, {found.days_left} days left"
    if found.days_left < 0:
        return Finding(what, State.FAILED, f"{text}: expired", "renew it")
    if found.days_left < certificates.SOON:
        return Finding(what, State.WARNING, text, "renew it soon")
    return Finding(what, State.WORKS, text)


# A peer


def _peer(conf: cfg.ConfigOpts, dest: str) -> Findings:
    what = f"peer {dest}"
    insecure = dest in conf[options.GROUP].allow_insecure_peers
    transfer = options.transfer_uri(conf, dest)
    for uri in dict.fromkeys((options.peer_uri(conf, dest), transfer)):
        with _open(conf, dest, uri, insecure=insecure) as there:
            yield Finding(what, State.WORKS, f"{uri}, {_versions(there)}")
            yield _encryption(there, what, insecure=insecure)
            if uri == transfer:
                yield from _guarded(f"{what}: card", lambda: _card(conf, there))


def _open(conf: cfg.ConfigOpts, dest: str, uri: str, *, insecure: bool) -> Host:
    waits = node.timeouts(conf)
    return Host(uri, name=dest, timeouts=waits, allow_insecure=insecure)


def _encryption(there: Host, what: str, *, insecure: bool) -> Finding:
    with there.session("asking whether it is encrypted") as session:
        encrypted = bool(session.conn.isEncrypted())
        local = address.parse(there.uri).is_local
    if encrypted or local:
        return Finding(
            f"{what}: encryption", State.WORKS, "yes" if encrypted else "local"
        )
    return Finding(
        f"{what}: encryption",
        State.WARNING,
        "none: disks cross the network readable (allow_insecure_peers names it)",
        "use qemu+tls://, and take it off the list",
    )


def _card(conf: cfg.ConfigOpts, there: Host) -> Findings:
    group = conf[options.GROUP]
    box = mailbox.of(there, group.record_grace, busy_timeout=group.busy_timeout)
    far = peers.Peer(there, box)
    card = far.card()
    peers.agree(card)
    what = f"peer {there.name}"
    names = ", ".join(each.name for each in card.backends)
    yield Finding(
        f"{what}: card", State.WORKS, f"release {card.release}, backends {names}"
    )
    for each in card.backends:
        pool = storagepool.Pool(there, each.incoming)
        room = units.format_bytes(pool.room().free)
        yield Finding(f"{what}: room", State.WORKS, f"{room} free in {each.incoming}")
