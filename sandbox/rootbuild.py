# SPDX-License-Identifier: Apache-2.0
"""Building what a machine boots from: kernel, initramfs, and a root file system.

The root is Debian packages, unpacked and not configured, with the kernel's
modules; accounts and configuration come from the sandbox when it boots.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import shutil
import tempfile
from pathlib import Path

from sandbox import errors, imagebuild, process

GiB = 1024**3
SIZE = 2 * GiB  # sparse
RELEASE = "bookworm"
INIT = Path(__file__).with_name("machine-init.sh")
BASE = (
    "base-files bash coreutils dash findutils grep hostname libc-bin mount procps sed "
    "util-linux iproute2 kmod udev qemu-guest-agent"
)
LIBVIRT = (
    "libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu qemu-system-x86 "
    "qemu-utils lvm2 thin-provisioning-tools"
)
OURS = "python3"  # runs our package, from the checkout
PACKAGES = f"{BASE} {LIBVIRT} {OURS}".split()
MODULES = ("virtio_pci", "virtio_blk")
UNUSED = ("doc", "man", "locale", "info", "lintian")
BOOT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
while read -r name; do insmod "/modules/$name"; done </modules/order
mount -t devtmpfs dev /dev
mount -t ext4 /dev/vda /root
mount --move /dev /root/dev
mount -t tmpfs run /root/run
cp /machine-init /root/run/
exec switch_root /root /run/machine-init
"""
NETWORK_TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class Root:
    """What a machine boots from."""

    kernel: Path
    initrd: Path
    disk: Path  # a raw disk with an ext4 file system; not to be written to


def build(cache: Path, guest_cache: Path) -> Root:
    """Return it from a cache directory, built if its inputs changed.

    Arguments:
      guest_cache: where the guest image's packages are, or come to lie.

    Each file appears under its name whole, or not at all.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        guest_cache.mkdir(parents=True, exist_ok=True)
        packages = imagebuild.fetch_packages(guest_cache / "packages")
        name = key(packages)
        root = Root(
            cache / f"vmlinuz-{name}",
            cache / f"initrd-{name}-{digest(INIT.read_bytes())}",
            cache / f"root-{name}.raw",
        )
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            fill(root, packages, Path(directory))
    return root


def key(packages: list[Path]) -> str:
    """Return a digest of what the root is made from."""
    names = " ".join(package.name for package in packages)
    return digest(Path(__file__).read_bytes(), names.encode())


def digest(*parts: bytes) -> str:
    """Return a short digest."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def fill(root: Root, packages: list[Path], directory: Path) -> None:
    """Build what is missing, in an empty directory."""
    if root.kernel.exists() and root.initrd.exists() and root.disk.exists():
        return
    tree = directory / "tree"
    for package in packages:
        process.run(["dpkg-deb", "-x", package, tree])
    if not root.disk.exists():
        make_disk(tree, directory).rename(root.disk)
    make_initrd(tree, directory).rename(root.initrd)
    next((tree / "boot").glob("vmlinuz-*")).rename(root.kernel)


def make_disk(tree: Path, directory: Path) -> Path:
    """Return a new disk with the root file system.

    Arguments:
      tree: the kernel's package, unpacked.
    """
    root = directory / "root"
    unpack_packages(root)
    modules = next((tree / "lib/modules").iterdir())
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name)
    process.run(["chroot", root, "depmod", modules.name])
    process.run(["ldconfig", "-r", root])
    compile_python(root)
    disk = directory / "disk"
    with disk.open("wb") as output:
        output.truncate(SIZE)
    options = ["-q", "-d", str(root), "-m", "0", "-E", "lazy_itable_init=1"]
    process.run(["mkfs.ext4", *options, disk], timeout=120)
    return disk


def compile_python(root: Path) -> None:
    """Do what the packages' configuration would: inside, it takes 5 s at each start."""
    (library,) = (root / "usr/lib").glob("python3.*")
    command = ["-m", "compileall", "-q", "-j", "0", "-x", "lib2to3|pydoc_data"]
    inside = f"/{library.relative_to(root)}"
    process.run(["chroot", root, "python3", *command, inside], timeout=60)


def unpack_packages(root: Path) -> None:
    """Unpack the packages. In a sandbox there is no network for that."""
    links = 'cd "$1" && mkdir usr && for d in bin sbin lib lib64; do'
    links += " mkdir usr/$d && ln -s usr/$d $d; done"
    skipped = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNUSED]
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=extract"]
    command += [f"--include={','.join(PACKAGES)}", f"--setup-hook={links}", *skipped]
    try:
        process.run([*command, RELEASE, root], timeout=NETWORK_TIMEOUT)
    except errors.SandboxError as error:
        raise errors.SandboxError(
            f"no root for machines (`make machine-image` builds it): {error}"
        ) from error


def make_initrd(tree: Path, directory: Path) -> Path:
    """Return a new initramfs that mounts the root and starts our init in it."""
    root = directory / "initramfs"
    for name in ("dev", "root"):
        (root / name).mkdir(parents=True)
    imagebuild.put(tree / "bin/busybox", root / "bin/busybox")
    imagebuild.put(INIT, root / "machine-init", mode=0o755)
    (root / "init").write_text(BOOT)
    (root / "init").chmod(0o755)
    imagebuild.put_modules(tree, root, MODULES)
    initrd = directory / "initrd"
    imagebuild.pack(root, initrd)
    return initrd
