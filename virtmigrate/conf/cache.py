# SPDX-License-Identifier: Apache-2.0
"""Options of the image cache: of a host, and of each backend."""

from oslo_config import cfg

cache_opts = [
    cfg.StrOpt(
        "image_staging_path",
        help="Directory of this host where images are staged until they are checked "
        "and filled into a backend. It needs room for the largest image, twice where "
        "it has to be converted. Default: `staging` in state_path.",
    ),
    cfg.FloatOpt(
        "image_lease",
        default=30.0,
        min=1,
        max=3600,
        help="Seconds without a sign of life after which another one takes over what "
        "somebody fetches; the same for all hosts that share a backend.",
    ),
    cfg.FloatOpt(
        "image_wait_timeout",
        default=7200.0,
        min=1,
        max=604800,
        help="Seconds that others wait for one who fetches an image, gives signs of "
        "life, and does not advance. More than image_convert_timeout and "
        "image_retry_timeout: a conversion does not tell how far it is.",
    ),
    cfg.ListOpt(
        "image_peers",
        default=[],
        help="Peers whose image caches are asked before an image's source, in this "
        "order, by the names that peer_uri takes; for images that have a strong "
        "digest. They run the same release with a receiver, and transfer_uri shows "
        "their pools of disks. Of an image that was converted they are believed that "
        "it is what its source gave: name only hosts that are trusted as this one is.",
    ),
    cfg.IntOpt(
        "image_seed_bandwidth_mib",
        default=0,
        min=0,
        help="MiB per second that one process reads from sources of images that are "
        "fetched before they are needed (`cache_image`), all together; 0: no limit. "
        "What an instance needs at once is not held back, unless it waits for such a "
        "fetch; what comes from image_peers is bounded by bandwidth_mib.",
    ),
    cfg.IntOpt(
        "image_seed_max",
        default=1,
        min=1,
        max=64,
        help="Images that this host fetches at once before they are needed; others "
        "wait, for queue_timeout at most.",
    ),
]

# oslo.config registers these once per backend, in the backend's group.
limit_opts = [
    cfg.IntOpt(
        "image_max_count",
        default=0,
        min=0,
        help="Images that the backend keeps; 0: any number. These limits are kept by "
        "dropping idle images, the least recently used first. One that a disk stands "
        "on, that a peer holds or that is pinned stays, whatever they say.",
    ),
    cfg.IntOpt(
        "image_max_gib",
        default=0,
        min=0,
        help="GiB that the backend's images take; 0: any number.",
    ),
    cfg.IntOpt(
        "image_max_age",
        default=604800,
        min=0,
        help="Seconds after its last use for which an idle image is kept; 0: for ever.",
    ),
    cfg.IntOpt(
        "image_min_free_mib",
        default=0,
        min=0,
        help="MiB of the backend that idle images make room for.",
    ),
]
