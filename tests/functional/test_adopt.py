# SPDX-License-Identifier: Apache-2.0
"""Adopting what libvirt's other users made, and moving it."""

import json
import subprocess
import sys
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import World, digest
from tests.functional.test_cli import CANCELLED, FAILED, Command
from virtmigrate import domainxml
from virtmigrate.units import MiB

METADATA = f"{{{domainxml.METADATA_URI}}}"


class Foreign:
    """Files and domains on the first host that virtmigrate knows nothing of."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.directory = world.tmp / "foreign"
        self.directory.mkdir()

    def raw(self, name: str, size: int = 8 * MiB) -> Path:
        path = self.directory / name
        self.world.image(size).rename(path)
        return path

    def qcow2(self, name: str, base: Path | None = None) -> Path:
        path = self.directory / name
        backing = ["-b", str(base), "-F", "raw"] if base else []
        qemu_img("create", "-q", "-f", "qcow2", *backing, str(path), "8M")
        write = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", str(path)]
        subprocess.run(write, check=True, capture_output=True, timeout=30)
        return path

    def define(
        self, *disks: str, metadata: str = "", os: str = "", start: bool = False
    ) -> Any:
        instance = types.SimpleNamespace(
            uuid=str(uuid.uuid4()), name=f"foreign-{uuid.uuid4().hex[:6]}"
        )
        xml = f"""<domain type='qemu'>
          <name>{instance.name}</name><uuid>{instance.uuid}</uuid>
          <metadata>{metadata}</metadata>
          <memory unit='MiB'>64</memory>
          <os><type arch='x86_64' machine='q35'>hvm</type>{os}</os>
          <features><acpi/></features>
          <devices>{"".join(disks)}</devices>
        </domain>"""
        with self.world.a.libvirt() as conn:
            domain = conn.defineXML(xml)
            if start:
                domain.create()
        return instance

    def xml(self, instance: Any, flags: int = 2) -> str:
        with self.world.a.libvirt() as conn:
            return str(conn.lookupByUUIDString(instance.uuid).XMLDesc(flags))

    def pools(self) -> set[str]:
        with self.world.a.libvirt() as conn:
            return {pool.name() for pool in conn.listAllStoragePools(0)}


def disk(target: str, path: Path, fmt: str, backing: str = "") -> str:
    return f"""<disk type='file' device='disk'>
      <driver name='qemu' type='{fmt}'/>
      <source file='{path}'/>{backing}
      <target dev='{target}' bus='virtio'/>
    </disk>"""


def over(path: Path) -> str:
    return f"""<backingStore type='file'><format type='raw'/>
      <source file='{path}'/><backingStore/></backingStore>"""


def qemu_img(*words: str) -> None:
    subprocess.run(["qemu-img", *words], check=True, timeout=60)


def flattened(world: World, layers: list[tuple[str, Path]], name: str) -> str:
    """Return the digest of what the guest sees, by named formats and files."""
    spec: dict[str, Any] | None = None
    for fmt, path in reversed(layers):
        below = {"backing": spec} if fmt == "qcow2" else {}
        spec = {
            "driver": fmt,
            "file": {"driver": "file", "filename": str(path)},
            **below,
        }
    out = world.tmp / name
    qemu_img("convert", "-O", "raw", f"json:{json.dumps(spec)}", str(out))
    return digest(out)


@pytest.fixture
def foreign(world: World) -> Iterator[Foreign]:
    yield Foreign(world)


@pytest.fixture
def command(world: World, tmp_path: Path) -> Iterator[Command]:
    yield Command(world, tmp_path / "etc")


def test_hostile_raw_disk_is_adopted_and_moved_as_raw(
    world: World, foreign: Foreign, command: Command
) -> None:
    path = foreign.directory / "hostile.img"
    header = ["-b", "/etc/passwd", "-F", "raw", "-u"]
    qemu_img("create", "-q", "-f", "qcow2", *header, str(path), "1T")
    with path.open("r+b") as file:
        file.truncate(8 * MiB)
    before = digest(path)
    instance = foreign.define(disk("vda", path, "raw"))

    (row,) = command.json("instance", "adopt", instance.name)
    assert (row["format"], row["size"], row["role"]) == ("raw", 8 * MiB, "root")
    assert row["pool"].startswith("virtmigrate-adopted-")
    command.run("instance", "migrate", instance.uuid, "beta")
    assert world.b.state_of(instance) == "shutoff"
    moved = world.b.disk(instance)
    assert digest(moved) == before
    with world.b.libvirt() as conn:
        text = conn.lookupByUUIDString(instance.uuid).XMLDesc(2)
    (found,) = domainxml.disks(text)
    assert [layer.fmt for layer in found.chain] == [domainxml.DiskFormat.RAW]
    command.run("instance", "confirm", instance.uuid)
    assert not path.exists()


@pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])
def test_chain_is_adopted_and_moved(
    world: World, foreign: Foreign, command: Command, private: bool
) -> None:
    base = foreign.raw("base.raw")
    top = foreign.qcow2("top.qcow2", base)
    before = flattened(world, [("qcow2", top), ("raw", base)], "before")
    instance = foreign.define(disk("vda", top, "qcow2", over(base)))

    words = ["instance", "adopt", instance.uuid, "--size", "vda=8M"]
    rows = command.json(*words, *(["--private-chain"] if private else []))
    owner = instance.uuid if private else "nobody"
    assert [(row["role"], row["owner"]) for row in rows] == [
        ("root", instance.uuid),
        ("layer", owner),
    ]
    command.run("instance", "migrate", instance.uuid, "beta")
    with world.b.libvirt() as conn:
        text = conn.lookupByUUIDString(instance.uuid).XMLDesc(2)
    (found,) = domainxml.disks(text)
    assert found.terminated and not found.problems
    layers = [(layer.fmt.value, Path(layer.source)) for layer in found.layers()]
    assert [fmt for fmt, _ in layers] == ["qcow2", "raw"]
    assert flattened(world, layers, "after") == before
    command.run("instance", "confirm", instance.uuid)
    assert (top.exists(), base.exists()) == (False, not private)


def test_running_domain_tells_its_size_and_keeps_running(
    world: World, foreign: Foreign, command: Command
) -> None:
    base = foreign.raw("base.raw")
    top = foreign.qcow2("top.qcow2", base)
    instance = foreign.define(disk("vda", top, "qcow2", over(base)), start=True)
    rows = command.json("instance", "adopt", instance.uuid)
    assert rows[0]["size"] == 8 * MiB
    assert world.a.state_of(instance) == "running"
    for flags in (0, 2):
        values = domainxml.metadata_of(foreign.xml(instance, flags))
        assert values and values["owner"] == "virtmigrate"
    command.run("instance", "migrate", instance.uuid, "beta")
    assert world.b.state_of(instance) == "running"


def test_all_that_is_open_is_listed_at_once(
    world: World, foreign: Foreign, command: Command
) -> None:
    base = foreign.raw("base.raw")
    one, two = foreign.qcow2("one.qcow2", base), foreign.qcow2("two.qcow2")
    other = foreign.directory / "other"
    other.mkdir()
    clash = other / "one.qcow2"
    clash.touch()
    device = "<disk type='block' device='disk'><driver name='qemu' type='raw'/>"
    device += "<source dev='/dev/loop7'/><target dev='vdd' bus='virtio'/></disk>"
    instance = foreign.define(
        disk("vda", one, "qcow2"),
        disk("vdb", two, "qcow2"),
        disk("vdc", clash, "raw"),
        device,
    )
    before, pools, files = foreign.xml(instance), foreign.pools(), world.a.files()
    listed = command.run("instance", "adopt", instance.uuid, code=FAILED).stderr
    assert "nothing was touched" in listed
    for text in (
        f"whether {one} has a backing layer",
        f"whether {two} has a backing layer",
        "/dev/loop7 is no file",
    ):
        assert text in listed
    assert (foreign.xml(instance), foreign.pools()) == (before, pools)

    words = ["--disk", f"vda=qcow2:{one},raw:{base}", "--disk", f"vdb=raw:{two}"]
    refused = command.run("instance", "adopt", instance.uuid, *words, code=FAILED)
    for text in (
        "one file name",
        "--size vda=BYTES",
        f"--disk says {two} as raw, and the XML {two} as qcow2",
    ):
        assert text in refused.stderr
    assert world.a.files() == files


def test_operator_gives_the_chain(
    world: World, foreign: Foreign, command: Command
) -> None:
    base = foreign.raw("base.raw")
    top = foreign.qcow2("top.qcow2", base)
    instance = foreign.define(disk("vda", top, "qcow2"))
    words = ["instance", "adopt", instance.uuid, "--size", "vda=8M"]
    words += ["--disk", f"vda=qcow2:{top},raw:{base}"]
    before, pools, files = foreign.xml(instance), foreign.pools(), world.a.files()
    rows = command.json(*words, "--dry-run")
    assert [row["size"] for row in rows] == [8 * MiB, None]
    assert foreign.xml(instance) == before
    assert (foreign.pools(), world.a.files()) == (pools, files)

    assert [row["size"] for row in command.json(*words)] == [8 * MiB, 8 * MiB]
    (found,) = domainxml.disks(foreign.xml(instance))
    assert [layer.source for layer in found.layers()] == [str(top), str(base)]
    again = command.run(*words, code=FAILED)
    assert "nothing to adopt" in again.stderr


def test_killed_adoption_runs_again(
    world: World, foreign: Foreign, command: Command
) -> None:
    path = foreign.raw("disk.raw")
    instance = foreign.define(disk("vda", path, "raw"))
    script = (
        "import os, sys\n"
        "from virtmigrate.adopt import runner\n"
        "from virtmigrate.cli import main\n"
        "runner.Run._define = lambda self: os._exit(4)\n"
        "main.main(sys.argv[1:])"
    )
    words = command.argv("instance", "adopt", instance.uuid)[3:]
    killed = subprocess.run([sys.executable, "-c", script, *words], timeout=60)
    assert killed.returncode == CANCELLED
    assert any(name.startswith("records/disk.raw.rec.") for name in world.a.files())
    (row,) = command.json("instance", "list")
    assert row["state"] == "no record"
    command.run("instance", "adopt", instance.uuid)
    (row,) = command.json("instance", "list")
    assert (row["state"], row["owner"]) == ("here", "virtmigrate")


def test_failure_undoes_all(world: World, foreign: Foreign, command: Command) -> None:
    path = foreign.raw("disk.raw")
    instance = foreign.define(disk("vda", path, "raw"), disk("vdb", path, "raw"))
    refused = command.run("instance", "adopt", instance.uuid, code=FAILED)
    assert "vdb" in refused.stderr
    gone = foreign.directory / "gone.raw"
    instance = foreign.define(disk("vda", gone, "raw"))
    pools, files = foreign.pools(), world.a.files()
    refused = command.run("instance", "adopt", instance.uuid, code=FAILED)
    assert f"there is no file {gone}" in refused.stderr
    assert (foreign.pools(), world.a.files()) == (pools, files)
    mode = foreign.directory.stat().st_mode
    assert mode & 0o777 == 0o755


def test_what_another_domain_uses_is_refused(
    foreign: Foreign, command: Command
) -> None:
    base = foreign.raw("base.raw")
    first = foreign.define(
        disk("vda", foreign.qcow2("first.qcow2", base), "qcow2", over(base))
    )
    second = foreign.define(
        disk("vda", foreign.qcow2("second.qcow2", base), "qcow2", over(base))
    )
    size = ["--size", "vda=8M"]
    words = ["instance", "adopt", first.uuid, *size]
    refused = command.run(*words, "--private-chain", code=FAILED)
    assert f"domain {second.name} uses {base}, too" in refused.stderr
    command.run(*words)
    command.run("instance", "adopt", second.uuid, *size)


def test_cd_image_is_kept_and_nova_is_asked(
    world: World, foreign: Foreign, command: Command
) -> None:
    path, iso = foreign.raw("disk.raw"), foreign.raw("tools.iso", 2 * MiB)
    drive = (
        f"<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
        f"<source file='{iso}'/><target dev='sda' bus='sata'/><readonly/></disk>"
        "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>"
    )
    nova = (
        "<nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>"
        "<nova:name>x</nova:name></nova:instance>"
    )
    instance = foreign.define(disk("vda", path, "raw"), drive, metadata=nova)
    words = ["instance", "adopt", instance.uuid]
    assert "--owner nova" in command.run(*words, code=FAILED).stderr
    rows = command.json(*words, "--owner", "nova")
    assert [(row["disk"], row["role"], row["owner"]) for row in rows] == [
        ("vda", "root", instance.uuid),
        ("sda", "config", "nobody"),
    ]
    assert "<nova:name>" in foreign.xml(instance)
    assert METADATA.strip("{}") in foreign.xml(instance)
    move = ["instance", "migrate", instance.uuid, "beta"]
    assert "openstack server" in command.run(*move, code=FAILED).stderr
    command.run(*move, "--unmanaged-override")
    command.run("instance", "confirm", instance.uuid, "--unmanaged-override")
    assert (path.exists(), iso.exists()) == (False, True)


def test_firmware_variables_are_adopted_and_moved(
    world: World, foreign: Foreign, command: Command
) -> None:
    path, code = foreign.raw("disk.raw"), foreign.raw("code.fd", 2 * MiB)
    nvram = foreign.raw("guest_VARS.fd", 2 * MiB)
    before = digest(nvram)
    instance = foreign.define(
        disk("vda", path, "raw"),
        os=f"<loader readonly='yes' type='pflash'>{code}</loader>"
        f"<nvram>{nvram}</nvram>",
    )
    rows = command.json("instance", "adopt", instance.uuid)
    assert [(row["disk"], row["role"], row["size"]) for row in rows] == [
        ("vda", "root", 8 * MiB),
        ("nvram", "nvram", 2 * MiB),
    ]
    command.run("instance", "migrate", instance.uuid, "beta")
    with world.b.libvirt() as conn:
        text = conn.lookupByUUIDString(instance.uuid).XMLDesc(2)
    found = domainxml.firmware(text)
    assert found and found.loader == str(code) and found.nvram
    assert digest(Path(found.nvram)) == before
    back = command.json("instance", "revert", instance.uuid)
    assert back["state"] == "off"
    assert digest(nvram) == before and path.exists()
