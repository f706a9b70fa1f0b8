# SPDX-License-Identifier: Apache-2.0
"""The drivers of one command: this host's, and where it must be, a peer's.

The peer's half is the peer's own driver, or one in this process that is bound to
the peer's URI (see halves.py). Its configuration is ours,
then `peers/DEST.conf` beside our file where there is one (a peer whose
directories differ), then what makes it the peer: URI, address, state_path.
"""

import contextlib
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from oslo_config import cfg
from oslo_log import log as logging

from virtmigrate import conf as options
from virtmigrate import errors, mailbox, model, node
from virtmigrate.cli import halves
from virtmigrate.driver import VirtMigrateDriver
from virtmigrate.progress import Progress

LOG = logging.getLogger(__name__)

DEFAULT_FILE = Path("/etc/virtmigrate/virtmigrate.conf")
FILE_VARIABLE = "VIRTMIGRATE_CONFIG"


class Session:
    """What one command works with; leaving it closes all connections.

    Not safe to share between threads.

    Arguments:
        file: the configuration; None takes the default file, or the options'
            defaults where there is no such file.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._files = [file] if file else [f for f in [DEFAULT_FILE] if f.exists()]
        self._stack = contextlib.ExitStack()
        self.conf = read(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._stack.close()

    def look(self) -> node.Node:
        """Return this host only to look at it: nothing is made or settled."""
        here = node.Node(self.conf)
        self._stack.callback(here.close)
        return here

    def here(self, progress: Callable[[], Progress] = Progress) -> VirtMigrateDriver:
        """Return this host's driver; what was left undone is settled first."""
        return self._start(self.conf, progress)

    def peer(self, dest: str, here: VirtMigrateDriver) -> halves.Half:
        """Return the peer's half of a move from here.

        Raises HostError, ConfigurationError.
        """
        if dest == here.node.name:
            return halves.Driven(here)
        conf = peer_conf(self._files, self.conf, dest)
        card = _demand_alike(conf, dest)
        if card is not None and card.accepts_moves:
            there = node.Node(conf)
            self._stack.callback(there.close)
            return halves.Asked(here.peer(dest), there)
        return halves.Driven(self._start(conf, Progress))

    # Private

    def _start(
        self, conf: cfg.ConfigOpts, progress: Callable[[], Progress]
    ) -> VirtMigrateDriver:
        # A command is over too soon to serve peers.
        conf.set_override("receiver", False, options.GROUP)
        driver = VirtMigrateDriver(conf=conf, progress=progress)
        host = str(conf[options.GROUP].address or "local")
        self._stack.callback(driver.cleanup_host, host)
        try:
            driver.init_host(host)
        except OSError as e:
            path = conf[options.GROUP].state_path
            raise errors.ConfigurationError(
                reason=f"state_path {path} cannot be used: {e}"
            ) from e
        return driver


def read(files: Sequence[Path]) -> cfg.ConfigOpts:
    """Read ini files, the later ones first in right, into a configuration."""
    conf = cfg.ConfigOpts()
    names = [str(file) for file in files]
    try:
        conf(
            args=[],
            project="virtmigrate",
            default_config_files=names,
            default_config_dirs=[],
        )
        options.register(conf)
    except (cfg.Error, ValueError) as e:
        raise errors.ConfigurationError(reason=f"{', '.join(names)}: {e}") from e
    return conf


def peer_conf(files: Sequence[Path], ours: cfg.ConfigOpts, dest: str) -> cfg.ConfigOpts:
    """Return the configuration of a peer's half."""
    uri = options.peer_uri(ours, dest)  # refuses what is no name of a host
    if not dest.strip("."):
        raise errors.ConfigurationError(reason=f"{dest!r} is no host name")
    extra = [file.parent / "peers" / f"{dest}.conf" for file in files[:1]]
    conf = read([*files, *(file for file in extra if file.exists())])
    state = Path(ours[options.GROUP].state_path) / "peers" / dest
    for name, value in (("uri", uri), ("address", dest), ("state_path", str(state))):
        conf.set_override(name, value, options.GROUP)
    return conf


# Private


def _demand_alike(conf: cfg.ConfigOpts, dest: str) -> model.HostCard | None:
    """Return the peer's card, None for a new host.

    Refuses a peer that says of itself that it is set up otherwise.
    """
    there = node.Node(conf)
    try:
        stored = there.mailbox.cards.find(mailbox.CARD)
        if stored is None:
            return None
        ours = {backend.name for backend in there.backends.values()}
        theirs = {card.name for card in stored.body.backends}
        if stored.body.host != dest or ours != theirs:
            raise errors.ConfigurationError(
                reason=f"host {dest} says that it is {stored.body.host} with the "
                f"backends {', '.join(sorted(theirs))}, and this configuration says "
                f"{', '.join(sorted(ours))}: write what differs to peers/{dest}.conf"
            )
        return stored.body
    except errors.PoolNotFound:
        LOG.debug("host=%s is new", dest)
        return None
    finally:
        there.close()
