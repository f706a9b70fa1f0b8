# SPDX-License-Identifier: Apache-2.0
"""A domain's XML: built whole, read as it stands, edited in single places.

Chains and formats are always written out, and never filled in when read:
libvirt probes whatever a domain leaves open.
"""

from __future__ import annotations

from virtmigrate.domainxml.builder import AGENT_CHANNEL, build, cpu_xml
from virtmigrate.domainxml.edit import (
    with_console_log,
    with_disks,
    with_emulator,
    with_interfaces,
    with_nvram,
    with_size,
)
from virtmigrate.domainxml.guard import guarded, unguarded, with_transient
from virtmigrate.domainxml.metadata import PREFIX as METADATA_PREFIX
from virtmigrate.domainxml.metadata import URI as METADATA_URI
from virtmigrate.domainxml.metadata import (
    metadata_element,
    metadata_of,
    metadata_values,
    with_metadata,
)
from virtmigrate.domainxml.model import (
    Auth,
    Cpu,
    Disk,
    DiskDevice,
    Domain,
    Firmware,
    FoundDisk,
    FoundDomain,
    FoundLayer,
    Interface,
    InterfaceKind,
    Layer,
    SourceType,
    Topology,
)
from virtmigrate.domainxml.portability import obstacles
from virtmigrate.domainxml.reader import (
    agent_state,
    arch,
    console_log,
    cpu,
    cpu_needed,
    disks,
    emulator,
    firmware,
    interfaces,
    machine,
    memory,
    name,
    read,
    uuid,
    vcpus,
    virt_type,
)
from virtmigrate.domainxml.runtime import without_runtime
from virtmigrate.formats import DiskFormat

__all__ = [
    "AGENT_CHANNEL",
    "METADATA_PREFIX",
    "METADATA_URI",
    "Auth",
    "Cpu",
    "Disk",
    "DiskDevice",
    "DiskFormat",
    "Domain",
    "Firmware",
    "FoundDisk",
    "FoundDomain",
    "FoundLayer",
    "Interface",
    "InterfaceKind",
    "Layer",
    "SourceType",
    "Topology",
    "agent_state",
    "arch",
    "build",
    "console_log",
    "cpu",
    "cpu_needed",
    "cpu_xml",
    "disks",
    "emulator",
    "firmware",
    "guarded",
    "interfaces",
    "machine",
    "memory",
    "metadata_element",
    "metadata_of",
    "metadata_values",
    "name",
    "obstacles",
    "read",
    "unguarded",
    "uuid",
    "vcpus",
    "virt_type",
    "with_console_log",
    "with_disks",
    "with_emulator",
    "with_interfaces",
    "with_metadata",
    "with_nvram",
    "with_size",
    "with_transient",
    "without_runtime",
]
