# SPDX-License-Identifier: Apache-2.0
"""Identities that services keep: cloud-init, initiators of block storage."""

import uuid
from collections.abc import Sequence

from virtmigrate.identity import model
from virtmigrate.identity.steps import base


class CloudInit(base.Scripts):
    """cloud-init's instance id.

    What it did once for the source counts as done for the clone: it has been done. A
    cached data source goes, as it names the source; the next boot asks anew.
    """

    name = "cloud-init"
    READ = """
for f in /var/lib/cloud/data/instance-id /run/cloud-init/.instance-id; do
    [ ! -s "$f" ] || say "cloud-init:$f" "$(cat "$f")"
done
f=/var/lib/cloud/instance
[ ! -L "$f" ] || say "cloud-init:$f" "$(basename "$(readlink "$f")")"
"""
    CHANGE = """
d=/var/lib/cloud
if [ -L $d/instance ]; then
    old=$(readlink -f $d/instance)
    if [ "${old##*/}" != "$1" ] && [ -d "$old" ]; then
        rm -rf "$d/instances/$1"
        cp -a "$old" "$d/instances/$1"
        rm -f "$d/instances/$1/obj.pkl"
        ln -sfn "$d/instances/$1" $d/instance
        rm -rf "$old"
    fi
fi
rm -f /run/cloud-init/instance-data*.json
f=/run/cloud-init/.instance-id
[ ! -s $f ] || printf '%s\\n' "$1" | put $f 644
f=$d/data/instance-id
[ -s $f ] || exit 0
[ "$(cat $f)" = "$1" ] || put $d/data/previous-instance-id 644 <$f
printf '%s\\n' "$1" | put $f 644
"""
    HOW = "the instance's UUID; what names the source was removed"

    def arguments(self, wanted: model.Wanted) -> Sequence[str]:
        return (wanted.uuid,)

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """It is the instance's UUID."""
        if set(after.values()) - {wanted.uuid}:
            raise ValueError(f"it reads {sorted(set(after.values()))}")
        return "read back as wanted"


class Initiator(base.Scripts):
    """The names under which a system asks for block storage: iSCSI and NVMe."""

    name = "initiator"
    OBSTACLE = """
for s in /sys/class/iscsi_session/session* /sys/class/nvme-fabrics/ctl/nvme*; do
    [ ! -e "$s" ] || echo "${s##*/} is open"
done
"""
    READ = """
f=/etc/iscsi/initiatorname.iscsi
if [ -s $f ] && grep -q '^InitiatorName=' $f; then
    say "initiator:$f" "$(sed -n 's/^InitiatorName=//p' $f | head -n 1)"
fi
for f in /etc/nvme/hostnqn /etc/nvme/hostid; do
    [ ! -s $f ] || say "initiator:$f" "$(head -n 1 $f)"
done
"""
    CHANGE = """
f=/etc/iscsi/initiatorname.iscsi
if [ -s $f ] && grep -q '^InitiatorName=' $f; then
    old=$(sed -n 's/^InitiatorName=//p' $f | head -n 1)
    printf 'InitiatorName=%s:%s\\n' "${old%:*}" "$2" | put $f 600
    ! is_systemd || systemctl try-restart iscsid.service 2>/dev/null || :
fi
f=/etc/nvme/hostnqn
[ ! -s $f ] || printf 'nqn.2014-08.org.nvmexpress:uuid:%s\\n' "$1" | put $f 644
f=/etc/nvme/hostid
[ ! -s $f ] || printf '%s\\n' "$1" | put $f 644
"""
    HOW = "made anew"

    def arguments(self, wanted: model.Wanted) -> Sequence[str]:
        return (wanted.uuid, uuid.uuid4().hex[:12])
