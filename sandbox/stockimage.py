# SPDX-License-Identifier: Apache-2.0
"""A stock Debian as a guest: systemd, OpenSSH, networkd, the guest agent.

Its packages are installed and configured by mmdebstrap, nothing of it is ours but the
network's configuration, a console, and cloud-init's files. It boots from a kernel and
an initramfs that are given to QEMU. It takes a minute under emulation.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import shutil
import tempfile
from pathlib import Path

from sandbox import errors, guest, imagebuild, process, rootbuild

CACHE = Path(__file__).parent.parent / ".cache/stock"
SIZE = 2 * 1024**3  # sparse
RELEASE = "bookworm"
PACKAGES = (
    "systemd-sysv udev dbus iproute2 kmod openssh-server qemu-guest-agent "
    # The other way to reseed, beside perl.
    "python3-minimal"
)
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "evdev")
COMMAND_LINE = f"{imagebuild.COMMAND_LINE} root=/dev/vda rw systemd.show_status=0"
NETWORK = """[Match]
Name=en* eth*
[Network]
DHCP=yes
"""
CLOUD_ID = "i-00000000"
FILES = {
    "etc/hostname": "origin\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 origin.example.org origin\n",
    "etc/systemd/network/10-all.network": NETWORK,
    "etc/modules-load.d/guest.conf": "virtio_net\nvirtio_console\n",
    "var/lib/cloud/data/instance-id": f"{CLOUD_ID}\n",
    "etc/iscsi/initiatorname.iscsi": "InitiatorName=iqn.1993-08.org.debian:01:0\n",
    f"var/lib/cloud/instances/{CLOUD_ID}/obj.pkl": "cached\n",
}
MASKED = (
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer "
    "e2scrub_reap.service fstrim.timer getty@tty1.service "
    "systemd-networkd-wait-online.service"
)
BOOT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
while read -r name; do insmod "/modules/$name"; done </modules/order
mount -t devtmpfs dev /dev
mount -t ext4 /dev/vda /root
mount --move /dev /root/dev
exec switch_root /root /sbin/init
"""
NETWORK_TIMEOUT = 570.0


@dataclasses.dataclass(frozen=True)
class Stock:
    """What it boots from."""

    kernel: Path
    initrd: Path
    disk: Path  # raw; not to be written to
    command_line: str = COMMAND_LINE


def build(cache: Path = CACHE, guest_cache: Path = guest.CACHE) -> Stock:
    """Return it, built when its inputs changed. Each file is there whole, or not."""
    for place in (cache, guest_cache):
        place.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages = imagebuild.fetch_packages(guest_cache / "packages")
        name = key(packages)
        stock = Stock(
            cache / f"vmlinuz-{name}", cache / f"initrd-{name}", cache / f"{name}.raw"
        )
        if not all(path.exists() for path in (stock.kernel, stock.initrd, stock.disk)):
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                fill(stock, packages, Path(directory))
    return stock


# Private


def key(packages: list[Path]) -> str:
    """Return a digest of all that it is made from."""
    names = " ".join(package.name for package in packages)
    digest = hashlib.sha256(Path(__file__).read_bytes() + names.encode())
    return digest.hexdigest()[:16]


def fill(stock: Stock, packages: list[Path], directory: Path) -> None:
    """Build all of it in an empty directory."""
    tree = directory / "tree"
    for package in packages:
        process.run(["dpkg-deb", "-x", package, tree])
    make_disk(tree, directory).rename(stock.disk)
    make_initrd(tree, directory).rename(stock.initrd)
    next((tree / "boot").glob("vmlinuz-*")).rename(stock.kernel)


def make_disk(tree: Path, directory: Path) -> Path:
    """Return a new disk with an installed Debian."""
    root = directory / "root"
    install(root)
    modules = next((tree / "lib/modules").iterdir())
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name)
    process.run(["chroot", root, "depmod", modules.name])
    configure(root)
    disk = directory / "disk"
    with disk.open("wb") as output:
        output.truncate(SIZE)
    options = ["-q", "-d", str(root), "-m", "0", "-E", "lazy_itable_init=1"]
    process.run(["mkfs.ext4", *options, disk], timeout=120)
    return disk


def install(root: Path) -> None:
    """Install the packages. In a sandbox there is no network for that."""
    skipped = [
        f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in rootbuild.UNUSED
    ]
    command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", *skipped]
    command += [f"--include={','.join(PACKAGES.split())}", RELEASE, str(root)]
    try:
        process.run(command, timeout=NETWORK_TIMEOUT)
    except errors.SandboxError as error:
        raise errors.SandboxError(
            f"no stock Debian (`make stock-image` builds it): {error}"
        ) from error


def configure(root: Path) -> None:
    """Write what is ours."""
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "var/lib/cloud/instance").symlink_to(f"/var/lib/cloud/instances/{CLOUD_ID}")
    systemctl = ["systemctl", f"--root={root}", "--quiet"]
    process.run([*systemctl, "enable", "systemd-networkd.service", "ssh.service"])
    process.run([*systemctl, "mask", *MASKED.split()])


def make_initrd(tree: Path, directory: Path) -> Path:
    """Return a new initramfs that mounts the root and starts its init."""
    root = directory / "initramfs"
    for name in ("dev", "root"):
        (root / name).mkdir(parents=True)
    imagebuild.put(tree / "bin/busybox", root / "bin/busybox")
    (root / "init").write_text(BOOT)
    (root / "init").chmod(0o755)
    imagebuild.put_modules(tree, root, MODULES)
    initrd = directory / "initrd"
    imagebuild.pack(root, initrd)
    return initrd
