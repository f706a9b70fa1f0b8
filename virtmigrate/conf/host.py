# SPDX-License-Identifier: Apache-2.0
"""Options of this host, and how long it waits."""

from oslo_config import cfg

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
    cfg.IntOpt(
        "lock_lease",
        default=30,
        min=1,
        max=3600,
        help="Seconds until a lock that hosts share is free after its holder died or "
        "was cut off. Shorter: others wait less. Longer: a storage that stalls loses "
        "fewer. The same on all hosts.",
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
        "freeze_timeout",
        default=10,
        min=1,
        max=300,
        help="Seconds that a guest's agent gets to freeze its file systems, and to "
        "thaw them. Raise it where guests write much: what they wrote is flushed.",
    ),
    cfg.IntOpt(
        "freeze_limit",
        default=30,
        min=1,
        max=600,
        help="Seconds that a guest may be frozen. Then it is thawed, and what it was "
        "frozen for fails. Windows does not hold it for more than 10.",
    ),
    cfg.IntOpt(
        "reclaim_age",
        default=86400,
        min=60,
        max=30 * 86400,
        help="Seconds after which what a peer began to send here, and never "
        "finished, is removed, and an instance that the compute service awaits here, "
        "and that never came live, is awaited no more. Longer than the longest copy "
        "takes.",
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
