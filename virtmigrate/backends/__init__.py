# SPDX-License-Identifier: Apache-2.0
"""The backends of a host: which kinds there are, and those that it has."""

from pathlib import Path

from oslo_config import cfg

from virtmigrate import conf as options
from virtmigrate import errors, storagepool
from virtmigrate.backends import base, dir, lvm, rbd, shared_dir, terms
from virtmigrate.host import Host
from virtmigrate.units import GiB, MiB

KINDS: dict[str, type[base.Backend]] = {
    "dir": dir.DirBackend,
    "rbd": rbd.RbdBackend,
    "lvm": lvm.LvmBackend,
    "shared_dir": shared_dir.SharedDirBackend,
}


def load(conf: cfg.ConfigOpts, host: Host) -> dict[str, base.Backend]:
    """Return the enabled backends by name, in the order of the configuration."""
    names = conf[options.GROUP].enabled_backends
    return {name: _load(conf, host, name) for name in names}


# Private


def _load(conf: cfg.ConfigOpts, host: Host, name: str) -> base.Backend:
    kind = conf[name].kind
    if kind not in KINDS:
        raise errors.ConfigurationError(
            reason=f"backend {name}: kind = {kind} is not known ({', '.join(KINDS)})"
        )
    return KINDS[kind](host, _settings(conf, name))


def _settings(conf: cfg.ConfigOpts, name: str) -> terms.Settings:
    group, host = conf[name], conf[options.GROUP]
    return terms.Settings(
        name=name,
        path=group.path,
        ownership=storagepool.Ownership(
            uid=group.volume_uid,
            gid=group.volume_gid,
            mode=group.volume_mode,
            label=group.volume_label,
        ),
        reserved=group.reserved_mib * MiB,
        busy_timeout=host.busy_timeout,
        record_grace=host.record_grace,
        traits=tuple(group.traits),
        images=terms.ImageLimits(
            count=group.image_max_count,
            bytes=group.image_max_gib * GiB,
            age=group.image_max_age,
            free=group.image_min_free_mib * MiB,
        ),
        options={opt.dest: group[opt.dest] for opt in options.kind_opts},
        lock_path=Path(host.state_path) / "locks" / f"backend-{name}",
        lock_lease=float(host.lock_lease),
    )
