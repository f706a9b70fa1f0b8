# SPDX-License-Identifier: Apache-2.0
"""Options that each backend has in a group of its own name."""

from oslo_config import cfg

# oslo.config registers these once per backend, in the backend's group.
backend_opts = [
    cfg.StrOpt(
        "kind",
        default="dir",
        choices=[
            ("dir", "files in a directory of this host"),
            ("shared_dir", "files in a directory that several hosts have mounted"),
            ("rbd", "images in a pool of a Ceph cluster"),
            ("lvm", "logical volumes in a volume group of this host"),
        ],
        help="What stores the volumes.",
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
    cfg.ListOpt(
        "traits",
        default=[],
        help="What this backend is, as words of your choice such as media=ssd. A "
        "flavor asks for them by its extra spec virtmigrate:traits, or for a backend "
        "by its name, by virtmigrate:backend.",
    ),
]

# Each is read by some kinds only.
kind_opts = [
    cfg.StrOpt(
        "clones",
        default="auto",
        choices=[
            (
                "auto",
                "what is cheapest: overlay for dir and shared_dir, but copy with "
                "preallocation = falloc; the cluster's own clones for rbd; copy for "
                "lvm",
            ),
            ("copy", "all kinds: its data is copied, or shared by the file system"),
            ("overlay", "dir, shared_dir: a qcow2 layer over the image"),
            (
                "snapshot",
                "lvm: a writable snapshot of the image, made at once, as long as the "
                "image and for good, with room for all that can change; it writes "
                "slower. Disks that are to be longer are copied, and so are all where "
                "virtmigrate is not root on the group's own host",
            ),
        ],
        help="How a disk is made of an image of the same backend. Those that are made "
        "stay as they are when this changes.",
    ),
    cfg.StrOpt(
        "preallocation",
        default="none",
        choices=[
            ("none", "files have holes and take room as they are written"),
            (
                "falloc",
                "raw files get all of their room when they are made: a guest never "
                "finds its host full, and copies within the backend share no blocks",
            ),
        ],
        help="dir, shared_dir: when volumes get their room. Layers over volumes, and "
        "what only libvirt can make longer, have holes all the same.",
    ),
    cfg.StrOpt(
        "lock_url",
        regex=r"^etcd3\+https?://.+$",
        help="shared_dir: the etcd where the hosts that share the directory take their "
        "locks, as tooz writes it: etcd3+http://HOST:2379, or etcd3+https:// with "
        "?ca_cert=FILE&cert_cert=FILE&cert_key=FILE. The same on all hosts. It needs "
        "virtmigrate[etcd]. Not set, and no lock_files: hosts do not lock against each "
        "other. What they publish is safe all the same, and work may be done twice.",
    ),
    cfg.BoolOpt(
        "lock_files",
        default=False,
        help="shared_dir: locks are taken on files in PATH/locks. Only where the file "
        "system holds fcntl locks between hosts: NFS 4, CephFS, GFS2, OCFS2 with its "
        "userspace stack. Not on NFS with nolock or local_lock, and not on GlusterFS "
        "or FUSE without that. How long a dead host keeps its locks is the file "
        "system's affair.",
    ),
    cfg.StrOpt(
        "lvm_group",
        default="virtmigrate",
        regex=r"^[A-Za-z0-9+_.][A-Za-z0-9+_.-]*$",
        help="lvm: the volume group. It must be there, and no other pool of libvirt "
        "may have it.",
    ),
    cfg.StrOpt(
        "volume_clear",
        default="zero",
        choices=[
            ("zero", "zeros are written over it"),
            (
                "discard",
                "its blocks are discarded, where this process may; else zeroed",
            ),
            ("none", "nothing; it is deleted at once"),
        ],
        help="lvm: what becomes of a volume's bytes when it is removed. A new one is "
        "always zeroed before anybody uses it.",
    ),
    cfg.StrOpt(
        "rbd_pool",
        default="volumes",
        help="rbd: the RADOS pool.",
    ),
    cfg.StrOpt(
        "rbd_user",
        default="virtmigrate",
        help="rbd: the user of Ceph, without `client.`. It needs `profile rbd` on the "
        "monitors and on the pool.",
    ),
    cfg.StrOpt(
        "rbd_ceph_conf",
        default="/etc/ceph/ceph.conf",
        help="rbd: path of ceph.conf; it names the monitors, and the user's keyring if "
        "that is not in /etc/ceph.",
    ),
    cfg.StrOpt(
        "rbd_secret_uuid",
        help="rbd: UUID of the secret of this host's libvirt that holds the user's "
        "key. Not set: Ceph asks for no authentication.",
    ),
    cfg.FloatOpt(
        "rbd_timeout",
        default=30.0,
        min=1,
        max=600,
        help="rbd: seconds that the cluster may take to answer.",
    ),
]
