#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Init of the sandbox's guest. Beats once a second: appends a record of one
# sector to every writable disk, synced, then says so on the serial console.
# A record is a line of 64 bytes, eight times:
#   VMBEAT1 COUNTER BOOT CHECKSUM
# and record N lies in sector N - 1 of its area: partition 2, or where there is
# none, from 1 MiB on. On a file system labelled "beats" it appends to a file.

MAGIC=VMBEAT1

prepare() {
    /bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin /proc /sys /dev /run /tmp /var
    /bin/busybox --install -s
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs dev /dev
    ln -s /run /var/run
    exec </dev/null >/dev/ttyS0 2>&1
    local module
    while read -r module; do
        insmod "/modules/$module"
    done </modules/order
    hostname guest
    ip link set lo up
}

# The ACPI power button, and what the guest agent calls to shut down.
watch_power_button() {
    local name device
    for name in /sys/class/input/event*/device/name; do
        [ "$(cat "$name")" = "Power Button" ] || continue
        device=${name%/device/name}
        device=/dev/input/${device##*/}
        (dd if="$device" bs=24 count=1 >/dev/null 2>&1; halt_now) &
    done
}

halt_now() {
    echo "HALT"
    sync
    poweroff -f
}

start_agent() {
    local port
    for port in /sys/class/virtio-ports/*; do
        [ "$(cat "$port/name" 2>/dev/null)" = org.qemu.guest_agent.0 ] || continue
        qemu-ga --daemonize -m virtio-serial -p "/dev/${port##*/}" -t /run
    done
}

# Says whether a disk holds a file system: FAT (or a boot record), ext, ISO 9660.
is_foreign() {
    [ "$(bytes "$1" 510 2)" = "55 aa" ] || [ "$(bytes "$1" 1080 2)" = "53 ef" ] ||
        [ "$(bytes "$1" 32769 5)" = "43 44 30 30 31" ]
}

# Prints bytes of a disk in hexadecimal.
bytes() {
    dd if="/dev/$1" iflag=skip_bytes,count_bytes skip="$2" count="$3" 2>/dev/null |
        hexdump -v -e '/1 "%02x "' | sed 's/ $//'
}

# Sets sector of the area (start), and how many there are (room), of a disk.
find_area() {
    local disk=$1 sys=/sys/block/$1
    [ "$(cat "$sys/ro")" = 0 ] || return 1
    if [ -d "$sys/${disk}2" ]; then
        start=$(cat "$sys/${disk}2/start")
        room=$(cat "$sys/${disk}2/size")
    elif [ -d "$sys/${disk}1" ] || is_foreign "$disk"; then
        return 1
    else
        start=2048
        room=$(($(cat "$sys/size") - start))
    fi
    [ "$room" -gt 0 ]
}

# Prints the first line of a sector.
sector() {
    dd if="/dev/$1" bs=512 skip="$2" count=1 2>/dev/null | head -c 63 | tr -d '\0'
}

# Sets how many records (count) there are, and the last one's boot (boot).
find_last() {
    local disk=$1 low=0 high=$room middle
    while [ $low -lt $high ]; do
        middle=$(((low + high) / 2))
        case "$(sector "$disk" $((start + middle)))" in
        "$MAGIC "*) low=$((middle + 1)) ;;
        *) high=$middle ;;
        esac
    done
    count=$low
    boot=0
    [ $count -eq 0 ] && return
    set -- $(sector "$disk" $((start + count - 1)))
    boot=$(printf %s "$3" | sed 's/^0*//')
}

# Keeps what is to know of each disk in start_vda, count_vda and so on.
open_disks() {
    local sys disk
    disks=
    for sys in /sys/block/vd*; do
        disk=${sys##*/}
        [ -b "/dev/$disk" ] || continue
        echo "DISK $disk $(($(cat "$sys/size") * 512))"
        find_area "$disk" || continue
        find_last "$disk"
        disks="$disks $disk"
        eval "start_$disk=$start room_$disk=$room count_$disk=$count"
        eval "boot_$disk=$((boot + 1))"
    done
}

# Mounts a disk whose ext file system is labelled "beats": what is written there stops
# when the file system is frozen. A beat waits for it.
mount_files() {
    local sys disk
    files=
    for sys in /sys/block/vd*; do
        disk=${sys##*/}
        [ "$(bytes "$disk" 1144 6)" = "62 65 61 74 73 00" ] || continue
        mkdir /files
        mount -t ext4 "/dev/$disk" /files && files=/files/beats
    done
}

# Says with which number the first disk goes on.
say_boot() {
    local disk number=0
    for disk in $disks; do
        eval "number=\$count_$disk"
        break
    done
    echo "BOOT $((number + 1))"
}

# Appends the next record, synced; sets number and checksum.
append() {
    local disk=$1 start room boot text line
    eval "start=\$start_$disk room=\$room_$disk number=\$count_$disk boot=\$boot_$disk"
    [ "$number" -lt "$room" ] || return 1
    text=$(printf "$MAGIC %010d %06d" $((number + 1)) "$boot")
    checksum=$(printf %s "$text" | sha256sum | head -c 37)
    line="$text $checksum"
    printf '%s\n%s\n%s\n%s\n%s\n%s\n%s\n%s\n' "$line" "$line" "$line" "$line" \
        "$line" "$line" "$line" "$line" |
        dd of="/dev/$disk" bs=512 seek=$((start + number)) count=1 \
            oflag=direct conv=notrunc,fsync 2>/dev/null || return 1
    number=$((number + 1))
    eval "count_$disk=$number"
}

beat() {
    local disk said=
    for disk in $disks; do
        if ! append "$disk"; then
            said="$said $disk=failed"
        elif [ -z "$said" ]; then
            said=" $number $checksum"
        else
            said="$said $disk=$number"
        fi
    done
    [ -z "$files" ] || echo "$said" >>"$files"
    echo "BEAT$said"
}

# Changes address spaces all the time, by two shells that wake up in turns. QEMU before
# 9.0 forgets, under TCG, what is written through a TLB that is older than the last look
# at the dirty pages ("physmem: Fix migration dirty bitmap coherency with TCG memory
# access"): a guest that idles in one address space would come to a peer with old pages.
keep_moving() {
    local shell
    mkfifo /run/nothing
    for shell in 1 2; do
        (exec 3<>/run/nothing; while :; do read -r -t 0.05 _ <&3; done) &
    done
}

prepare
watch_power_button
open_disks
mount_files
say_boot
start_agent
keep_moving
while :; do
    beat
    sleep 1
done
