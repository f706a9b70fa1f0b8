# SPDX-License-Identifier: Apache-2.0
"""Every option, with its bounds and the reason for its default.

`[virtmigrate]` describes this host and how peers are reached; each name in
`enabled_backends` has a group of its own, as Cinder's backends have. Nothing
else in the package defines an option.
"""

import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from oslo_config import cfg

from virtmigrate import errors
from virtmigrate.conf import cache, host, image, snapshot, transfer, transient
from virtmigrate.conf.backend import backend_opts as backend_opts
from virtmigrate.conf.backend import kind_opts as kind_opts
from virtmigrate.conf.cache import limit_opts as limit_opts

GROUP = "virtmigrate"

ALL_HOST_OPTS = [
    *host.host_opts,
    *host.timeout_opts,
    *transfer.transfer_opts,
    *transfer.receiver_opts,
    *image.image_opts,
    *host.backend_list_opts,
    *cache.cache_opts,
    *snapshot.snapshot_opts,
    *transient.transient_opts,
]


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """Return all options for oslo-config-generator."""
    return [(GROUP, ALL_HOST_OPTS), ("local", [*backend_opts, *limit_opts, *kind_opts])]


def register(conf: cfg.ConfigOpts) -> None:
    """Register the options of this host and of each backend that it names.

    Raises ConfigurationError when a backend is named like a group that means
    something else, or twice, and for a value out of bounds.
    """
    conf.register_opts(ALL_HOST_OPTS, group=GROUP)
    _check_values(conf, GROUP, ALL_HOST_OPTS)
    names: Sequence[str] = conf[GROUP].enabled_backends
    if not names or len(set(names)) != len(names):
        raise errors.ConfigurationError(
            reason=f"enabled_backends = {','.join(names)}: give each backend once"
        )
    for name in names:
        _register_backend(conf, name)


def load(path: Path | str | None = None) -> cfg.ConfigOpts:
    """Read an ini file into a configuration of its own.

    Arguments:
        path: the file; None leaves every option at its default.
    """
    conf = cfg.ConfigOpts()
    files = [] if path is None else [str(path)]
    try:
        conf(
            args=[],
            project="virtmigrate",
            default_config_files=files,
            default_config_dirs=[],
        )
        register(conf)
    except (cfg.Error, ValueError) as e:
        raise errors.ConfigurationError(reason=f"{path}: {e}") from e
    return conf


def peer_uri(conf: cfg.ConfigOpts, dest: str) -> str:
    """Return the URI of the peer that the compute service calls dest."""
    group = conf[GROUP]
    return group.peer_uris.get(dest) or _fill(group.peer_uri, dest)


def transfer_uri(conf: cfg.ConfigOpts, dest: str) -> str:
    """Return the URI to which disks for dest are sent."""
    group = conf[GROUP]
    if group.transfer_uri:
        return _fill(group.transfer_uri, dest)
    return peer_uri(conf, dest)


# Private

_RESERVED = {
    GROUP,
    "DEFAULT",
    "default",
    "default_group",
    "database",
    "oslo_concurrency",
}
_DEST = re.compile(r"^[A-Za-z0-9.:\[\]_-]{1,255}$")


def _register_backend(conf: cfg.ConfigOpts, name: str) -> None:
    registered = conf._groups.get(name)
    ours = registered is not None and "volume_mode" in registered._opts
    if name in _RESERVED or (registered is not None and not ours):
        raise errors.ConfigurationError(
            reason=f"backend {name}: a group of this name means something else; "
            "choose another name"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
        raise errors.ConfigurationError(
            reason=f"backend {name!r}: use a-z, 0-9, _ and -, at most 31 characters"
        )
    for opts in (backend_opts, limit_opts, kind_opts):
        conf.register_opts(opts, group=name)
        _check_values(conf, name, opts)


def _check_values(conf: cfg.ConfigOpts, group: str, opts: Sequence[cfg.Opt]) -> None:
    """Read each option once: oslo.config checks a value when it is asked for."""
    for opt in opts:
        try:
            conf[group][opt.dest]
        except (cfg.Error, ValueError) as e:
            raise errors.ConfigurationError(reason=f"[{group}] {opt.name}: {e}") from e


def _fill(template: str, dest: str) -> str:
    # dest comes from the compute service: nothing in it may add to the URI.
    if not _DEST.fullmatch(dest):
        raise errors.ConfigurationError(reason=f"{dest!r} is no host name")
    uri = template.replace("{dest}", dest)
    if not urllib.parse.urlsplit(uri).scheme:
        raise errors.ConfigurationError(reason=f"{uri!r} is no URI")
    return uri
