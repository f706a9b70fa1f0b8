# SPDX-License-Identifier: Apache-2.0
"""The same driver, for `compute_driver = virtmigrate.driver.VirtMigrateDriver`."""

from virtmigrate.nova_plugin.driver import VirtMigrateDriver as VirtMigrateDriver
