# SPDX-License-Identifier: Apache-2.0
"""Where Nova looks for `compute_driver = virtmigrate.VirtMigrateDriver`.

A leaf in Nova's own tree: neither `nova` nor `nova.virt` is a package of ours, so
that nothing of Nova is shadowed. It is found where both are installed into the same
site-packages; elsewhere virtmigrate.nova_plugin.hook shows the way.
"""

from virtmigrate.nova_plugin.driver import VirtMigrateDriver as VirtMigrateDriver
