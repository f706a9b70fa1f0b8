# SPDX-License-Identifier: Apache-2.0
"""The kernel's random generator.

It comes first: whatever is made random after it, is. Bytes of this host's generator
are credited to the guest's pool, and then its generator is keyed from that pool at
once (RNDADDENTROPY, RNDRESEEDCRNG: random(4)). Writing to /dev/urandom credits
nothing, and is heeded up to a minute later.

The two calls need a program. Perl and Python are in nearly every guest, and nothing
has to be brought in. Where neither is, `reseed.PROGRAM` is.
"""

import os
import struct

from virtmigrate.identity import guest, model
from virtmigrate.identity.steps import base, reseed

SIZE = 64
"""Bytes of entropy: twice the key of the generator."""

_PERL = """
binmode STDIN; local $/; my $it = <STDIN>;
open(my $f, "<", "/dev/urandom") or die "urandom: $!";
ioctl($f, 0x40085203, $it) or die "RNDADDENTROPY: $!";
ioctl($f, 0x5207, 0) or die "RNDRESEEDCRNG: $!";
"""
_PYTHON = """
import fcntl, sys
with open("/dev/urandom", "rb", 0) as f:
    fcntl.ioctl(f, 0x40085203, sys.stdin.buffer.read())
    fcntl.ioctl(f, 0x5207)
"""
_PYTHONS = ("python3", "/usr/libexec/platform-python")
_PLACES = ("/run", "/dev/shm", "/tmp", "/var/tmp", "/root")
"""Where a program can be put; some of them let none run."""

_WAYS = """
if has perl; then echo perl
elif has python3; then echo python3
elif [ -x /usr/libexec/platform-python ]; then echo /usr/libexec/platform-python
elif [ "$(uname -m)" = x86_64 ]; then echo program
else echo none; fi
"""
_SAMPLE = """
d=$(dd if=/dev/urandom bs=32 count=1 2>/dev/null | sha256sum)
say rng "sha256:${d%% *}"
"""
_CANNOT_RUN = (126, 127)  # exit statuses of a shell
_MACHINES = ("x86_64",)


class Rng:
    """Reseeds the kernel's random generator with bytes of this host."""

    name = "rng"

    def obstacle(self, asked: guest.Timed) -> str | None:
        """Tell of a machine on which it is not proven, or that has no way."""
        machine = base.sh(asked, self.name, "uname -m").decode(errors="replace").strip()
        if machine not in _MACHINES:
            return f"the numbers of its ioctls are proven on {_MACHINES[0]} only"
        if base.sh(asked, self.name, "id -u").strip() != b"0":
            return "what runs commands in the guest is not root there"
        return None

    def read(self, asked: guest.Timed) -> dict[str, str]:
        """Return a digest of fresh random bytes, which nobody else uses."""
        said = base.sh(asked, "reading rng", _SAMPLE)
        return base.parsed(asked, self.name, said)

    def change(self, asked: guest.Timed, wanted: model.Wanted) -> str:
        """Credit and key by the first way that there is."""
        way = base.sh(asked, self.name, _WAYS).decode(errors="replace").strip()
        if way == "perl":
            _demand(asked, asked.run(["perl", "-e", _PERL], entropy()))
        elif way in _PYTHONS:
            _demand(asked, asked.run([way, "-c", _PYTHON], entropy()))
        elif way == "program":
            way = self._by_program(asked)
        else:
            raise asked.failed(self.name, "it has neither perl nor python")
        return f"RNDADDENTROPY of {SIZE} bytes of the host, RNDRESEEDCRNG, by {way}"

    def proof(self, after: dict[str, str], wanted: model.Wanted) -> str:
        """The kernel acknowledged both calls."""
        return "the kernel took both calls; a sample differs from all others"

    # Private

    def _by_program(self, asked: guest.Timed) -> str:
        """Bring a program in, run it, and take it away."""
        for place in _PLACES:
            path = f"{place}/virtmigrate-reseed"
            script = 'cat >"$1" && chmod 700 "$1"'
            argv = ["/bin/sh", "-c", script, "virtmigrate", path]
            if asked.run(argv, reseed.PROGRAM).code:
                continue
            argv = ["/bin/sh", "-c", '"$1"; r=$?; rm -f "$1"; exit $r', "reseed", path]
            result = asked.run(argv, entropy())
            if result.code not in _CANNOT_RUN:
                _demand(asked, result)
                return f"our own program in {place}"
        raise asked.failed(self.name, f"no program can be run from {_PLACES}")


def entropy() -> bytes:
    """Return what RNDADDENTROPY takes: bits, size, bytes."""
    return struct.pack("@ii", SIZE * 8, SIZE) + os.urandom(SIZE)


def _demand(asked: guest.Timed, result: guest.Result) -> None:
    if result.code:
        raise asked.failed("reseeding the random generator", guest.told(result))
