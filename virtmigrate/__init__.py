# SPDX-License-Identifier: Apache-2.0
"""Move, snapshot, clone and drain libvirt/QEMU instances without SSH."""

__version__ = "0.1.0"
