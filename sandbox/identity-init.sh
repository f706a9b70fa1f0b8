#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Init of the guest that is somebody (identityimage.py). On its console it says READY
# when its agent is there, and LEASE with each address that it is given.

/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /proc /sys /dev /run /tmp /var /root
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /etc/dropbear
mount -t tmpfs shm /dev/shm
mount -t devpts devpts /dev/pts
ln -s /run /var/run
exec </dev/null >/dev/ttyS0 2>&1
while read -r module; do
    insmod "/modules/$module"
done </modules/order
hostname "$(cat /etc/hostname)"
ip link set lo up

for kind in ed25519 ecdsa; do
    dropbearkey -t "$kind" -f "/etc/dropbear/dropbear_${kind}_host_key" >/dev/null 2>&1
done
dropbear -E -p 22 2>/dev/null
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    udhcpc -b -t 2 -T 1 -A 2 -i eth0 >/dev/null 2>&1
fi

# Counts in memory, by the shell alone.
count() {
    mkfifo /run/never
    n=0
    while :; do
        n=$((n + 1))
        echo "$n" >/run/count
        read -r -t 1 never <>/run/never
    done
}
count &

for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name" 2>/dev/null)" = org.qemu.guest_agent.0 ] || continue
    qemu-ga --daemonize -m virtio-serial -p "/dev/${port##*/}" -t /run
done
echo "READY $(cut -d' ' -f1 /proc/uptime)"
while :; do
    wait
    read -r -t 5 never <>/run/never
done
