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

GROUP = "virtmigrate"

host_opts = [
    cfg.StrOpt(
        "uri",
        default="qemu:///system",
        help="libvirt URI of this host. Change it where libvirtd listens on "
        "another socket.",
    ),
    cfg.StrOpt(
        "address",
        help="What get_host_ip_addr() gives out and peers receive as `dest`: a "
        "name or an address that peer_uri turns into a URI. It should be a name "
        "in this host's certificate. Default: the host name.",
    ),
    cfg.StrOpt(
        "peer_uri",
        default="qemu+tls://{dest}/system",
        help="Template of a peer's libvirt URI; {dest} is its address. Add "
        "?pkipath=DIR for certificates elsewhere, or ?authfile=FILE for SASL.",
    ),
    cfg.DictOpt(
        "peer_uris",
        default={},
        help="Peers whose URI does not follow peer_uri, as DEST:URI pairs.",
    ),
    cfg.StrOpt(
        "transfer_uri",
        help="Template of the URI that disks are sent to, by default peer_uri. "
        "A read-write connection to a system libvirtd is root on its host; an "
        "unprivileged libvirtd that serves only the incoming area is the door "
        "to less.",
    ),
    cfg.ListOpt(
        "allow_insecure_peers",
        default=[],
        help="Peers, by their `dest`, to which a connection without encryption "
        "is accepted. For laboratories only: disks cross the network readable.",
    ),
    cfg.StrOpt(
        "virt_type",
        default="kvm",
        choices=["kvm", "qemu"],
        help="Domain type. qemu is software emulation, for tests.",
    ),
    cfg.StrOpt(
        "machine_type",
        default="q35",
        help="Machine type of new instances. It is recorded at the first boot "
        "and never changes by moving.",
    ),
    cfg.StrOpt(
        "state_path",
        default="/var/lib/virtmigrate",
        help="Directory of journals and local locks. Must survive a reboot and "
        "be writable by the service's user.",
    ),
    cfg.StrOpt(
        "console_path",
        default="/var/log/libvirt/qemu",
        help="Directory, on the libvirt host, of the serial console logs. "
        "virtlogd must be allowed to write there.",
    ),
    cfg.StrOpt(
        "owner",
        default="virtmigrate",
        help="Whom instances made through this driver belong to. Commands that "
        "change an instance of another owner are refused.",
    ),
]

timeout_opts = [
    cfg.FloatOpt(
        "connect_timeout",
        default=10.0,
        min=0.5,
        max=300,
        help="Seconds to open a connection to a host.",
    ),
    cfg.FloatOpt(
        "call_timeout",
        default=60.0,
        min=1,
        max=3600,
        help="Seconds that a host may take to answer one call, or to accept the "
        "next piece of a stream. After that the connection is cut. Raise it "
        "where a pool's refresh takes long.",
    ),
    cfg.FloatOpt(
        "busy_timeout",
        default=60.0,
        min=1,
        max=3600,
        help="Seconds to wait for a pool that says it is busy refreshing.",
    ),
    cfg.FloatOpt(
        "lock_timeout",
        default=30.0,
        min=0,
        max=3600,
        help="Seconds to wait for another operation on the same instance.",
    ),
    cfg.FloatOpt(
        "record_grace",
        default=10.0,
        min=0.5,
        max=120,
        help="Seconds after which a record that was begun and not finished is "
        "held for dead. The same on all hosts of a shared backend.",
    ),
    cfg.IntOpt(
        "shutdown_timeout",
        default=60,
        min=0,
        max=3600,
        help="Seconds that a guest gets to shut down cleanly before it is "
        "turned off; a caller may say otherwise.",
    ),
    cfg.IntOpt(
        "shutdown_retry_interval",
        default=10,
        min=1,
        max=600,
        help="Seconds after which the request to shut down is repeated.",
    ),
    cfg.IntOpt(
        "reclaim_age",
        default=86400,
        min=60,
        max=30 * 86400,
        help="Seconds after which what a peer began to send here, and never "
        "finished, is removed. Longer than the longest copy takes.",
    ),
    cfg.FloatOpt(
        "settle_interval",
        default=300.0,
        min=0,
        max=86400,
        help="Seconds between two attempts to finish or undo what a failure left "
        "here or at a peer that was away. 0: only at the start.",
    ),
    cfg.FloatOpt(
        "event_interval",
        default=2.0,
        min=0.1,
        max=60,
        help="Seconds between two looks at the domains' states, from which the "
        "lifecycle events are made.",
    ),
]

transfer_opts = [
    cfg.IntOpt(
        "stream_length",
        default=32,
        min=1,
        max=64,
        help="MiB in one libvirt stream. libvirtd queues what its disk does not "
        "take in memory, so this bounds what it may hold, and what is sent "
        "again after an error.",
    ),
    cfg.IntOpt(
        "transfer_workers",
        default=2,
        min=1,
        max=8,
        help="Connections that send ranges of disks of one move at once. One "
        "libvirtd does all its TLS in one thread: more than two seldom help.",
    ),
    cfg.IntOpt(
        "max_transfers",
        default=2,
        min=1,
        max=64,
        help="Moves whose disks are copied from this host at once; others wait "
        "before their guests are stopped.",
    ),
    cfg.IntOpt(
        "bandwidth_mib",
        default=0,
        min=0,
        help="MiB per second that one move may send. 0: no limit.",
    ),
    cfg.IntOpt(
        "host_bandwidth_mib",
        default=0,
        min=0,
        help="MiB per second that all moves of one process of this host may send "
        "together. 0: no limit.",
    ),
    cfg.StrOpt(
        "verify",
        default="full",
        choices=[
            ("full", "every byte at the peer is compared with the source"),
            ("sampled", "blocks drawn at random are compared"),
            ("none", "nothing is compared; what libvirt says is believed"),
        ],
        help="How copies are proven before the source gives an instance up. With "
        "sampled and none the source's volumes stay until a confirmation that "
        "names the risk, and the copies are never used as proven ones.",
    ),
    cfg.BoolOpt(
        "send_ahead",
        default=True,
        help="Send the disks of a running guest before it is stopped, and afterwards "
        "only what it wrote meanwhile: much less downtime, for reading the disks "
        "twice. Turn it off where the disks are slower than the network.",
    ),
    cfg.FloatOpt(
        "retry_timeout",
        default=120.0,
        min=0,
        max=86400,
        help="Seconds that a copy tries again while the peer, or this host's "
        "libvirtd, is away. It goes on where it was.",
    ),
    cfg.IntOpt(
        "resume_age",
        default=3600,
        min=0,
        max=30 * 86400,
        help="Seconds that what a failed move has sent stays at the peer, with its "
        "room reserved, so that the next attempt sends only what is missing. 0: "
        "it goes at once.",
    ),
    cfg.BoolOpt(
        "keep_retired",
        default=False,
        help="Keep an instance's volumes when its move away from here is confirmed, "
        "so that moving back sends only what changed. They are never started. When "
        "room is short for a move to here or a new instance, the oldest go first; "
        "`virtmigrate host retired` lists and removes them.",
    ),
]

receiver_opts = [
    cfg.BoolOpt(
        "receiver",
        default=True,
        help="Serve peers' requests in the driver's process. Turn it off where "
        "`virtmigrate receiver` runs.",
    ),
    cfg.BoolOpt(
        "accept_moves",
        default=False,
        help="Let sources finish moves to this host, and have instances given back, "
        "without a compute service here: for the command `virtmigrate`. Whoever may "
        "write to this host's mailbox can then bring instances here.",
    ),
    cfg.FloatOpt(
        "receiver_timeout",
        default=10.0,
        min=0.1,
        max=600,
        help="Seconds within which a peer's receiver has to begin with a request. "
        "After that the copy is read back over the network.",
    ),
    cfg.FloatOpt(
        "receiver_interval",
        default=5.0,
        min=0.1,
        max=60,
        help="Seconds between two looks for requests where changes of the mailbox's "
        "directory cannot be watched; while a transfer is open it looks more often.",
    ),
]

backend_list_opts = [
    cfg.ListOpt(
        "enabled_backends",
        default=["local"],
        help="Backends of this host; each has a group of options of this name.",
    ),
    cfg.StrOpt(
        "file_backend",
        help="The backend, of kind dir, that holds instance records, NVRAM and "
        "memory images. Default: the first of enabled_backends.",
    ),
]

# oslo.config registers these once per backend, in the backend's group.
backend_opts = [
    cfg.StrOpt(
        "kind",
        default="dir",
        help="What stores the volumes. Known: dir.",
    ),
    cfg.StrOpt(
        "path",
        default="/var/lib/virtmigrate/storage",
        help="Directory of the backend on the libvirt host. Its pools lie below "
        "it and are made through libvirt.",
    ),
    cfg.IntOpt(
        "volume_uid",
        min=0,
        help="Owner of volumes and directories, a number. Default: libvirt's.",
    ),
    cfg.IntOpt(
        "volume_gid",
        min=0,
        help="Group of volumes and directories, a number. Set it to the group "
        "of the service's user so that it may read disks directly.",
    ),
    cfg.StrOpt(
        "volume_mode",
        default="0600",
        regex=r"^0[0-7]{3}$",
        help="Mode of volumes, octal. Directories get all x bits besides: "
        "QEMU's user, who owns an instance's volumes while it runs, passes through.",
    ),
    cfg.StrOpt(
        "volume_label",
        help="SELinux label of volumes. Default: what the policy gives.",
    ),
    cfg.IntOpt(
        "reserved_mib",
        default=0,
        min=0,
        help="MiB of the backend's room that virtmigrate leaves free.",
    ),
]

ALL_HOST_OPTS = [
    *host_opts,
    *timeout_opts,
    *transfer_opts,
    *receiver_opts,
    *backend_list_opts,
]


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """Return all options for oslo-config-generator."""
    return [(GROUP, ALL_HOST_OPTS), ("local", backend_opts)]


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
    conf.register_opts(backend_opts, group=name)
    _check_values(conf, name, backend_opts)


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
