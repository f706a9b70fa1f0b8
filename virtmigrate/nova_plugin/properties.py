# SPDX-License-Identifier: Apache-2.0
"""What a flavor, an image and a request ask of a guest: honoured, or refused by name.

Nothing is passed over: what is not in a table here, and is in a namespace that means
something to a guest, is refused. docs/nova.md has the same tables with reasons.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nova import exception

from virtmigrate import placement

ANY = None
"""Honoured whatever it is, or nothing that a guest notices."""
NO = frozenset(["false", "no", "0", "off", "none", "disabled", ""])
"""What is not wanted is what a guest gets anyway."""
NEVER: frozenset[str] = frozenset()

Allowed = frozenset[str] | None


def _only(*values: str) -> frozenset[str]:
    return frozenset(values)


SHARED: Mapping[str, Allowed] = {
    # Of flavors as hw:NAME, of images as hw_NAME.
    "boot_menu": NO,
    "cpu_cores": NEVER,
    "cpu_max_cores": NEVER,
    "cpu_max_sockets": NEVER,
    "cpu_max_threads": NEVER,
    "cpu_policy": _only("shared"),
    "cpu_realtime_mask": NEVER,
    "cpu_sockets": NEVER,
    "cpu_thread_policy": NEVER,
    "cpu_threads": NEVER,
    "ephemeral_encryption": NO,
    "ephemeral_encryption_format": NEVER,
    "locked_memory": NO,
    "maxphysaddr_bits": NEVER,
    "maxphysaddr_mode": NEVER,
    "mem_encryption": NO,
    "mem_encryption_model": NEVER,
    "mem_page_size": _only("small", "any"),
    "numa_nodes": NEVER,
    "pci_numa_affinity_policy": NEVER,
    "pmu": NEVER,
    "redirected_usb_ports": _only("0"),
    "serial_port_count": _only("1"),
    "sound_model": NEVER,
    "tpm_model": NEVER,
    "tpm_version": NEVER,
    "usb_model": NEVER,
    "vif_multiqueue_enabled": NO,
    "viommu_model": NO,
    "virtio_packed_ring": NO,
    "watchdog_action": _only("disabled"),
}

FLAVOR: Mapping[str, Allowed] = {
    **{f"hw:{name}": allowed for name, allowed in SHARED.items()},
    "hw:cpu_dedicated_mask": NEVER,
    "hw:cpu_realtime": NO,
    "hw:emulator_threads_policy": NEVER,
    "hw:hide_hypervisor_id": NO,
    "hw:pmem": NEVER,
    "hw:tpm_secret_security": NEVER,
    # Each guest has a random number generator, and its rate has no limit.
    "hw_rng:allowed": _only("true", "yes", "1", "on"),
    "hw_rng:rate_bytes": NEVER,
    "hw_rng:rate_period": NEVER,
    # A bound of hw_video_ram, which is refused.
    "hw_video:ram_max_mb": ANY,
    "os:secure_boot": _only("disabled", "optional"),
    "hide_hypervisor_id": NO,
    "group_policy": ANY,
    "accel:device_profile": NEVER,
    "pci_passthrough:alias": NEVER,
    placement.BACKEND: ANY,
    placement.TRAITS: ANY,
}

_SCHEDULERS = re.compile(
    r"trait[^:]*:|capabilities:|aggregate_instance_extra_specs:"
    r"|resources[^:]*:(VCPU|MEMORY_MB|DISK_GB|CUSTOM_\w+)$"
)
"""Extra specs that choose a host, and say nothing of the guest."""
_GUESTS = re.compile(r"(hw|hw_\w+|os|quota|accel|pci_passthrough|vmware|virtmigrate):")
"""Namespaces whose unknown members are refused; resources are, too."""

IMAGE: Mapping[str, Allowed] = {
    **{f"hw_{name}": allowed for name, allowed in SHARED.items()},
    "hw_architecture": _only("x86_64"),
    "hw_auto_disk_config": ANY,
    "hw_cdrom_bus": _only("sata"),
    "hw_device_id": NEVER,
    "hw_disk_bus": _only("virtio"),
    "hw_disk_type": NEVER,
    "hw_emulation_architecture": NEVER,
    "hw_ephemeral_encryption_secret_uuid": NEVER,
    "hw_firmware_stateless": NO,
    "hw_firmware_type": _only("bios"),
    "hw_floppy_bus": NEVER,
    "hw_input_bus": NEVER,
    "hw_ipxe_boot": NO,
    "hw_machine_type": ANY,
    "hw_numa_cpus": NEVER,
    "hw_numa_mem": NEVER,
    "hw_pointer_model": _only("ps2mouse"),
    # The channel for an agent is always there.
    "hw_qemu_guest_agent": ANY,
    # Of rescues, which are refused.
    "hw_rescue_bus": ANY,
    "hw_rescue_device": ANY,
    "hw_rng_model": _only("virtio"),
    "hw_scsi_model": NEVER,
    "hw_time_hpet": NO,
    "hw_video_model": _only("none"),
    "hw_video_ram": NEVER,
    "hw_vif_model": _only("virtio"),
    "hw_vm_mode": _only("hvm"),
    # The service's or the scheduler's own business, or of other hypervisors.
    "img_bdm_v2": ANY,
    "img_bittorrent": ANY,
    "img_block_device_mapping": ANY,
    "img_cache_in_nova": ANY,
    "img_compression_level": ANY,
    "img_config_drive": ANY,
    "img_hide_hypervisor_id": NO,
    "img_hv_requested_version": ANY,
    "img_hv_type": _only("qemu", "kvm"),
    "img_linked_clone": ANY,
    "img_mappings": ANY,
    "img_owner_id": ANY,
    "img_root_device_name": ANY,
    "img_signature": ANY,
    "img_signature_certificate_uuid": ANY,
    "img_signature_hash_method": ANY,
    "img_signature_key_type": ANY,
    "img_use_agent": NO,
    "img_version": ANY,
    "os_admin_user": ANY,
    "os_command_line": NEVER,
    "os_distro": ANY,
    # Of images that are made of its servers.
    "os_require_quiesce": ANY,
    "os_secure_boot": _only("disabled", "optional"),
    "os_skip_agent_inject_files_at_boot": ANY,
    "os_skip_agent_inject_ssh": ANY,
    # Windows wants a clock in local time, and enlightenments.
    "os_type": _only("linux"),
    "traits_required": ANY,
}


def demand_flavor(flavor: Any) -> None:
    """Raise InvalidInput that names what a flavor asks for and does not get."""
    refused = [f"extra spec {each}" for each in _refused_specs(flavor)]
    if flavor.swap:
        refused.append(f"a swap disk (flavor.swap={flavor.swap})")
    _demand_none(refused)


def demand_image(image_meta: Any) -> None:
    """Raise InvalidInput that names each property that is not honoured."""
    properties, refused = image_meta.properties, []
    for name in sorted(properties.fields):
        if not properties.obj_attr_is_set(name):
            continue
        value = getattr(properties, name)
        if value is not None and not _fits(IMAGE.get(name, NEVER), value):
            refused.append(f"image property {name}={value}")
    _demand_none(refused)


def demand_instance(instance: Any) -> None:
    """Raise InvalidInput that names what a request asks for besides."""
    asked = {
        "a NUMA topology, pinned CPUs or huge pages": instance.numa_topology,
        "PCI devices": instance.pci_requests and instance.pci_requests.requests,
        "trusted certificates": _value(instance, "trusted_certs"),
        "resources of their own, such as persistent memory": _value(
            instance, "resources"
        ),
        "a kernel beside its image": instance.kernel_id,
        "a ramdisk beside its image": instance.ramdisk_id,
    }
    _demand_none([what for what, value in asked.items() if value])


def machine_type(image_meta: Any) -> str | None:
    """Return the machine type that an image asks for."""
    found = image_meta.properties.get("hw_machine_type")
    return str(found) if found else None


def rule_of(spec: str) -> Allowed:
    """Return the values that an extra spec may have here; ANY for all."""
    if spec in FLAVOR:
        return FLAVOR[spec]
    if _SCHEDULERS.match(spec):
        return ANY
    if _GUESTS.match(spec) or spec.startswith("resources"):
        return NEVER
    # An operator's own words, for filters of the scheduler.
    return ANY


# Private


def _refused_specs(flavor: Any) -> Iterator[str]:
    specs = _value(flavor, "extra_specs") or {}
    for name, value in sorted(specs.items()):
        if not _fits(rule_of(name), value):
            yield f"{name}={value}"


def _fits(allowed: Allowed, value: object) -> bool:
    return allowed is None or str(value).strip().lower() in allowed


def _value(source: Any, name: str) -> Any:
    return getattr(source, name) if source.obj_attr_is_set(name) else None


def _demand_none(refused: list[str]) -> None:
    if refused:
        raise exception.InvalidInput(
            reason=f"the virtmigrate driver does not do: {', '.join(refused)}. "
            "Nothing was made or changed"
        )
