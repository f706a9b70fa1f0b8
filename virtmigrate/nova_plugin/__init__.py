# SPDX-License-Identifier: Apache-2.0
"""OpenStack Nova drives virtmigrate: its objects and exceptions to ours and back.

Nothing else of the package imports Nova, and nothing here is imported without it. No
module is imported here: hook.py is loaded at each start of Python.
"""
