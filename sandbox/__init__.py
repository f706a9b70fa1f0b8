# SPDX-License-Identifier: Apache-2.0
"""Libvirt hosts on one machine, for tests, benchmarks and the demo."""

from sandbox.ceph import Ceph
from sandbox.errors import SandboxError
from sandbox.host import Host
from sandbox.machine import Machine
from sandbox.sandbox import Sandbox

__all__ = ["Ceph", "Host", "Machine", "Sandbox", "SandboxError"]
