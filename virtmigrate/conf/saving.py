# SPDX-License-Identifier: Apache-2.0
"""Options of images that are made of instances."""

from oslo_config import cfg

saving_opts = [
    cfg.StrOpt(
        "image_save_format",
        default="qcow2",
        choices=["qcow2", "raw"],
        help="Format of images that are made of instances, unless the caller says it. "
        "A qcow2 image has only the data; of a raw one all zeros are sent to an image "
        "service, too, but a disk can be cloned from it at once.",
    ),
    cfg.BoolOpt(
        "image_save_compress",
        default=False,
        help="Compress qcow2 images that are made of instances, unless the caller says "
        "it. It takes a processor's time, and room in image_staging_path for one "
        "image; disks in Ceph and LVM cannot be compressed.",
    ),
    cfg.IntOpt(
        "image_save_timeout",
        default=14400,
        min=10,
        max=604800,
        help="Seconds that the making of an image may take, unless the caller says "
        "it. Until its end the guest writes to layers, which take room.",
    ),
    cfg.IntOpt(
        "image_save_bandwidth_mib",
        default=0,
        min=0,
        help="MiB per second that one image is read with, unless the caller says it; "
        "0: no limit but that of host_bandwidth_mib.",
    ),
    cfg.IntOpt(
        "image_save_max",
        default=2,
        min=1,
        max=64,
        help="Images that this host makes of instances at once; others wait, for "
        "queue_timeout at most, before their guests are touched.",
    ),
    cfg.FloatOpt(
        "image_save_answer_timeout",
        default=600.0,
        min=1,
        max=86400,
        help="Seconds that the image service may take to say that it has an image, "
        "after the last byte was sent. It may have to write it elsewhere first.",
    ),
]
