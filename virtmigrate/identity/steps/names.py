# SPDX-License-Identifier: Apache-2.0
"""What a system calls itself: hostname, machine-id, boot id."""

import uuid
from collections.abc import Sequence

from virtmigrate.identity import model
from virtmigrate.identity.steps import base


class Hostname(base.Scripts):
    """The kernel's hostname, and the one in /etc."""

    name = "hostname"
    READ = """
say hostname:kernel "$(cat /proc/sys/kernel/hostname)"
[ ! -s /etc/hostname ] || say hostname:file "$(grep -v '^#' /etc/hostname | head -n 1)"
"""
    # The kernel's comes last: until then a second run still knows the old one.
    CHANGE = """
old=$(cat /proc/sys/kernel/hostname)
if [ -f /etc/hosts ] && [ "$old" != localhost ]; then
    awk -v old="$old" -v new="$1" '/^[ \\t]*#/ { print; next } {
        hit = 0
        for (i = 2; i <= NF; i++) {
            if ($i == old) { $i = new; hit = 1 }
            else if (index($i, old ".") == 1) {
                $i = new substr($i, length(old) + 1); hit = 1
            }
        }
        print }' /etc/hosts >/etc/hosts.new.virtmigrate
    put /etc/hosts 644 </etc/hosts.new.virtmigrate
    rm -f /etc/hosts.new.virtmigrate
fi
printf '%s\\n' "$1" | put /etc/hostname 644
printf '%s' "$1" >/proc/sys/kernel/hostname
"""
    HOW = "written to the kernel, /etc/hostname and /etc/hosts"

    def arguments(self, wanted: model.Wanted) -> Sequence[str]:
        return (wanted.name,)

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """It is what was wanted."""
        if set(after.values()) != {wanted.name}:
            raise ValueError(f"it reads {sorted(set(after.values()))}")
        return "read back as wanted"


class MachineId(base.Scripts):
    """The id of systemd and D-Bus; it follows the instance's UUID."""

    name = "machine-id"
    READ = """
for f in /etc/machine-id /var/lib/dbus/machine-id; do
    [ ! -s "$f" ] || say "machine-id:$f" "$(cat "$f")"
done
"""
    CHANGE = """
for f in /etc/machine-id /var/lib/dbus/machine-id; do
    [ -f "$f" ] && [ ! -L "$f" ] || continue
    printf '%s\\n' "$1" | put "$f" 444
done
if is_systemd; then
    systemctl daemon-reexec
    systemctl try-restart systemd-journald.service
    echo "systemd and its journal were started anew"
fi
"""
    HOW = "the instance's UUID"

    def arguments(self, wanted: model.Wanted) -> Sequence[str]:
        return (wanted.uuid.replace("-", ""),)

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """It is the instance's UUID."""
        if set(after.values()) - set(self.arguments(wanted)):
            raise ValueError(f"it reads {sorted(set(after.values()))}")
        return "read back as wanted"


class BootId(base.Scripts):
    """The id of this run of the kernel.

    The kernel keeps it until it ends, and lets nobody write it. So it is covered by a
    file, as containers do, which is what all programs then read.
    """

    name = "boot-id"
    READ = 'say boot-id "$(cat /proc/sys/kernel/random/boot_id)"'
    CHANGE = """
f=/run/virtmigrate-boot-id
umount /proc/sys/kernel/random/boot_id 2>/dev/null || :
rm -f "$f"
printf '%s\\n' "$1" | put "$f" 444
mount -o bind "$f" /proc/sys/kernel/random/boot_id
"""
    HOW = "covered by a file until it boots"

    def arguments(self, wanted: model.Wanted) -> Sequence[str]:
        return (str(uuid.uuid4()),)
