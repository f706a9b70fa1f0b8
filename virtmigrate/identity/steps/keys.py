# SPDX-License-Identifier: Apache-2.0
"""Keys that say who a system is: SSH host keys, and the saved random seed."""

import base64
import binascii
import hashlib

from virtmigrate.identity import guest
from virtmigrate.identity.steps import base, daemons

_KEYS = """
sshd_keys() {
    { ! has sshd || "$(command -v sshd)" -T 2>/dev/null | sed -n 's/^hostkey //p'
      ls /etc/ssh/ssh_host_*_key 2>/dev/null || :; } | sort -u
}
dropbear_keys() { ls /etc/dropbear/dropbear_*_host_key 2>/dev/null || :; }
public() {
    case $1 in
    /etc/dropbear/*) dropbearkey -y -f "$1" | grep -E '^(ssh|ecdsa)-' ;;
    *) ssh-keygen -y -f "$1" ;;
    esac | head -n 1 | cut -d' ' -f1,2
}
kind() {
    case $1 in
    ssh-rsa*) echo rsa ;;
    ssh-ed25519*) echo ed25519 ;;
    ecdsa-*) echo ecdsa ;;
    *) echo "a host key of kind ${1%% *}" >&2; return 1 ;;
    esac
}
"""


class Ssh(base.Scripts):
    """Host keys of OpenSSH and Dropbear, of the kinds and sizes that there were.

    A certificate of an old key is removed. The daemons start anew; a connection that is
    open goes on, with the keys of its session.
    """

    name = "ssh"
    OBSTACLE = f"""{_KEYS}
for f in $(sshd_keys); do
    [ ! -s "$f" ] || has ssh-keygen || echo "no ssh-keygen for $f"
done
for f in $(dropbear_keys); do
    [ ! -s "$f" ] || has dropbearkey || echo "no dropbearkey for $f"
done
"""
    READ = f"""{_KEYS}
for f in $(sshd_keys) $(dropbear_keys); do
    [ ! -s "$f" ] || say "ssh:$f" "$(public "$f")"
done
"""
    CHANGE = f"""{_KEYS}{daemons.AGAIN}
changed=
for f in $(sshd_keys); do
    [ -s "$f" ] || continue
    new=$f.virtmigrate kind=$(kind "$(public "$f")")
    bits=$(ssh-keygen -l -f "$f" | cut -d' ' -f1)
    rm -f "$new" "$new.pub"
    ssh-keygen -q -N '' -C '' -t "$kind" -b "$bits" -f "$new" </dev/null
    mv -f "$new.pub" "$f.pub"
    mv -f "$new" "$f"
    rm -f "$f-cert.pub"
    changed=yes
done
for f in $(dropbear_keys); do
    [ -s "$f" ] || continue
    new=$f.virtmigrate kind=$(kind "$(public "$f")")
    rm -f "$new"
    dropbearkey -t "$kind" -f "$new" >/dev/null 2>&1
    mv -f "$new" "$f"
    changed=yes
done
[ -n "$changed" ] || exit 0
if is_systemd; then
    for unit in ssh sshd dropbear; do
        systemctl try-restart "$unit.service" 2>/dev/null || :
    done
else
    for p in $(listeners sshd); do kill -HUP "$p"; done
    again dropbear
fi
"""
    HOW = "made anew in the guest; daemons started anew"

    def read(self, asked: guest.Timed) -> dict[str, str]:
        """Return fingerprints, as SSH shows them."""
        found = super().read(asked)
        try:
            return {name: _fingerprint(value) for name, value in found.items()}
        except (binascii.Error, ValueError, IndexError) as e:
            raise asked.failed("reading ssh", f"no public key: {e}") from e


class RandomSeed(base.Scripts):
    """What the next boot seeds its random generator with."""

    name = "random-seed"
    _FILES = (
        "/var/lib/systemd/random-seed /var/lib/urandom/random-seed "
        "/var/lib/misc/random-seed /var/lib/random-seed /boot/loader/random-seed "
        "/boot/efi/loader/random-seed /efi/loader/random-seed"
    )
    READ = f"""
for f in {_FILES}; do
    [ ! -s "$f" ] || print "random-seed:$f" "$f"
done
"""
    CHANGE = f"""
for f in {_FILES}; do
    [ ! -s "$f" ] || head -c 512 /dev/urandom | put "$f" 600
done
"""
    HOW = "512 bytes of the reseeded generator"


# Private


def _fingerprint(public: str) -> str:
    kind, blob = public.split(" ")
    digest = hashlib.sha256(base64.b64decode(blob, validate=True)).digest()
    return f"{kind} SHA256:{base64.b64encode(digest).decode().rstrip('=')}"
