# SPDX-License-Identifier: Apache-2.0
"""A guest that is somebody: it has all that a clone has to change.

Like the guest that counts, from the same packages, with a machine-id, a hostname,
dropbear with host keys, a DHCP client, and cloud-init's files. All of it is in memory.
A process counts in memory; it starts no program, so that a guest without a network
draws no random bytes unless it is asked something.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from sandbox import errors, guest, imagebuild, process

INIT = Path(__file__).with_name("identity-init.sh")
PACKAGES = ("dropbear-bin", "libtomcrypt1", "libtommath1", "libgmp10")
PROGRAMS = ("usr/sbin/dropbear", "usr/bin/dropbearkey")
CLOUD_ID = "i-00000000"
LEASE_SCRIPT = """#!/bin/sh
[ -n "$interface" ] || exit 0
case $1 in
deconfig) ip addr flush dev "$interface"; ip link set "$interface" up ;;
bound | renew)
    ip addr flush dev "$interface"
    ip addr add "$ip/${mask:-24}" dev "$interface"
    echo "LEASE $ip" >/dev/ttyS0 ;;
esac
"""
FILES = {
    "etc/hostname": "origin\n",
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 origin.example.org origin\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    # What it is made of.
    "etc/os-release": 'ID=debian\nVERSION_ID="12"\nNAME="Debian GNU/Linux"\n',
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/shells": "/bin/sh\n",
    "var/lib/systemd/random-seed": "r" * 512,
    "var/lib/cloud/data/instance-id": f"{CLOUD_ID}\n",
    "var/lib/cloud/data/previous-instance-id": "NO_PREVIOUS_INSTANCE_ID\n",
    f"var/lib/cloud/instances/{CLOUD_ID}/sem/config_ssh": "done\n",
    f"var/lib/cloud/instances/{CLOUD_ID}/obj.pkl": "cached\n",
    "etc/udhcpc/default.script": LEASE_SCRIPT,
}


def image(cache: Path = guest.CACHE) -> guest.GuestImage:
    """Return the image, built when its inputs changed."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages = imagebuild.fetch_packages(cache / "packages")
        packages += extra_packages(cache / "identity-packages")
        path = cache / f"identity-{key(packages)}.raw"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                assemble(packages, Path(directory)).rename(path)
    return guest.GuestImage(path)


# Private


def key(packages: list[Path]) -> str:
    """Return a digest of all that the image is made from."""
    digest = hashlib.sha256(imagebuild.key(packages).encode())
    for source in (INIT, Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def extra_packages(directory: Path) -> list[Path]:
    """Return the packages that the other guest has not."""
    if len(list(directory.glob("*.deb"))) != len(PACKAGES):
        shutil.rmtree(directory, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as name:
            new = Path(name) / "packages"
            new.mkdir()
            imagebuild.download(PACKAGES, new)
            new.rename(directory)
    return sorted(directory.glob("*.deb"))


def assemble(packages: list[Path], directory: Path) -> Path:
    """Build the image in an empty directory and return its path."""
    tree, root, initrd = (directory / name for name in ("tree", "root", "initrd"))
    for package in packages:
        process.run(["dpkg-deb", "-x", package, tree])
    imagebuild.fill_root(tree, root)
    fill(tree, root)
    imagebuild.pack(root, initrd)
    config = directory / "syslinux.cfg"
    config.write_text(imagebuild.BOOT_CONFIG)
    disk = directory / "image"
    imagebuild.partition(disk)
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    files = {"vmlinuz": kernel, "initrd": initrd, "syslinux.cfg": config}
    imagebuild.install_boot_files(disk, files)
    return disk


def fill(tree: Path, root: Path) -> None:
    """Add to the other guest's initramfs what makes it somebody."""
    imagebuild.put(INIT, root / "init", mode=0o755)
    for name in PROGRAMS:
        imagebuild.put(tree / name, root / name)
        for library in libraries(tree / name, tree):
            inside = Path("/") / os.path.relpath(library, tree)
            target = inside if library.is_relative_to(tree) else library
            imagebuild.put(library, root / str(target).lstrip("/"))
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "etc/udhcpc/default.script").chmod(0o755)
    link = root / "var/lib/cloud/instance"
    link.symlink_to(f"/var/lib/cloud/instances/{CLOUD_ID}")


def libraries(program: Path, tree: Path) -> list[Path]:
    """Return the shared libraries of a program, from its packages or this machine."""
    path = f"LD_LIBRARY_PATH={tree}/usr/lib/x86_64-linux-gnu"
    listed = process.run(["env", path, "ldd", program]).stdout
    if "not found" in listed:
        raise errors.SandboxError(f"libraries of {program.name} are missing: {listed}")
    return [Path(found) for found in re.findall(r"(/\S+) \(0x", listed)]
