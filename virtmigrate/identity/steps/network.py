# SPDX-License-Identifier: Apache-2.0
"""Who a system is on its networks: MAC, DHCP, addresses.

The clone's QEMU has the new MAC on its command line, and the old one in the state that
came with the memory. A virtio device that is reset takes the one of the command line:
so the driver lets it go, and takes it again. With the interface go its addresses,
routes, and neighbours; its permanent address is the new one, too, which an address
that were only set would not make it.
"""

from collections.abc import Sequence

from virtmigrate.identity import model
from virtmigrate.identity.steps import base, daemons

_CONFIGURATION = (
    "/etc/netplan /etc/network /etc/systemd/network /run/systemd/network /run/netplan "
    "/etc/udev/rules.d /etc/NetworkManager /etc/sysconfig/network-scripts"
)
_INTERFACES = """
interfaces() {
    for n in /sys/class/net/*; do
        [ ! -e "$n/device" ] || echo "${n##*/}"
    done
}
driver() { d=$(readlink -f "/sys/class/net/$1/device/driver"); echo "${d##*/}"; }
"""


class Mac(base.Scripts):
    """The addresses of network interfaces, in the driver and in configuration."""

    name = "mac"
    OBSTACLE = f"""{_INTERFACES}
for n in $(interfaces); do
    d=$(driver "$n")
    [ "$d" = virtio_net ] || echo "$n: driver $d"
    [ ! -e "/sys/class/net/$n/master" ] || echo "$n is part of another interface"
    case $n in enx*) echo "$n is named after its address" ;; esac
done
"""
    READ = f"""{_INTERFACES}
for n in $(interfaces); do
    say "mac:$n" "$(cat "/sys/class/net/$n/address")"
done
"""
    CHANGE = f"""{_INTERFACES}
V=/sys/bus/virtio
name_of() {{
    tries=0
    until set -- "$V/devices/$1/net/"* && [ -e "$1/address" ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || {{ echo "no interface came back" >&2; exit 1; }}
        sleep 0.1
    done
    echo "${{1##*/}}"
}}
settle() {{ ! has udevadm || udevadm settle --timeout=20 || :; }}
rebind() {{
    n=$1
    d=$(readlink -f "/sys/class/net/$n/device")
    d=${{d##*/}} up=$(($(cat "/sys/class/net/$n/flags") & 1))
    [ "$(driver "$n")" = virtio_net ] || {{ echo "$n is no virtio_net" >&2; exit 1; }}
    echo "$d" >"$V/drivers/virtio_net/unbind"
    echo "$d" >"$V/drivers/virtio_net/bind"
    settle
    n=$(name_of "$d")
    [ "$up" = 0 ] || ip link set "$n" up
    echo "$n"
}}
one() {{
    for n in $(interfaces); do
        a=$(cat "/sys/class/net/$n/address")
        [ "$a" != "$2" ] || return 0
        [ "$a" != "$1" ] || {{ rebind "$n"; return 0; }}
    done
    echo "no interface has $1" >&2
    exit 1
}}
# What an earlier attempt let go.
for d in "$V"/devices/*; do
    [ -e "$d/driver" ] || [ "$(cat "$d/device" 2>/dev/null)" != 0x0001 ] ||
        echo "${{d##*/}}" >"$V/drivers/virtio_net/bind"
done
settle
while [ $# -gt 0 ]; do
    for d in {_CONFIGURATION}; do
        [ -d "$d" ] || continue
        grep -rliF "$1" "$d" 2>/dev/null | while read -r f; do
            sed -i "s/$1/$2/Ig" "$f"
        done || :
    done
    one "$1" "$2"
    shift 2
done
"""
    HOW = "the driver took its device anew; old addresses replaced in configuration"

    def arguments(self, wanted: model.Wanted) -> Sequence[str]:
        return [
            mac for each in wanted.interfaces for mac in (each.old_mac, each.new_mac)
        ]

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """It has all addresses that were wanted, and no others."""
        new = {each.new_mac for each in wanted.interfaces}
        if set(after.values()) != new:
            raise ValueError(f"it has {sorted(set(after.values()))}")
        return "read back as wanted"


_LEASES = (
    "/run/systemd/netif/leases/* /var/lib/systemd/network/leases/* /etc/dhcpcd.duid "
    "/var/lib/dhcp/*.leases /var/lib/dhclient/*.lease* /var/lib/dhcpcd/* "
    "/var/lib/NetworkManager/*.lease /var/lib/NetworkManager/secret_key"
)


class Dhcp(base.Scripts):
    """What a DHCP client is known by, and the lease that it keeps.

    systemd-networkd derives its identifiers from the machine-id, and udhcpc from the
    MAC: after those they start anew, without a lease. Others are not proven.
    """

    name = "dhcp"
    OBSTACLE = """
for p in dhclient dhcpcd NetworkManager connmand; do
    ! pidof "$p" >/dev/null || echo "$p is not proven"
done
"""
    READ = f"""
for f in {_LEASES}; do
    [ ! -s "$f" ] || [ ! -f "$f" ] || print "dhcp:$f" "$f"
done
"""
    CHANGE = f"""{daemons.AGAIN}
networkd=
if is_systemd && systemctl is-active --quiet systemd-networkd.service; then
    networkd=yes
    systemctl stop systemd-networkd.socket systemd-networkd.service
    # So that a second attempt knows what the first one stopped.
    : >/run/virtmigrate-networkd
fi
rm -f {_LEASES}
if [ -e /run/virtmigrate-networkd ]; then
    systemctl start systemd-networkd.service
    rm -f /run/virtmigrate-networkd
    echo "systemd-networkd was started anew"
fi
again udhcpc
"""
    HOW = "leases and identifiers removed"


class Address(base.Scripts):
    """Global IP addresses, of interfaces that are devices.

    Those of DHCP went with the old interface. Those that are configured in the guest
    would come back, and make two of one: they are found when all is read back.
    """

    name = "address"
    OBSTACLE = 'has ip || echo "no command ip"'
    READ = f"""{_INTERFACES}
for n in $(interfaces); do
    ip -o addr show dev "$n" scope global | while read -r _ _ family a _; do
        say "address:$n:${{a%%/*}}" "${{a%%/*}}"
    done
done
"""
    CHANGE = ":"
    HOW = "they went with the old interface"

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """None that the source or a sibling has."""
        return "none is the source's or a sibling's"
