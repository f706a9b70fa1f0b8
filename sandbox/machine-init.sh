#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# First process of a machine (machine.py): makes it a libvirt host with a volume
# group, starts the guest agent when all is up, and then reaps.
# From the kernel's command line: address, prefix, name, group, checkout.

export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
set -e
trap 'echo "MACHINE FAILED, line $LINENO"' ERR

rm -rf /var/run
ln -s /run /var/run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm /run/lock /run/libvirt /run/log
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for word in $(cat /proc/cmdline); do
    case $word in box.*=*) declare "${word#box.}" ;; esac
done

# What lies outside: configuration, logs, and trees at the path they have there.
modprobe virtiofs
mkdir -p /outside
mount -t virtiofs outside /outside
cp -r /outside/etc/. /etc/
for file in /outside/common/*; do
    touch "/etc/${file##*/}"
    mount --bind "$file" "/etc/${file##*/}"
done
while read -r path; do
    mkdir -p "$path"
    mount --bind "/outside/tree$path" "$path"
done </outside/paths
mkdir -p /var/log/libvirt /var/lib/libvirt /var/cache/libvirt
mount --bind /outside/log /var/log/libvirt
mount --bind /outside/cache /var/cache/libvirt
hostname "$name"

/lib/systemd/systemd-udevd --daemon
modprobe -a virtio_net virtio_console virtio_rng dm-mod dm-snapshot dm-thin-pool tun
udevadm trigger --action=add
udevadm settle --timeout=20

ip link set lo up
ip link set eth0 up
ip address add "$address/$prefix" dev eth0

cat >/etc/lvm/lvmlocal.conf <<'END'
devices {
    global_filter = ["a|^/dev/vdb$|", "r|.*|"]
    obtain_device_list_from_udev = 0
    multipath_component_detection = 0
    md_component_detection = 0
    fw_raid_component_detection = 0
}
activation {
    monitoring = 0
    udev_sync = 0
    udev_rules = 0
}
END
if ! vgs "$group" >/dev/null 2>&1; then
    vgcreate --yes "$group" /dev/vdb
fi
vgchange --activate y "$group"
# All devices are there. From here on LVM makes the nodes itself and waits for nobody:
# under emulation udev takes longer for a volume than LVM does.
udevadm control --exit --timeout=20

virtlogd --daemon
libvirtd --listen --daemon
is_up() { virsh -q -c qemu:///system uri >/dev/null 2>&1; }
for _ in {1..150}; do
    is_up && break
    sleep 0.1
done
is_up

export PYTHONPATH=$checkout PYTHONDONTWRITEBYTECODE=1
qemu-ga --daemonize --path=/dev/virtio-ports/org.qemu.guest_agent.0
echo "MACHINE UP $(cut -d' ' -f1 /proc/uptime)"

set +e
while :; do
    sleep 3600 &
    wait $!
done
