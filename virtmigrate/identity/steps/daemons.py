# SPDX-License-Identifier: Apache-2.0
"""Starting daemons anew where no systemd does it."""

AGAIN = """
listeners() {
    for p in $(pidof "$1" || :); do
        ! grep -q '^PPid:[[:space:]]*1$' "/proc/$p/status" || echo "$p"
    done
}
again() {
    for p in $(listeners "$1"); do
        cat "/proc/$p/cmdline" >"/run/virtmigrate-again.$1.$p"
        kill "$p"
        tries=0
        while kill -0 "$p" 2>/dev/null && [ $tries -lt 100 ]; do
            tries=$((tries + 1))
            sleep 0.1
        done
        ! kill -0 "$p" 2>/dev/null || kill -KILL "$p"
    done
    for f in /run/virtmigrate-again."$1".*; do
        [ -s "$f" ] || continue
        setsid xargs -0 sh -c 'exec "$@" </dev/null' sh <"$f" >/dev/null 2>&1 9>&- &
        tries=0
        until pidof "$1" >/dev/null || [ $tries -ge 100 ]; do
            tries=$((tries + 1))
            sleep 0.1
        done
        rm -f "$f"
        echo "$1 was started anew"
    done
}
"""
"""again NAME ends each such daemon that init has, and starts it with the arguments that
it had. They are in a file meanwhile: who comes after an interruption starts it."""
