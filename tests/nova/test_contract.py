# SPDX-License-Identifier: Apache-2.0
"""Nova's own contract test case, with this driver on a real libvirtd."""

import sys
from typing import Any
from unittest import mock

import pytest
from nova import exception, objects, test
from nova.image import glance
from nova.objects import migrate_data as nova_data
from nova.tests import fixtures as nova_fixtures
from nova.tests.unit import utils as test_utils
from nova.tests.unit.virt import test_virt_drivers

from tests.nova import images, sites
from virtmigrate import errors

pytestmark = pytest.mark.usefixtures("empty_hosts")
Contract: Any = test_virt_drivers._VirtDriverTestCase
TestCase: Any = test.TestCase


class TestContract(Contract, TestCase):
    """What is stubbed by Nova's own set-up for libvirt is not: libvirt is real."""

    REQUIRES_LOCKING = True
    places: sites.Sites

    def setUp(self) -> None:
        self.driver_module = "nova.virt.virtmigrate.VirtMigrateDriver"
        site = self.places.site("alpha")
        # The contract wants an address; on this host alone it is as good as a name.
        site.overrides["address"] = site.host.address
        real = nova_fixtures.GlanceFixture
        nova_fixtures.GlanceFixture = images.Images
        self.addCleanup(setattr, nova_fixtures, "GlanceFixture", real)
        super().setUp()
        self.connection.init_host("alpha")
        self.addCleanup(self.connection.cleanup_host, "alpha")

    def _setup_fakelibvirt(self) -> None:
        assert "libvirt" in sys.modules

    def _teardown_fakelibvirt(self) -> None:
        pass

    def _clear_attrs(self) -> None:
        """pytest still needs them."""

    def test_init_host(self) -> None:
        """Started by setUp(), as Nova does: once."""
        assert self.connection.get_available_nodes() == [
            self.places.site("alpha").host.address
        ]

    def test_migrate_disk_and_power_off(self) -> None:
        """To a host that is none: refused, and the guest runs on."""
        with self.assertRaises(exception.InstanceFaultRollback):
            super().test_migrate_disk_and_power_off()
        (uuid,) = self.connection.list_instance_uuids()
        assert self.places.site("alpha").state_of(uuid) == "running"

    def test_deletion_that_is_refused(self) -> None:
        """Nova keeps the ports of a guest that may run on."""
        instance, network_info = self._get_running_instance()
        busy = errors.InstanceBusy(instance=instance.uuid, host="alpha", reason="x")
        with (
            mock.patch.object(self.connection.core, "destroy", side_effect=busy),
            self.assertRaises(exception.InstancePowerOffFailure),
        ):
            self.connection.destroy(self.ctxt, instance, network_info)

    def test_live_migration(self) -> None:
        """To a host that is none: recovered, nothing is raised, and it runs on."""
        instance, _ = self._get_running_instance()
        data = nova_data.HyperVLiveMigrateData(
            migration=objects.Migration(dest_node="otherhost")
        )
        called: list[dict[str, Any]] = []

        def post(*_: Any) -> None:
            raise AssertionError("it moved")

        self.connection.live_migration(
            self.ctxt,
            instance,
            "otherhost",
            post,
            lambda *args, **kwargs: called.append(kwargs),
            migrate_data=data,
        )
        assert called == [{"migration_status": "failed"}]
        assert self.places.site("alpha").state_of(instance.uuid) == "running"

    def test_live_migration_abort(self) -> None:
        """Of a guest that goes nowhere."""
        with self.assertRaises(exception.NovaException):
            super().test_live_migration_abort()

    def test_live_migration_force_complete(self) -> None:
        """Of a guest that goes nowhere: it is not paused."""
        instance, _ = self._get_running_instance()
        with self.assertRaises(exception.NovaException):
            self.connection.live_migration_force_complete(instance)
        assert self.places.site("alpha").state_of(instance.uuid) == "running"

    def test_destination_of_another_driver(self) -> None:
        """What Nova's own driver for libvirt says of itself means nothing here."""
        with self.assertRaises(exception.MigrationPreCheckError):
            self.connection.check_can_live_migrate_source(
                self.ctxt, None, objects.LibvirtLiveMigrateData()
            )

    def _get_running_instance(self, obj: bool = True) -> tuple[Any, Any]:
        """A guest that boots: Nova's own has an image without bytes."""
        flavor = test_utils.get_test_flavor(
            options={
                "name": "virtmigrate",
                "flavorid": "virtmigrate",
                "memory_mb": 128,
                "vcpus": 1,
                "root_gb": 1,
                "ephemeral_gb": 0,
                "swap": 0,
            }
        )
        instance = test_utils.get_test_instance(flavor=flavor, obj=True)
        network_info = test_utils.get_test_network_info(count=0)
        image = objects.ImageMeta.from_image_ref(self.ctxt, glance.API(), images.GUEST)
        self.connection.spawn(
            self.ctxt, instance, image, [], None, {}, network_info=network_info
        )
        return instance, network_info


REFUSED = {
    "attach_detach_different_power_states": exception.VolumeAttachFailed,
    "attach_detach_volume": exception.VolumeAttachFailed,
    "get_mks_console": exception.ConsoleTypeUnavailable,
    "get_serial_console": exception.ConsoleTypeUnavailable,
    "get_spice_console": exception.ConsoleTypeUnavailable,
    "get_vnc_console": exception.ConsoleTypeUnavailable,
    "get_volume_connector": exception.InvalidVolume,
    "get_volume_connector_storage_ip": exception.InvalidVolume,
    "rescue": exception.InstanceNotRescuable,
    "set_admin_password": exception.SetAdminPasswdNotSupported,
    "swap_volume": exception.VolumeAttachFailed,
    "unrescue_rescued_instance": exception.InstanceNotRescuable,
}
"""What is refused, in words of Nova's: the contract takes NotImplementedError only."""


def _refused(name: str, error: type[Exception]) -> Any:
    def test_refused(self: Any) -> None:
        with self.assertRaises(error):
            getattr(Contract, name)(self)

    test_refused.__doc__ = f"Nova's own {name}, refused by {error.__name__}."
    return test_refused


for each, raised in REFUSED.items():
    setattr(TestContract, f"test_{each}", _refused(f"test_{each}", raised))

LONG = (
    *REFUSED,
    "block_stats",
    "get_device_name_for_instance",
    "get_diagnostics",
    "get_instance_diagnostics",
    "get_instance_disk_info",
    "live_migration_abort",
    "live_migration_force_complete",
    "poll_rebooting_instances",
    "restore_running",
    "restore_soft_deleted",
    "resume_unsuspended_instance",
    "soft_delete",
    "trigger_crash_dump",
    "unpause_unpaused_instance",
    "unrescue_unrescued_instance",
)
"""Those that boot a guest to be refused, or to have nothing done to it."""


def _long(method: Any) -> Any:
    def test_long(self: Any) -> None:
        method(self)

    test_long.__doc__ = method.__doc__
    return pytest.mark.long(test_long)


for each in LONG:
    setattr(TestContract, f"test_{each}", _long(getattr(TestContract, f"test_{each}")))
