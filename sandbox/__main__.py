# SPDX-License-Identifier: Apache-2.0
"""Command line of the sandbox: up, exec, list, down, image."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from sandbox import (
    errors,
    guest,
    identityimage,
    machine,
    namespace,
    sandbox,
    stockimage,
)

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.function(arguments)
    except errors.SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("up", help="make a sandbox, and leave it up")
    command.add_argument("name")
    command.add_argument("hosts", nargs="*", metavar="host")
    command.set_defaults(function=up)
    command = commands.add_parser("exec", help="run a command beside the hosts")
    command.add_argument("name")
    command.add_argument("--user", action="store_true", help="unprivileged")
    command.add_argument("--own", action="store_true", help="refuse to share it")
    command.add_argument("argv", nargs="+", metavar="argument")
    command.set_defaults(function=execute)
    command = commands.add_parser("list", help="show sandboxes that are up")
    command.set_defaults(function=show)
    command = commands.add_parser("down", help="take a sandbox away")
    command.add_argument("name", nargs="?")
    command.add_argument("--all", action="store_true")
    command.set_defaults(function=down)
    command = commands.add_parser("image", help="build the guests' images")
    command.set_defaults(function=image)
    command = commands.add_parser("machine-image", help="build what machines boot from")
    command.set_defaults(function=machine_image)
    command = commands.add_parser("stock-image", help="build a guest of stock Debian")
    command.set_defaults(function=stock_image)
    return top


def up(arguments: argparse.Namespace) -> int:
    """Make a sandbox, or what is missing of it, and say how to use it."""
    box = sandbox.Sandbox(arguments.name)
    if box.is_up():
        box = sandbox.Sandbox.attach(arguments.name)
    else:
        box.up()
    missing = [name for name in arguments.hosts if name not in box.hosts]
    box.add_hosts(missing)
    for each in box.hosts.values():
        if not each.is_up():
            each.start()
    explain(box)
    return 0


def explain(box: sandbox.Sandbox) -> None:
    """Print the hosts' URIs, and a command that uses one."""
    for each in box.hosts.values():
        print(f"{each.name}: {each.uri}")
        print(f"{' ' * len(each.name)}  {each.local_uri}")
    sudo = "sudo " if "SUDO_UID" in os.environ else ""
    command = f"{sudo}{sys.executable} -m sandbox"
    for each in list(box.hosts.values())[:1]:
        print("\nThese names resolve, and are reachable, in the sandbox only:")
        print(f"  {command} exec {box.name} -- \\")
        print(f"    virsh -c '{each.uri}' list --all")
    print(f"\nTake it down: {command} down {box.name}")


def execute(arguments: argparse.Namespace) -> int:
    """Run a command in a sandbox; one that is not up is up for its duration."""
    box = sandbox.Sandbox(arguments.name)
    namespace.check_machine()
    if box.is_in_use() and not arguments.own:
        argv = box.command(arguments.argv, user=arguments.user)
        os.execvp(argv[0], argv)
    with box:
        return run(box.command(arguments.argv, user=arguments.user))


def run(argv: Sequence[str]) -> int:
    """Run a command, pass signals on to it, and return its exit code."""
    # This process takes the sandbox down: the command must not outlive it.
    child = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *argv])
    restore = {number: signal.getsignal(number) for number in FORWARDED}
    for number in FORWARDED:
        signal.signal(number, lambda caught, _: child.send_signal(caught))
    if sys.stdin is not None and sys.stdin.isatty():
        # The terminal has told the command already.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = child.wait()
    finally:
        for number, handler in restore.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def show(arguments: argparse.Namespace) -> int:
    """List the sandboxes that are up, with owner and hosts."""
    for box in sandbox.all_sandboxes():
        if box.is_up():
            attached = sandbox.Sandbox.attach(box.name)
            owner = box.owner()
            kept = "kept" if owner is None else f"owner={owner.pid}"
            names = [key for key, each in attached.hosts.items() if each.is_up()]
            print(box.name, kept, *names)
    return 0


def down(arguments: argparse.Namespace) -> int:
    """Take one sandbox away, in use or not, or all that nobody uses."""
    if arguments.name:
        sandbox.Sandbox(arguments.name).down()
    for box in sandbox.all_sandboxes() if arguments.all else []:
        owner = box.owner()
        if owner is None:
            box.down()
        else:
            print(f"{box.name} is in use by process {owner.pid}: left up")
    return 0


def image(arguments: argparse.Namespace) -> int:
    """Build the guests' images, unless they are there, and print their paths."""
    print(guest.image().path)
    print(identityimage.image().path)
    return 0


def machine_image(arguments: argparse.Namespace) -> int:
    """Build the root of machines, unless it is there, and print its path."""
    print(machine.root().disk)
    return 0


def stock_image(arguments: argparse.Namespace) -> int:
    """Build the stock Debian, unless it is there, and print its path."""
    print(stockimage.build().disk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
