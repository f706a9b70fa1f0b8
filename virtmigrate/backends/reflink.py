# SPDX-License-Identifier: Apache-2.0
"""Files that share their blocks, until one of them is written to (xfs, btrfs)."""

import errno
import fcntl
import os

_FICLONE = 0x40049409
"""_IOW(0x94, 9, int), see ioctl_ficlone(2)."""

_CANNOT = {
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EXDEV,
    errno.EINVAL,
    errno.EPERM,
}
"""What a file system says that has no such thing, or not for these two files."""


def clone(source: int, target: int, length: int, size: int) -> bool:
    """Make a file hold what another one holds; False where blocks cannot be shared.

    Arguments:
        source: descriptor of a file of at least `length` bytes.
        target: descriptor of one whose content counts nothing.
        size: bytes that it has afterwards; zeros follow the source's.
    """
    # Blocks at an end that is not whole are shared with an end only.
    os.ftruncate(target, 0)
    try:
        fcntl.ioctl(target, _FICLONE, source)
        cloned = True
    except OSError as e:
        if e.errno not in _CANNOT:
            raise
        cloned = False
    if cloned:
        os.ftruncate(target, length)
    os.ftruncate(target, size)
    return cloned
