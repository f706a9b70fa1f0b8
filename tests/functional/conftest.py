# SPDX-License-Identifier: Apache-2.0
"""Two real libvirt hosts, and a fresh world on them for each test."""

import collections
import contextlib
import hashlib
import json
import random
import re
import shutil
import subprocess
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import libvirt
import pytest
from oslo_config import cfg

from sandbox import Host, Machine, Sandbox
from sandbox.ceph import Ceph
from tests.functional import costs, places
from virtmigrate import conf as options
from virtmigrate import domainxml
from virtmigrate.backends import layout
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.progress import Progress
from virtmigrate.units import MiB

SEED = 20
"""Chooses the share."""


def _kind_of(test: str) -> str | None:
    """Return the kind of backend that a test of the contract is run on."""
    if "test_contract.py" not in test:
        return None
    given = test.rpartition("[")[2].rstrip("]")
    fitting = [k for k in places.PLACES if given == k or given.startswith(f"{k}-")]
    return max(fitting, key=len, default=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run the long counts, too, and all kills"
    )
    parser.addoption(
        "--require-backends",
        default="",
        help="kinds of backends that may not be left out where something is missing",
    )
    parser.addoption(
        "--part",
        default="0/1",
        help="of the kills of --full take those that leave N when divided by M: N/M",
    )

    parser.addoption(
        "--shard",
        default="1/1",
        help="of the modules take the Nth of M parts, about as long: N/M",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say of each kind of backend how many promises of the contract it keeps."""
    counts: dict[str, collections.Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            kind = _kind_of(report.nodeid)
            if kind and report.when in ("call", "setup"):
                counts.setdefault(kind, collections.Counter())[outcome] += 1
    for kind, count in sorted(counts.items()):
        broken = count["failed"] + count["error"]
        text = f"backend {kind}: {count['passed']} promises kept, {broken} broken"
        terminalreporter.write_line(text)
    _write_costs(terminalreporter)


def _write_costs(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how long the tests of each module took: where time can be saved."""
    spent: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                module = Path(report.location[0]).name
                spent[module] += round(report.duration * 1000)
    for module, cost in spent.most_common(50):
        terminalreporter.write_line(f"{cost / 1000:8.1f} s {module}")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Of what needs a machine take nothing unless that is required; of the contract on
    slow kinds take a seeded share, unless --full."""
    if "lvm" not in config.getoption("--require-backends").split(","):
        _drop(config, items, [item for item in items if _is_on_lvm(item.nodeid)])
    for item in filter(lambda item: _is_on_lvm(item.nodeid), items):
        # The first one also waits for the machine.
        item.add_marker(pytest.mark.timeout(600))
    if not config.getoption("--full"):
        for pattern, count in places.SHARE.items():
            found = [item for item in items if re.search(pattern, item.nodeid)]
            _sample(config, items, found, count)
    number, of = map(int, config.getoption("--shard").split("/"))
    ours = _shards([item.path.name for item in items], of)[number - 1]
    _drop(config, items, [item for item in items if item.path.name not in ours])


def _shards(modules: list[str], count: int) -> list[set[str]]:
    """Divide modules, each as often in the list as it has tests, into even parts."""
    shards: list[set[str]] = [set() for _ in range(count)]
    tests = collections.Counter(modules)
    seconds = {module: costs.SECONDS.get(module, tests[module]) for module in tests}
    loads = [0] * count
    for module in sorted(seconds, key=lambda each: (-seconds[each], each)):
        lightest = loads.index(min(loads))
        shards[lightest].add(module)
        loads[lightest] += seconds[module]
    return shards


def _sample(
    config: pytest.Config,
    items: list[pytest.Item],
    found: list[pytest.Item],
    count: int,
) -> None:
    few = random.Random(SEED).sample(found, min(count, len(found)))
    _drop(config, items, [item for item in found if item not in few])


def _drop(
    config: pytest.Config, items: list[pytest.Item], dropped: list[pytest.Item]
) -> None:
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


def _is_on_lvm(test: str) -> bool:
    return re.search(r"test_lvm\.py|test_sandbox_machine\.py|\[lvm", test) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out kinds that this machine cannot have, unless they are required."""
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        kinds = value if isinstance(value, tuple) else (value,)
        for kind in kinds:
            if isinstance(kind, str) and kind in places.NEEDS:
                _demand_kind(item, kind)


def _demand_kind(item: pytest.Item, kind: str) -> None:
    lacking = [name for name in places.NEEDS[kind] if shutil.which(name) is None]
    if lacking:
        reason = f"backends of kind {kind} need {', '.join(lacking)}: run tools/setup"
        if kind in item.config.getoption("--require-backends").split(","):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def box() -> Iterator[Sandbox]:
    yield Sandbox.attach()


@pytest.fixture(scope="session")
def cluster(box: Sandbox) -> Iterator[Callable[[], Ceph]]:
    """Returns the Ceph cluster, started when somebody needs it first."""
    started: list[Ceph] = []

    def start() -> Ceph:
        if not started:
            started.append(box.add_ceph())
        return started[0]

    yield start
    if started:
        box.remove_ceph(started[0].name)


@pytest.fixture(scope="session")
def machine(box: Sandbox) -> Iterator[Callable[[], Machine]]:
    """Returns the host with real LVM, started when somebody needs it first.

    Its volume group belongs to nobody: the sandbox's pool of it is taken away.
    """
    started: list[Machine] = []

    def start() -> Machine:
        if not started:
            started.append(box.add_machine("gamma"))
            places.free_group(started[0])
        return started[0]

    yield start
    if started:
        box.remove_machine(started[0].name)


@pytest.fixture(scope="session")
def pair(box: Sandbox) -> Iterator[tuple[Host, Host]]:
    """Two hosts; libvirtd of the first also listens on plain TCP."""
    alpha, beta = box.add_host("alpha"), box.add_host("beta", tcp=True)
    yield alpha, beta
    box.remove_host("alpha")
    box.remove_host("beta")


@pytest.fixture(autouse=True)
def nonces_are_old_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process's nonce goes with the next settle(), not after an hour."""
    monkeypatch.setattr("virtmigrate.storagepool._NONCE_AGE", -1.0)


@pytest.fixture
def world(pair: tuple[Host, Host], box: Sandbox, tmp_path: Path) -> Iterator["World"]:
    created = World(pair, box, tmp_path)
    try:
        yield created
    finally:
        created.close()


class Node:
    """One host with a driver of its own."""

    def __init__(self, host: Host, state: Path, **backend: object) -> None:
        self.host = host
        self.backend = backend
        self.state = state
        self.overrides: dict[str, object] = {}
        self.path = host.storage / "vm"
        self.progress: Progress = Progress()
        self.driver: VirtMigrateDriver = None  # type: ignore[assignment]
        self.new_driver()

    def new_driver(self) -> VirtMigrateDriver:
        """A driver as a restarted process would have it; the old one is gone."""
        if self.driver is not None:
            self.driver.cleanup_host(self.host.name)
        driver = VirtMigrateDriver(
            object(), conf=self.conf(), progress=lambda: self.progress
        )
        driver.init_host(self.host.name)
        self.driver = driver
        return driver

    def conf(self) -> cfg.ConfigOpts:
        conf = cfg.ConfigOpts()
        conf(args=[], default_config_files=[])
        options.register(conf)
        values: dict[str, object] = {
            "uri": self.host.local_uri,
            "address": self.host.name,
            "virt_type": "qemu",
            "state_path": str(self.state),
            "peer_uri": self.peer_uri(),
            "call_timeout": 15.0,
            "connect_timeout": 5.0,
            "record_grace": 2.0,
            "settle_interval": 0.0,
            # Failures are what is tested: nothing is tried again or kept.
            "retry_timeout": 0.0,
            "resume_age": 0,
            # What a test does to a copy, it does to the one that counts.
            "send_ahead": False,
            "receiver_timeout": 3.0,
            **self.overrides,
        }
        for name, value in values.items():
            conf.set_override(name, value, options.GROUP)
        for name, value in {"path": str(self.path), **self.backend}.items():
            conf.set_override(name, value, "local")
        return conf

    def peer_uri(self) -> str:
        return self.host.uri.replace(self.host.name, "{dest}", 1)

    @contextlib.contextmanager
    def libvirt(self) -> Iterator["libvirt.virConnect"]:
        conn = libvirt.open(self.host.local_uri)
        try:
            yield conn
        finally:
            conn.close()

    def files(self) -> list[str]:
        """All files of the host's storage but the card and layouts."""
        always = ("host", layout.NAME)
        return sorted(
            str(path.relative_to(self.path))
            for path in self.path.rglob("*")
            if path.is_file() and path.name.partition(".rec.")[0] not in always
        )

    def state_of(self, instance: Any) -> str | None:
        """running, paused or shutoff; None without a domain. Asked of libvirt."""
        names = {1: "running", 3: "paused", 5: "shutoff"}
        with self.libvirt() as conn:
            try:
                domain = conn.lookupByUUIDString(instance.uuid)
            except libvirt.libvirtError:
                return None
            return names.get(domain.state()[0], "?")

    def xml(self, instance: Any) -> str:
        with self.libvirt() as conn:
            return str(conn.lookupByUUIDString(instance.uuid).XMLDesc(0))

    def disk(self, instance: Any, target: str = "vda") -> Path:
        """The file that libvirt says the disk is."""
        with self.libvirt() as conn:
            xml = conn.lookupByUUIDString(instance.uuid).XMLDesc(2)
        for disk in domainxml.disks(xml):
            if disk.target == target:
                return Path(disk.chain[0].source)
        raise KeyError(target)

    def clear(self) -> None:
        """Remove all domains and pools, and the files."""
        with contextlib.suppress(Exception):
            self.driver.cleanup_host(self.host.name)
        with self.libvirt() as conn:
            for domain in conn.listAllDomains(0):
                if domain.isActive():
                    domain.destroy()
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)
            for pool in conn.listAllStoragePools(0):
                if pool.isActive():
                    pool.destroy()
                pool.undefine()
        shutil.rmtree(self.path, ignore_errors=True)


class World:
    """Two hosts, `a` and `b`, with fresh drivers."""

    def __init__(
        self, pair: tuple[Host, Host], box: Sandbox, tmp: Path, **backend: object
    ) -> None:
        self.box = box
        self.tmp = tmp
        self.a = Node(pair[0], tmp / "a", **backend)
        self.b = Node(pair[1], tmp / "b", **backend)

    def image(self, size: int = 8 * MiB, seed: int = 1) -> Path:
        """A raw image with data at both ends and a hole between."""
        path = self.tmp / f"image-{size}-{seed}"
        block = hashlib.shake_128(str(seed).encode()).digest(MiB + 4096)
        with path.open("wb") as file:
            file.truncate(size)
            file.write(block)
            file.seek(size - 4096)
            file.write(block[:4096])
        return path

    def instance(self, **flavor: int) -> Any:
        return types.SimpleNamespace(
            uuid=str(uuid.uuid4()),
            name=f"guest-{uuid.uuid4().hex[:6]}",
            flavor=self.flavor(**flavor),
        )

    def flavor(self, **values: int) -> Any:
        defaults = {"memory_mb": 64, "vcpus": 1, "root_gb": 0, "ephemeral_gb": 0}
        return types.SimpleNamespace(**{**defaults, **values})

    def spawn(self, node: Node, image: Path | None = None, **flavor: int) -> Any:
        instance = self.instance(**flavor)
        meta = {"path": str(image or self.image()), "disk_format": "raw"}
        node.driver.spawn(None, instance, meta)
        return instance

    def migrate(self, instance: Any, **flavor: int) -> str:
        """Move from a to b, up to the hand-over, and return the ticket."""
        wanted = self.flavor(**flavor) if flavor else None
        return self.a.driver.migrate_disk_and_power_off(
            None, instance, self.b.host.name, wanted, None
        )

    def finish(self, instance: Any, ticket: str, **changes: Any) -> None:
        changes.setdefault("network_info", None)
        self.b.driver.finish_migration(None, None, instance, ticket, **changes)

    def confirm(self, instance: Any) -> None:
        self.a.driver.confirm_migration(None, None, instance, None)

    def revert(self, instance: Any) -> None:
        """Give back at b and take back at a, as a compute service does."""
        self.b.driver.destroy(None, instance, None)
        self.a.driver.finish_revert_migration(None, instance)

    def expect_one(self, instance: Any, on: Node, state: str = "running") -> None:
        """Exactly one usable instance, and no file that nobody owns."""
        for node in (self.a, self.b):
            node.driver.settle()
        for node in (self.a, self.b):
            assert node.driver.settle() == []
            assert node.state_of(instance) == (state if node is on else None)
            assert node.driver.open_operations() == []
            if node is on or self.a.path != self.b.path:
                self._expect_owned(node, instance if node is on else None)

    def _expect_owned(self, node: Node, instance: Any | None) -> None:
        areas = ("disks", "incoming", "records", "instances")
        found: dict[str, list[str]] = {area: [] for area in areas}
        for name in node.files():
            area, _, file = name.partition("/")
            if file.startswith("nonce."):
                # A proof that was killed; removed when it is an hour old.
                continue
            if area in found:
                found[area].append(file.partition(".rec.")[0])
            else:
                raise AssertionError(f"{node.host.name} keeps {name}")
        used = set()
        if instance is not None:
            record = node.driver.node.entitled(instance.uuid)
            for ref in record.disks:
                chain = node.driver.node.backend(ref.backend).chain(ref.volume)
                used |= {volume.name for volume in chain}
        assert set(found["disks"] + found["incoming"]) == used
        assert set(found["records"]) == used
        assert set(found["instances"]) == ({instance.uuid} if instance else set())

    def share(self) -> None:
        """Let both hosts use one directory, by the same pools."""
        self.close()
        for node in (self.a, self.b):
            node.path = self.tmp / "shared"
            node.new_driver()

    def read(self, node: Node, instance: Any, target: str = "vda") -> bytes:
        """What the guest would read, by qemu-img and the records' formats."""
        record = node.driver.node.entitled(instance.uuid)
        (ref,) = (ref for ref in record.disks if ref.target == target)
        spec = guest_view(node.driver.node.backend(ref.backend).layers(ref.volume))
        argv = [
            "qemu-img",
            "dd",
            "-U",
            "-O",
            "raw",
            "bs=1M",
            f"if={spec}",
        ]
        out = self.tmp / "guest-view"
        subprocess.run([*argv, f"of={out}"], check=True, timeout=60)
        return out.read_bytes()

    def close(self) -> None:
        for node in (self.a, self.b):
            node.clear()


def guest_view(layers: Sequence[domainxml.Layer]) -> str:
    """Return what qemu-img calls an image of these files, which it does not probe."""
    spec: dict[str, Any] | None = None
    for layer in reversed(layers):
        below = {"backing": spec} if layer.fmt.value == "qcow2" else {}
        file = {"driver": "file", "filename": layer.source}
        spec = {"driver": layer.fmt.value, "file": file, **below}
    return f"json:{json.dumps(spec)}"


def digest(path: Path) -> str:
    """SHA-256 of a file: not the digest that the package uses."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
