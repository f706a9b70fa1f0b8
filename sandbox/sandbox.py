# SPDX-License-Identifier: Apache-2.0
"""A sandbox: hosts on one bridge, and a client's place beside them.

All of its files lie in one directory, all of its processes are in namespaces of
its own; the bridge is in the client namespace. Recorded in ``sandbox.json``:
the process that it belongs to (none: it stays until it is taken down) and its
hosts, so that another process can attach to it, or reclaim it when the owner
was killed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import types
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sandbox import (
    accounts,
    ceph,
    config,
    errors,
    host,
    lock,
    machine,
    namespace,
    pki,
    process,
    reach,
    state,
)

DEFAULT_ROOT = "/var/tmp/virtmigrate-sandbox"
ROOT_VARIABLE = "VIRTMIGRATE_SANDBOX"
NAME_VARIABLE = "VIRTMIGRATE_SANDBOX_NAME"
NAME = re.compile(r"[a-z][a-z0-9-]{0,11}")
CHECKOUT = Path(__file__).resolve().parent.parent
PREFIX = 24


class Sandbox:
    """A named set of libvirt hosts. Sandboxes of different names don't touch.

    As a context manager it is up inside, owned by this process. Not safe for
    use by several threads at once.
    """

    def __init__(self, name: str, root: Path | None = None) -> None:
        if not NAME.fullmatch(name):
            raise errors.SandboxError(f"not a name for a sandbox: {name!r}")
        self.name = name
        self.root = root or Path(os.environ.get(ROOT_VARIABLE, DEFAULT_ROOT))
        self.directory = self.root / name
        self.home = self.directory / "home"
        self.pki = self.directory / "pki/trusted"
        self.hosts: dict[str, host.Host] = {}
        self.machines: dict[str, machine.Machine] = {}
        self.clusters: dict[str, ceph.Ceph] = {}
        self._client = namespace.Namespace(self.directory / "client", ("mount", "net"))
        self._authority = pki.Authority(self.directory / "ca")
        self._state = self.directory / "sandbox.json"

    def __enter__(self) -> Sandbox:
        self.up(owner=process.Record.of(os.getpid()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.down()

    @classmethod
    def attach(cls, name: str | None = None, root: Path | None = None) -> Sandbox:
        """Return a sandbox that is up.

        Arguments:
          name: without it, the one that this process was started in.
        """
        sandbox = cls(name or os.environ.get(NAME_VARIABLE, "none"), root)
        if not sandbox.is_up():
            raise errors.SandboxError(f"sandbox {sandbox.name} is not up")
        noted = state.load(sandbox._state)
        for key, options in noted["hosts"].items():
            sandbox.hosts[key] = sandbox._host(key, noted, config.Options.load(options))
        for key in noted["machines"]:
            sandbox.machines[key] = sandbox._machine(key, noted)
        for key in noted["clusters"]:
            sandbox.clusters[key] = sandbox._cluster(key, noted)
        return sandbox

    # The whole sandbox

    def is_up(self) -> bool:
        """Return whether the client namespace is there."""
        return self._client.is_up() and self._state.exists()

    def owner(self) -> process.Record | None:
        """Return the living process that the sandbox belongs to, if any."""
        with contextlib.suppress(OSError, ValueError):
            record = state.load(self._state)["owner"]
            if record is not None and process.Record(**record).is_alive():
                return process.Record(**record)
        return None

    def is_in_use(self) -> bool:
        """Return whether it is up and not what a killed process left."""
        return self.is_up() and (
            self.owner() is not None or state.load(self._state)["owner"] is None
        )

    def up(self, owner: process.Record | None = None) -> None:
        """Make the sandbox, without hosts yet, after reclaiming an ownerless rest.

        Arguments:
          owner: the process with whose end it may be reclaimed; None to keep it
            until down().

        Raises SandboxError when it is in use; nothing is changed then.
        """
        namespace.check_machine()
        with lock.held(self.root):
            self._refuse_if_used()
            self._reclaim()
            try:
                self._make(owner)
            except BaseException:
                self._reclaim()
                raise

    def down(self) -> None:
        """Take everything away: processes, namespaces, files."""
        namespace.check_machine()
        if self.is_inside():
            raise errors.SandboxError(f"this process runs inside sandbox {self.name}")
        with lock.held(self.root):
            self._reclaim()
            self.hosts.clear()
            self.machines.clear()
            self.clusters.clear()
            with contextlib.suppress(OSError):
                self.root.rmdir()

    def is_inside(self) -> bool:
        """Return whether this process runs in the client namespace."""
        if not self._client.is_up():
            return False
        mine = process.namespace_of("net", os.getpid())
        return mine == process.namespace_of("net", self._client.pid)

    # Hosts

    def add_host(
        self,
        name: str,
        *,
        tcp: bool = False,
        sasl: bool = False,
        service_user: bool = False,
        server_certificate: str = "trusted",
        dn_list: Sequence[str] = (),
    ) -> host.Host:
        """Make a host and start it. For the options see config.Options."""
        options = config.Options(
            tcp=tcp,
            sasl=sasl,
            service_user=service_user,
            server_certificate=pki.Kind(server_certificate),
            dn_list=tuple(dn_list),
        )
        added = self._register(name, options)
        added.start()
        return added

    def add_hosts(self, names: Sequence[str]) -> list[host.Host]:
        """Make plain hosts and start them all at once."""
        added = [self._register(name, config.Options()) for name in names]
        with concurrent.futures.ThreadPoolExecutor(len(added) or 1) as pool:
            for started in [pool.submit(each.start) for each in added]:
                started.result()
        return added

    def remove_host(self, name: str) -> None:
        """Stop a host and delete its files; its name and address stay taken."""
        removed = self.hosts[name]
        removed.stop()
        removed.unmount_storage()
        shutil.rmtree(removed.directory, ignore_errors=True)

    def add_machine(self, name: str) -> machine.Machine:
        """Make a host with real LVM, in a virtual machine, and start it."""
        with self._note(name) as noted:
            if name not in noted["machines"]:
                noted["machines"].append(name)
            added = self.machines[name] = self._machine(name, noted)
        added.start()
        return added

    def remove_machine(self, name: str) -> None:
        """End a machine and delete its files; its name and address stay taken."""
        removed = self.machines[name]
        removed.kill()
        shutil.rmtree(removed.directory, ignore_errors=True)

    def add_ceph(self, name: str = "ceph") -> ceph.Ceph:
        """Make a Ceph cluster and start it."""
        with self._note(name) as noted:
            noted["clusters"].append(name)
            added = self.clusters[name] = self._cluster(name, noted)
        added.start()
        return added

    def remove_ceph(self, name: str) -> None:
        """End a cluster and delete its files; its name and address stay taken."""
        removed = self.clusters[name]
        removed.kill()
        shutil.rmtree(removed.directory, ignore_errors=True)

    # The client's side

    def make_pki(self, kind: str) -> Path:
        """Return a new pkipath directory of a client, right or wrong in some way.

        Arguments:
          kind: a value of pki.Kind.
        """
        target = self.pki.parent / kind
        self._authority.client(target, pki.Kind(kind), accounts.service_group())
        return target

    def command(self, argv: Sequence[str], *, user: bool = False) -> list[str]:
        """Return the command that runs argv in the client namespace.

        Arguments:
          user: as the unprivileged user in group libvirt instead of root.
        """
        variables = {NAME_VARIABLE: self.name, ROOT_VARIABLE: str(self.root)}
        identity: list[str] = []
        if user:
            variables |= accounts.variables(self.home)
            identity = accounts.identity()
        settings = [f"{key}={value}" for key, value in variables.items()]
        environment = ["env", f"--chdir={Path.cwd()}", *settings]
        return [*self._client.enter(), *identity, *environment, *argv]

    def exec(
        self,
        argv: Sequence[str],
        *,
        user: bool = False,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the client namespace to its end."""
        return process.run(self.command(argv, user=user), timeout=timeout, check=check)

    # Private

    def _refuse_if_used(self) -> None:
        if not self.is_in_use():
            return
        owner = self.owner()
        if owner is None:
            raise errors.SandboxError(
                f"sandbox {self.name} is up; take it down first: "
                f"python -m sandbox down {self.name}"
            )
        raise errors.SandboxError(
            f"sandbox {self.name} is in use by process {owner.pid}"
        )

    def _reclaim(self) -> None:
        """End and remove whatever is there, an earlier run's too."""
        if not self.directory.exists():
            return
        for kind in ("hosts", "clusters"):
            for directory in (self.directory / kind).glob("*"):
                namespace.Namespace(directory, ()).stop()
        if self._client.is_up():
            spared = process.ancestors()
            members = process.in_namespace("net", self._client.pid)
            process.end(member for member in members if member.pid not in spared)
        self._client.stop()
        shutil.rmtree(self.directory)

    def _make(self, owner: process.Record | None) -> None:
        self.directory.mkdir(mode=0o755)
        record = None if owner is None else dataclasses.asdict(owner)
        state.write(self._state, {"owner": record, "hosts": {}})
        self._write_files()
        self._client.start(self._mounts())
        self._make_bridge()

    def _register(self, name: str, options: config.Options) -> host.Host:
        """Note a host with the next free address."""
        with self._note(name) as noted:
            noted["hosts"][name] = dataclasses.asdict(options)
            self.hosts[name] = self._host(name, noted, options)
        return self.hosts[name]

    @contextlib.contextmanager
    def _note(self, name: str) -> Iterator[dict[str, Any]]:
        """Let a new name be added to the state, and make it resolve."""
        if not NAME.fullmatch(name):
            raise errors.SandboxError(f"not a name for a host: {name!r}")
        with lock.held(self.root):
            noted = state.load(self._state)
            yield noted
            state.write(self._state, noted)
            self._write_names()

    def _host(
        self, name: str, noted: dict[str, Any], options: config.Options
    ) -> host.Host:
        place = self._place(f"hosts/{name}", state.numbers(noted)[name])
        return host.Host(name, place, options)

    def _machine(self, name: str, noted: dict[str, Any]) -> machine.Machine:
        place = self._place(f"hosts/{name}", state.numbers(noted)[name])
        return machine.Machine(name, place)

    def _cluster(self, name: str, noted: dict[str, Any]) -> ceph.Ceph:
        number = state.FIRST_CLUSTER + noted["clusters"].index(name)
        return ceph.Ceph(name, self._place(f"clusters/{name}", number))

    def _place(self, directory: str, number: int) -> host.Place:
        return host.Place(
            sandbox=self.name,
            directory=self.directory / directory,
            common=self.directory / "etc",
            address=self._address(number),
            prefix=PREFIX,
            client=self._client,
            authority=self._authority,
            pki=self.pki,
        )

    def _address(self, number: int) -> str:
        return f"10.{zlib.crc32(self.name.encode()) % 250 + 1}.77.{number}"

    def _write_files(self) -> None:
        etc = self.directory / "etc"
        etc.mkdir()
        accounts.write(etc, self.home)
        self._write_names()
        self.home.mkdir(mode=0o700)
        os.chown(self.home, accounts.USER_ID, accounts.USER_ID)
        self._authority.create()
        self.make_pki("trusted")

    def _write_names(self) -> None:
        """Write /etc/hosts in place: it is bind-mounted."""
        lines = ["127.0.0.1 localhost", f"{self._address(1)} client"]
        names = state.numbers(state.load(self._state))
        lines += [f"{self._address(n)} {name}" for name, n in names.items()]
        (self.directory / "etc/hosts").write_text("\n".join(lines) + "\n")

    def _mounts(self) -> list[list[str]]:
        directory = str(self.directory)
        files = sorted((self.directory / "etc").iterdir())
        return [
            # Shared, so that a file system mounted here is seen by all hosts.
            ["--bind", directory, directory],
            ["--make-shared", directory],
            *(["--bind", str(path), f"/etc/{path.name}"] for path in files),
            *reach.mounts(CHECKOUT, self.directory / "reach"),
        ]

    def _make_bridge(self) -> None:
        process.run(
            [*self._client.enter("net"), "ip", "-batch", "-"],
            stdin="link set lo up\n"
            f"link add {host.BRIDGE} type bridge forward_delay 0\n"
            f"link set {host.BRIDGE} up\n"
            f"address add {self._address(1)}/{PREFIX} dev {host.BRIDGE}\n",
        )


def all_sandboxes() -> list[Sandbox]:
    """Return those that have files, up or not."""
    root = Path(os.environ.get(ROOT_VARIABLE, DEFAULT_ROOT))
    return [Sandbox(path.name) for path in sorted(root.glob("*")) if path.is_dir()]
