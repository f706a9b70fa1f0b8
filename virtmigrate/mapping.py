# SPDX-License-Identifier: Apache-2.0
"""A compute service's objects, read by their attributes, into ours."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oslo_config import cfg
from oslo_utils import strutils

from virtmigrate import domainxml, errors, livesnapshot, placement, sources
from virtmigrate.migration import plan
from virtmigrate.model import Role
from virtmigrate.spawning import Wanted
from virtmigrate.units import GiB, MiB

_TRANSIENT = "virtmigrate:transient"
"""The extra spec that lists disks whose writes are thrown away: vdb, by commas."""
_PROPERTY = "virtmigrate_transient"
"""The same of an image."""


def wanted(
    instance: Any,
    image_meta: Any,
    network_info: Any,
    *,
    image: Path | sources.Source,
    owner: str,
) -> Wanted:
    """Return the new instance that the caller describes."""
    flavor, firmware = instance.flavor, _field(image_meta, "loader", None)
    template = _field(image_meta, "nvram_template", None)
    drive = getattr(instance, "config_drive_path", None)
    ephemeral = int(flavor.ephemeral_gb) * GiB
    sizes = (ephemeral,) if ephemeral else ()
    return Wanted(
        uuid=instance.uuid,
        name=instance.name,
        memory=int(flavor.memory_mb) * MiB,
        vcpus=int(flavor.vcpus),
        image=image,
        root_size=int(flavor.root_gb) * GiB,
        ephemeral_sizes=tuple(_field(instance, "ephemeral_sizes", sizes)),
        config_drive=Path(drive) if drive else None,
        loader=firmware,
        nvram_template=Path(template) if template else None,
        machine=_field(image_meta, "machine_type", None),
        interfaces=interfaces(network_info),
        demand=_demand(flavor),
        transient=_transient(flavor, image_meta),
        owner=owner,
    )


def image(conf: cfg.ConfigOpts, context: Any, image_meta: Any) -> Path | sources.Source:
    """Return where an image comes from: see VirtMigrateDriver.spawn.

    `saved` names one that was made of an instance, into the cache. A caller that has a
    source of its own gives it as `source`.

    Raises Unsupported for a file without an id that is not raw: nobody would look at
    its header.
    """
    own = _field(image_meta, "source", None)
    if own is not None:
        source: sources.Source = own
        return source
    fmt = str(_field(image_meta, "disk_format", "raw"))
    path, uuid = _field(image_meta, "path", None), _field(image_meta, "id", None)
    if saved := _field(image_meta, "saved", None):
        return sources.SavedImage(str(saved))
    if path and not uuid:
        if fmt != "raw":
            raise errors.Unsupported(
                backend="local",
                operation=f"make a disk of a {fmt} file",
                reason="without an id it is copied as it is, and has to be raw",
            )
        return Path(str(path))
    least = int(_field(image_meta, "min_disk", 0) or 0) * GiB
    checksum, url = (
        _field(image_meta, "checksum", None),
        _field(image_meta, "url", None),
    )
    if path:
        proof = _checksum(str(checksum)) if checksum else None
        return sources.LocalFile(Path(str(path)), fmt, proof, least)
    if url and checksum:
        proof = _checksum(str(checksum))
        return sources.WebFile(
            str(url), fmt, proof, sources.Terms.configured(conf), least
        )
    return sources.service_image(conf, str(uuid or url or "-"))


def named_image(
    conf: cfg.ConfigOpts, source: str, fmt: str = "raw", checksum: str | None = None
) -> sources.Source:
    """Return the image that a person names: a file, an address, a service's id."""
    meta = {"disk_format": fmt, "checksum": checksum, "id": source}
    if source.startswith(("http://", "https://")):
        meta["url"] = source
    elif "/" in source or Path(source).exists():
        meta["path"] = str(Path(source).absolute())
    found = image(conf, None, meta)
    assert not isinstance(found, Path)
    return found


def quiescing(image_meta: Any) -> livesnapshot.Quiesce:
    """Return whether an image wants its guests quiesced.

    By its properties os_require_quiesce (or fail) and hw_qemu_guest_agent (if it can).
    """
    if _is_set(image_meta, "os_require_quiesce"):
        return livesnapshot.Quiesce.DEMAND
    if _is_set(image_meta, "hw_qemu_guest_agent"):
        return livesnapshot.Quiesce.TRY
    return livesnapshot.Quiesce.NO


def saved_properties(instance: Any) -> dict[str, str]:
    """Return what an image service keeps beside the image of an instance."""
    kept = {
        "owner_id": "project_id",
        "kernel_id": "kernel_id",
        "ramdisk_id": "ramdisk_id",
        "os_type": "os_type",
        "architecture": "architecture",
    }
    found = {name: _field(instance, field, None) for name, field in kept.items()}
    told = {name: str(value) for name, value in found.items() if value}
    return {"image_location": "snapshot", "image_state": "available", **told}


def request(
    context: Any,
    instance: Any,
    dest: str,
    flavor: Any,
    timeout: float,
    retry_interval: float,
) -> plan.Request:
    """Return the move that the caller wants; no flavor changes nothing."""
    sizes: dict[Role, int] = {}
    memory = vcpus = None
    asked = _demand(flavor or getattr(instance, "flavor", None))
    if flavor is not None:
        memory, vcpus = int(flavor.memory_mb) * MiB, int(flavor.vcpus)
        wanted_sizes = {
            Role.ROOT: int(flavor.root_gb) * GiB,
            Role.EPHEMERAL: int(flavor.ephemeral_gb) * GiB,
        }
        sizes = {role: size for role, size in wanted_sizes.items() if size}
    return plan.Request(
        instance=instance.uuid,
        dest=dest,
        request=str(getattr(context, "request_id", None) or "-"),
        memory=memory,
        vcpus=vcpus,
        sizes=sizes,
        demand=asked,
        timeout=timeout,
        retry_interval=retry_interval or 1,
    )


def interfaces(network_info: Any) -> tuple[domainxml.Interface, ...]:
    """Return the interfaces of Nova's network_info, or of one like it."""
    found: Iterable[Mapping[str, Any]] = network_info or ()
    return tuple(_interface(vif) for vif in found)


# Private


def _demand(flavor: Any) -> placement.Demand:
    return placement.demand(_field(flavor, "extra_specs", None) or {})


def _transient(flavor: Any, image_meta: Any) -> frozenset[str]:
    """Return the targets that a flavor or an image says are transient."""
    specs = _field(flavor, "extra_specs", None) or {}
    properties = _field(image_meta, "properties", None) or {}
    listed = f"{specs.get(_TRANSIENT, '')},{_field(properties, _PROPERTY, None) or ''}"
    return frozenset(each.strip() for each in listed.split(",") if each.strip())


def _checksum(text: str) -> sources.Checksum:
    algorithm, _, digest = text.partition(":")
    try:
        return sources.Checksum(algorithm, digest)
    except ValueError as e:
        raise errors.ImageUnavailable(image=text, reason=e) from e


def _interface(vif: Mapping[str, Any]) -> domainxml.Interface:
    network = vif.get("network") or {}
    kind = vif.get("type", "bridge")
    if kind not in ("bridge", "ovs"):
        raise errors.Unsupported(
            backend="network", operation=f"plug a {kind} port", reason="bridge or ovs"
        )
    if (vif.get("details") or {}).get("ovs_hybrid_plug"):
        # Plugged by libvirt, it would bypass what filters its traffic.
        raise errors.Unsupported(
            backend="network",
            operation="plug a hybrid ovs port",
            reason="its security groups are rules of a bridge of its own; Neutron's "
            "agent can have the firewall driver openvswitch instead",
        )
    ovs = kind == "ovs"
    return domainxml.Interface(
        mac=str(vif["address"]),
        bridge=str(network.get("bridge") or "br-int"),
        kind=domainxml.InterfaceKind(kind),
        interface_id=(vif.get("ovs_interfaceid") or vif.get("id")) if ovs else None,
        device=vif.get("devname"),
    )


def _is_set(image_meta: Any, name: str) -> bool:
    """Tell whether a property says yes. Nova's objects raise for those not set."""
    properties = _field(image_meta, "properties", None)
    get = getattr(properties, "get", None)
    value = get(name, None) if get else None
    return strutils.bool_from_string(value)


def _field(source: Any, name: str, default: Any) -> Any:
    if isinstance(source, Mapping):
        return source.get(name, default)
    return getattr(source, name, default)
