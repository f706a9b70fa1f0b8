# SPDX-License-Identifier: Apache-2.0
"""What is said of Nova's methods, extra specs and properties, against Nova itself."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from nova import exception, objects
from nova.api.validation.extra_specs import validators
from nova.objects import image_meta
from nova.virt import driver as nova_driver

from virtmigrate import errors
from virtmigrate.nova_plugin import hook, properties, translation
from virtmigrate.nova_plugin.driver import VirtMigrateDriver

objects.register_all()

DOCS = (Path(__file__).parents[2] / "docs/nova.md").read_text()
_LINES = re.findall(
    r"^\| `(\w+)` \| (supported|refused|not needed) \|", DOCS, re.MULTILINE
)
METHODS: dict[str, str] = dict(_LINES)
BASE: Any = nova_driver.ComputeDriver


def functions(of: Any) -> dict[str, Any]:
    found = inspect.getmembers(of, inspect.isfunction)
    return {name: each for name, each in found if not name.startswith("_")}


def raises_not_implemented(method: Any) -> bool:
    return "raise NotImplementedError" in inspect.getsource(method)


# Methods


def test_every_method_stands_in_the_table() -> None:
    assert set(METHODS) == set(functions(BASE))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_the_table_says_of_a_method(name: str) -> None:
    base, ours = functions(BASE)[name], functions(VirtMigrateDriver)[name]
    if METHODS[name] == "supported":
        assert ours is not base
        assert not raises_not_implemented(ours)
    elif METHODS[name] == "refused":
        assert "raise exception." in inspect.getsource(ours) or (
            ours is base and raises_not_implemented(base)
        )
    else:
        assert ours is base


@pytest.mark.parametrize("name", sorted(functions(BASE)))
def test_arguments_of_nova_are_taken(name: str) -> None:
    """By position and by name, whatever else a later Nova passes."""
    base = inspect.signature(functions(BASE)[name]).parameters
    ours = inspect.signature(functions(VirtMigrateDriver)[name]).parameters
    assert list(ours)[: len(base)] == list(base)


def test_leaf_is_found_where_nova_is_elsewhere() -> None:
    found = hook.Finder().find_spec("nova.virt.virtmigrate")
    assert found is not None and found.origin is not None
    assert Path(found.origin).exists()
    assert hook.Finder().find_spec("nova.virt.libvirt") is None


# Extra specs and properties


def test_every_image_property_has_a_rule() -> None:
    assert set(properties.IMAGE) == set(image_meta.ImageMetaProps.fields)


@pytest.mark.parametrize("name", sorted({*properties.IMAGE, *properties.FLAVOR}))
def test_rule_stands_in_the_page(name: str) -> None:
    assert f"`{name}`" in DOCS


@pytest.mark.parametrize("name", sorted(validators.VALIDATORS))
def test_extra_spec_that_nova_knows(name: str) -> None:
    """Honoured for what the page names; refused is what means something to a guest."""
    scheduling = ("trait", "capabilities:", "aggregate_instance", "group_policy")
    rule = properties.rule_of(re.sub(r"\{.*?\}", "1", name))
    if name.startswith(scheduling):
        assert rule is properties.ANY
    elif name.startswith(("quota:", "vmware:", "accel:", "pci_passthrough:")):
        assert rule == properties.NEVER


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("hw:cpu_policy", "dedicated"),
        ("hw:mem_page_size", "large"),
        ("hw:numa_nodes", "1"),
        ("hw:tpm_version", "2.0"),
        ("hw:a_name_of_tomorrow", "1"),
        ("hw:vif_multiqueue_enabled", "true"),
        ("os:secure_boot", "required"),
        ("quota:cpu_shares", "1"),
        ("pci_passthrough:alias", "gpu:1"),
        ("resources:VGPU", "1"),
        ("resources2:PCPU", "1"),
        ("virtmigrate:backends", "fast"),
    ],
)
def test_extra_spec_is_refused_by_name(spec: str, value: str) -> None:
    flavor = objects.Flavor(extra_specs={spec: value}, swap=0)
    with pytest.raises(exception.InvalidInput, match=f"{spec}={value}"):
        properties.demand_flavor(flavor)


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("hw:cpu_policy", "shared"),
        ("hw:vif_multiqueue_enabled", "False"),
        ("virtmigrate:backend", "fast"),
        ("trait:CUSTOM_VIRTMIGRATE_BACKEND_FAST", "required"),
        ("resources:CUSTOM_LICENSE", "1"),
        ("resources1:VCPU", "1"),
        ("mine:anything", "at all"),
        ("ssd", "true"),
    ],
)
def test_extra_spec_is_taken(spec: str, value: str) -> None:
    properties.demand_flavor(objects.Flavor(extra_specs={spec: value}, swap=0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hw_firmware_type", "uefi"),
        ("hw_disk_bus", "scsi"),
        ("hw_tpm_version", "2.0"),
        ("os_type", "windows"),
        ("hw_watchdog_action", "reset"),
        ("hw_numa_nodes", 2),
    ],
)
def test_property_is_refused_by_name(name: str, value: object) -> None:
    meta = objects.ImageMeta.from_dict({"properties": {name: value}})
    with pytest.raises(exception.InvalidInput, match=f"{name}={value}"):
        properties.demand_image(meta)


def test_properties_are_taken() -> None:
    values = {"hw_machine_type": "pc", "hw_disk_bus": "virtio", "os_distro": "debian"}
    meta = objects.ImageMeta.from_dict({"properties": values})
    properties.demand_image(meta)
    assert properties.machine_type(meta) == "pc"


def test_swap_is_refused() -> None:
    with pytest.raises(exception.InvalidInput, match="swap"):
        properties.demand_flavor(objects.Flavor(extra_specs={}, swap=64))


# Errors

WORDS: list[tuple[errors.Error, type[Exception]]] = [
    (
        errors.MigrationRefused(instance="i", reason="r"),
        exception.InstanceFaultRollback,
    ),
    (
        errors.MigrationRolledBack(
            instance="i", operation="o", reason="r", state="running", host="h", debts=""
        ),
        exception.InstanceFaultRollback,
    ),
    (
        errors.MigrationUndecided(instance="i", operation="o", peer="p", reason="r"),
        exception.MigrationError,
    ),
    (errors.InstanceNotFound(instance="i", host="h"), exception.InstanceNotFound),
    (
        errors.NotEntitled(host="h", instance="i", reason="r"),
        exception.InstancePowerOnFailure,
    ),
    (errors.ImageRefused(image="i", reason="r"), exception.ImageUnacceptable),
    (
        errors.NoBackend(host="h", wanted="w", size="1 B"),
        exception.ComputeResourcesUnavailable,
    ),
    (
        errors.ConfigurationError(reason="r"),
        exception.InvalidConfiguration,
    ),
    (errors.JournalBroken(path="p", reason="r"), exception.NovaException),
]


@pytest.mark.parametrize(
    ("error", "kind"), WORDS, ids=[type(error).__name__ for error, _ in WORDS]
)
def test_error_is_told_in_words_of_nova(
    error: errors.Error, kind: type[Exception]
) -> None:
    with pytest.raises(exception.NovaException) as caught, translation.told("i"):
        raise error
    assert type(caught.value) is kind
    if kind is not exception.InstanceNotFound:
        assert str(error) in str(caught.value)
