# SPDX-License-Identifier: Apache-2.0
"""A compute service's objects, as Nova's look, into ours."""

import types
from pathlib import Path
from typing import Any

import pytest

from virtmigrate import conf, errors, mapping, sources
from virtmigrate.domainxml import InterfaceKind
from virtmigrate.model import Role
from virtmigrate.units import GiB, MiB


def flavor(**fields: int) -> types.SimpleNamespace:
    values = {"memory_mb": 512, "vcpus": 2, "root_gb": 10, "ephemeral_gb": 0}
    return types.SimpleNamespace(**{**values, **fields})


def instance(**fields: Any) -> types.SimpleNamespace:
    values = {"uuid": "u1", "name": "instance-1", "flavor": flavor()}
    return types.SimpleNamespace(**{**values, **fields})


VIF = {
    "address": "fa:16:3e:00:00:01",
    "id": "port-1",
    "type": "bridge",
    "devname": "tap1",
    "network": {"bridge": "br7"},
}


# New instances


def test_wanted() -> None:
    found = mapping.wanted(
        instance(flavor=flavor(ephemeral_gb=3), config_drive_path="/srv/cd.iso"),
        {"path": "/srv/image.raw", "disk_format": "raw"},
        [VIF],
        image=Path("/srv/image.raw"),
        owner="nova",
    )
    assert (found.uuid, found.name, found.owner) == ("u1", "instance-1", "nova")
    assert (found.memory, found.vcpus) == (512 * MiB, 2)
    assert found.image == Path("/srv/image.raw")
    assert found.root_size == 10 * GiB
    assert found.ephemeral_sizes == (3 * GiB,)
    assert found.config_drive == Path("/srv/cd.iso")
    assert [port.mac for port in found.interfaces] == [VIF["address"]]


def test_wanted_with_sizes_and_machine_of_the_caller() -> None:
    made = mapping.wanted(
        instance(flavor=flavor(ephemeral_gb=3), ephemeral_sizes=(GiB, 2 * GiB)),
        {"machine_type": "pc"},
        None,
        image=Path("/srv/raw"),
        owner="nova",
    )
    assert made.ephemeral_sizes == (GiB, 2 * GiB)
    assert made.machine == "pc"


def test_source_of_the_caller_is_taken() -> None:
    source = sources.LocalFile(Path("/srv/one"), "raw", None, 0)
    assert mapping.image(conf.load(), None, {"source": source}) is source


def test_wanted_of_an_object_instead_of_a_dict() -> None:
    image = types.SimpleNamespace(
        path="/i", loader="/fw/code.fd", nvram_template="/fw/vars.fd"
    )
    found = mapping.wanted(instance(), image, None, image=Path("/i"), owner="me")
    assert found.loader == "/fw/code.fd"
    assert found.nvram_template == Path("/fw/vars.fd")
    assert not found.interfaces and not found.ephemeral_sizes
    assert found.config_drive is None


CONF = conf.load()
SHA = "sha256:" + "ab" * 32


def test_a_file_without_an_id_is_copied() -> None:
    found = mapping.image(CONF, None, {"path": "/i", "disk_format": "raw"})
    assert found == Path("/i")


@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "iso", "RAW", ""])
def test_a_file_without_an_id_that_is_not_raw(fmt: str) -> None:
    with pytest.raises(errors.Unsupported, match="has to be raw"):
        mapping.image(CONF, None, {"path": "/i", "disk_format": fmt})


def test_a_file_with_an_id_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "i"
    path.write_bytes(b"x")
    meta = {"path": path, "id": "7", "disk_format": "qcow2", "min_disk": 2}
    found = mapping.image(CONF, None, types.SimpleNamespace(**meta))
    assert isinstance(found, sources.LocalFile)
    described = found.described()
    assert (described.format, described.min_disk) == ("qcow2", 2 * GiB)


def test_the_services_own_checksum_is_not_asked_for() -> None:
    """Nova's image_meta has an md5, without its name."""
    meta = {"id": "7", "checksum": "d41d8cd98f00b204e9800998ecf8427e"}
    with pytest.raises(errors.ImageUnavailable, match="image_service_cloud"):
        mapping.image(CONF, None, meta)


def test_an_address_needs_a_checksum() -> None:
    meta = {"url": "https://example.org/i", "id": "7", "checksum": SHA}
    found = mapping.image(CONF, None, meta)
    assert isinstance(found, sources.WebFile) and SHA[7:] in found.origin
    del meta["checksum"]
    with pytest.raises(errors.ImageUnavailable, match="checksum"):
        mapping.image(CONF, None, meta)


@pytest.mark.parametrize("checksum", ["", "sha256", "sha256:xy", "crc:12"])
def test_a_checksum_that_is_none(checksum: str) -> None:
    meta = {"url": "https://example.org/i", "id": "7", "checksum": checksum}
    with pytest.raises(errors.ImageUnavailable):
        mapping.image(CONF, None, meta)


def test_what_a_person_names(tmp_path: Path) -> None:
    path = tmp_path / "i"
    path.write_bytes(b"x")
    found = mapping.named_image(CONF, str(path), "qcow2")
    assert isinstance(found, sources.LocalFile) and found.origin == str(path)
    web = mapping.named_image(CONF, "https://example.org/i", "raw", SHA)
    assert isinstance(web, sources.WebFile)


# Moves


def test_request() -> None:
    context = types.SimpleNamespace(request_id="req-7")
    found = mapping.request(
        context, instance(), "beta", flavor(ephemeral_gb=1), 30.0, 5.0
    )
    assert (found.instance, found.dest, found.request) == ("u1", "beta", "req-7")
    assert (found.memory, found.vcpus) == (512 * MiB, 2)
    assert found.sizes == {Role.ROOT: 10 * GiB, Role.EPHEMERAL: GiB}
    assert (found.timeout, found.retry_interval) == (30.0, 5.0)


def test_request_without_flavor_changes_nothing() -> None:
    found = mapping.request(None, instance(), "beta", None, 0, 0)
    assert found.memory is None and found.vcpus is None
    assert found.sizes == {}
    assert found.request == "-"
    assert found.retry_interval > 0


def test_request_with_a_flavor_without_disk_keeps_the_disks() -> None:
    found = mapping.request(None, instance(), "beta", flavor(root_gb=0), 0, 0)
    assert found.sizes == {}


# Interfaces


def test_bridge() -> None:
    (found,) = mapping.interfaces([VIF])
    assert (found.mac, found.bridge, found.device) == (VIF["address"], "br7", "tap1")
    assert found.kind is InterfaceKind.BRIDGE
    assert found.interface_id is None


@pytest.mark.parametrize(
    ("extra", "port"),
    [({}, "port-1"), ({"ovs_interfaceid": "port-9"}, "port-9")],
    ids=["id", "ovs-id"],
)
def test_ovs(extra: dict[str, str], port: str) -> None:
    (found,) = mapping.interfaces([{**VIF, "type": "ovs", "network": {}, **extra}])
    assert found.kind is InterfaceKind.OVS
    assert found.interface_id == port
    assert found.bridge == "br-int"


@pytest.mark.parametrize("kind", ["hw_veb", "vhostuser", "macvtap"])
def test_other_ports_are_refused(kind: str) -> None:
    with pytest.raises(errors.Unsupported, match=kind):
        mapping.interfaces([{**VIF, "type": kind}])


def test_a_port_that_its_bridge_filters_is_refused() -> None:
    details = {"port_filter": True, "ovs_hybrid_plug": True}
    with pytest.raises(errors.Unsupported, match="hybrid"):
        mapping.interfaces([{**VIF, "type": "ovs", "details": details}])


@pytest.mark.parametrize("nothing", [None, [], ()], ids=["none", "list", "tuple"])
def test_no_ports(nothing: Any) -> None:
    assert mapping.interfaces(nothing) == ()


@pytest.mark.parametrize(
    ("specs", "properties", "expected"),
    [
        ({}, {}, set()),
        ({"virtmigrate:transient": "vda, vdb"}, {}, {"vda", "vdb"}),
        ({}, {"virtmigrate_transient": "vda"}, {"vda"}),
        (
            {"virtmigrate:transient": "vdb"},
            {"virtmigrate_transient": "vda,"},
            {"vda", "vdb"},
        ),
    ],
    ids=["none", "flavor", "image", "both"],
)
def test_transient(
    specs: dict[str, str], properties: dict[str, str], expected: set[str]
) -> None:
    flavor = types.SimpleNamespace(
        memory_mb=64, vcpus=1, root_gb=1, ephemeral_gb=1, extra_specs=specs
    )
    instance = types.SimpleNamespace(uuid="u", name="n", flavor=flavor)
    found = mapping.wanted(
        instance,
        {"properties": properties},
        None,
        image=Path("/image"),
        owner="o",
    )
    assert found.transient == expected
