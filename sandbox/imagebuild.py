# SPDX-License-Identifier: Apache-2.0
"""Building the guest's disk image from Debian packages, without root.

The image boots by itself: a boot record and syslinux, a FAT partition with the
kernel and an initramfs (busybox, the guest agent with its libraries, modules),
and a second partition without a file system for the guest's counter.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandbox import errors, process

MiB = 1024 * 1024
SECTOR = 512
SIZE = 64 * MiB
BOOT_START = 1 * MiB
BOOT_END = 32 * MiB
FAT16_LBA = 0x0E
NO_FILE_SYSTEM = 0xDA
ACTIVE = 0x80

INIT = Path(__file__).with_name("guest-init.sh")
BOOT_RECORD = Path("/usr/lib/syslinux/mbr/mbr.bin")
KERNEL_PACKAGE = "linux-image-cloud-amd64"
OTHER_PACKAGES = ("busybox-static", "qemu-guest-agent")
MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "evdev",
    "button",
)
COMMAND_LINE = (
    "console=ttyS0 quiet loglevel=3 no_timer_check random.trust_cpu=on "
    "mitigations=off cryptomgr.notests tsc=reliable raid=noautodetect"
)
BOOT_CONFIG = f"""DEFAULT guest
PROMPT 0
TIMEOUT 0
LABEL guest
  KERNEL /vmlinuz
  INITRD /initrd
  APPEND {COMMAND_LINE}
"""
NETWORK_TIMEOUT = 240.0


def build(cache: Path) -> Path:
    """Return the image in a cache directory, built if its inputs changed.

    The image appears under its name whole, or not at all.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages = fetch_packages(cache / "packages")
        path = cache / f"guest-{key(packages)}.raw"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                image = assemble(packages, Path(directory))
                image.rename(path)
    return path


def key(packages: Sequence[Path]) -> str:
    """Return a digest of all that the image is made from."""
    digest = hashlib.sha256()
    for source in (INIT, Path(__file__)):
        digest.update(source.read_bytes())
    digest.update(" ".join(package.name for package in packages).encode())
    return digest.hexdigest()[:16]


# Packages


def fetch_packages(directory: Path) -> list[Path]:
    """Return the Debian packages, downloaded unless they are there."""
    found = sorted(directory.glob("*.deb"))
    if len(found) == 1 + len(OTHER_PACKAGES):
        return found
    shutil.rmtree(directory, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        new = Path(name) / "packages"
        new.mkdir()
        download([kernel_package(), *OTHER_PACKAGES], new)
        new.rename(directory)
    return sorted(directory.glob("*.deb"))


def kernel_package() -> str:
    """Return the package of the current kernel, which the named one depends on."""
    shown = process.run(["apt-cache", "depends", KERNEL_PACKAGE]).stdout
    match = re.search(r"Depends: (linux-image-\S+)", shown)
    if match is None:
        raise errors.SandboxError(
            f"apt knows no package {KERNEL_PACKAGE}; run apt-get update"
        )
    return match[1]


def download(packages: Sequence[str], directory: Path) -> None:
    """Download packages with apt. In a sandbox there is no network for that."""
    command = ["env", f"--chdir={directory}", "apt-get", "download", "-qq"]
    try:
        process.run([*command, *packages], timeout=NETWORK_TIMEOUT)
    except errors.SandboxError as error:
        raise errors.SandboxError(
            f"no packages for the guest image (`make image` fetches them): {error}"
        ) from error


# The image


def assemble(packages: Sequence[Path], directory: Path) -> Path:
    """Build the image in an empty directory and return its path."""
    tree = directory / "tree"
    for package in packages:
        process.run(["dpkg-deb", "-x", package, tree])
    root = directory / "root"
    fill_root(tree, root)
    initrd = directory / "initrd"
    pack(root, initrd)
    config = directory / "syslinux.cfg"
    config.write_text(BOOT_CONFIG)
    image = directory / "image"
    partition(image)
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    install_boot_files(
        image, {"vmlinuz": kernel, "initrd": initrd, "syslinux.cfg": config}
    )
    return image


def fill_root(tree: Path, root: Path) -> None:
    """Lay out the initramfs."""
    agent = tree / "usr/sbin/qemu-ga"
    put(tree / "bin/busybox", root / "bin/busybox")
    put(agent, root / "usr/sbin/qemu-ga")
    for library in libraries(agent):
        put(library, root / str(library).lstrip("/"))
    put(INIT, root / "init", mode=0o755)
    shutdown = root / "sbin/shutdown"
    shutdown.parent.mkdir(exist_ok=True)
    shutdown.write_text(
        '#!/bin/sh\nsync\ncase "$*" in *-r*) reboot -f ;; *) poweroff -f ;; esac\n'
    )
    shutdown.chmod(0o755)
    put_modules(tree, root, MODULES)


def put_modules(tree: Path, root: Path, names: Sequence[str]) -> None:
    """Copy kernel modules with those that they need, and the order to load them in."""
    modules = list(module_files(tree, names))
    for path in modules:
        put(path, root / "modules" / path.name)
    order = "".join(f"{path.name}\n" for path in modules)
    (root / "modules/order").write_text(order)


def libraries(program: Path) -> list[Path]:
    """Return the shared libraries that a program needs, from this machine."""
    listed = process.run(["ldd", program]).stdout
    if "not found" in listed:
        raise errors.SandboxError(f"libraries of {program.name} are missing: {listed}")
    return [Path(found) for found in re.findall(r"(/\S+) \(0x", listed)]


def module_files(tree: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield the kernel modules in the order in which they must be loaded."""
    found = {path.stem: path for path in (tree / "lib/modules").rglob("*.ko")}
    files = {name.replace("-", "_"): path for name, path in found.items()}
    seen: set[str] = set()

    def visit(name: str) -> Iterator[Path]:
        if name not in seen:
            seen.add(name)
            for needed in depends(files[name]):
                yield from visit(needed)
            yield files[name]

    for module in names:
        yield from visit(module)


def depends(module: Path) -> list[str]:
    """Return the modules that one needs, as its file says."""
    match = re.search(rb"\0depends=([\w,-]*)\0", module.read_bytes())
    names = match[1].decode().replace("-", "_") if match else ""
    return [name for name in names.split(",") if name]


def put(source: Path, target: Path, mode: int | None = None) -> None:
    """Copy a file, making its directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    if mode is not None:
        target.chmod(mode)


def pack(root: Path, target: Path) -> None:
    """Write a directory as an initramfs."""
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    options = ["--create", "--format=newc", "--quiet", "--owner=0:0"]
    process.run(
        ["cpio", *options, f"--directory={root}", f"--file={target}"], stdin=names
    )
    process.run(["gzip", "-n", "-6", target])
    target.with_name(f"{target.name}.gz").rename(target)


def partition(image: Path) -> None:
    """Write an empty disk with a boot record and two partitions."""
    boot = BOOT_RECORD.read_bytes()[:440].ljust(440, b"\0")
    entries = entry(ACTIVE, FAT16_LBA, BOOT_START, BOOT_END)
    entries += entry(0, NO_FILE_SYSTEM, BOOT_END, SIZE)
    with image.open("wb") as output:
        output.truncate(SIZE)
        output.write(boot + b"virt\0\0" + entries.ljust(64, b"\0") + b"\x55\xaa")


def entry(status: int, kind: int, start: int, end: int) -> bytes:
    """Return one line of a partition table; only the LBA fields are used."""
    unused = b"\xfe\xff\xff"
    first, count = start // SECTOR, (end - start) // SECTOR
    return struct.pack("<B3sB3sII", status, unused, kind, unused, first, count)


def install_boot_files(image: Path, files: dict[str, Path]) -> None:
    """Make the FAT partition bootable, with files in it."""
    sectors = str((BOOT_END - BOOT_START) // 1024)
    offset = str(BOOT_START // SECTOR)
    make = ["mkfs.fat", "-F", "16", "--offset", offset, "--invariant"]
    process.run([*make, "-h", offset, image, sectors])
    for name, source in files.items():
        process.run(["mcopy", "-i", f"{image}@@{BOOT_START}", source, f"::{name}"])
    process.run(["syslinux", "--install", "--offset", str(BOOT_START), image])
