# SPDX-License-Identifier: Apache-2.0
"""Options of images that come in: what is taken, and what reading one may cost."""

from oslo_config import cfg, types

image_opts = [
    cfg.ListOpt(
        "image_formats",
        default=["raw", "iso", "qcow2"],
        item_type=types.String(
            choices=["raw", "iso", "qcow2", "vmdk", "vdi", "vhd", "vhdx"]
        ),
        help="Formats of images that are taken: raw, iso, qcow2, vmdk, vdi, vhd, vhdx. "
        "Each is one more parser that reads what strangers wrote: add those that "
        "your users need.",
    ),
    cfg.IntOpt(
        "image_max_size_gib",
        default=1024,
        min=1,
        max=65536,
        help="GiB that an image may be, as sent and as a guest sees it. A few KiB can "
        "claim any size.",
    ),
    cfg.IntOpt(
        "image_memory_mib",
        default=1024,
        min=256,
        max=65536,
        help="MiB of address space of a process that reads an image.",
    ),
    cfg.IntOpt(
        "image_cpu_seconds",
        default=30,
        min=1,
        max=3600,
        help="Seconds of processor time that a look at an image may take, and twice as "
        "many by the clock. Raise it where streamOptimized VMDK is taken: such "
        "files are read to their end.",
    ),
    cfg.IntOpt(
        "image_convert_timeout",
        default=3600,
        min=1,
        max=86400,
        help="Seconds that the conversion of an image may take, by the clock and of "
        "processor time.",
    ),
    cfg.StrOpt(
        "image_service_cloud",
        help="The cloud of clouds.yaml whose image service has the images that are "
        "named by an id alone. Needs the extra `glance`.",
    ),
    cfg.FloatOpt(
        "image_source_timeout",
        default=30.0,
        min=0.1,
        max=600,
        help="Seconds that a source of images may take to accept a connection, to "
        "answer, and to send the next bytes.",
    ),
    cfg.FloatOpt(
        "image_retry_timeout",
        default=120.0,
        min=0,
        max=86400,
        help="Seconds without any new byte for which a download tries again. It goes "
        "on where it was.",
    ),
    cfg.StrOpt(
        "image_ca_file",
        help="File with the certificates that sources of images are verified by. "
        "Default: those that Python's requests brings along.",
    ),
]
