# SPDX-License-Identifier: Apache-2.0
"""Computes that are killed, and what is left where a move failed."""

from typing import Any

import pytest
from nova import context, service_auth

from tests.nova import cloud
from virtmigrate import driver as core
from virtmigrate import errors, livesnapshot
from virtmigrate.nova_plugin import upload

pytestmark = pytest.mark.usefixtures("empty_hosts")


class Killed(BaseException):
    """What nobody catches, as nobody catches a kill."""


class TestRestarts(cloud.Cloud):
    """What stands in the driver's records is finished or undone."""

    def test_killed_in_a_move(self) -> None:
        """Handed over, and Nova does not know: the guest runs on the source again."""
        server = self.boot()
        real = core.VirtMigrateDriver.migrate_disk_and_power_off

        def killed(*args: Any, **kwargs: Any) -> str:
            real(*args, **kwargs)
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core.VirtMigrateDriver, "migrate_disk_and_power_off", killed)
            self.act(server, "migrate")
            cloud.until(lambda: self.called.get("migrate_disk_and_power_off"))
        assert self.alpha.state_of(server["id"]) is None
        self.restart("alpha")
        found = self.wait(server, "ACTIVE")
        assert found["OS-EXT-SRV-ATTR:host"] == "alpha"
        assert self.alpha.state_of(server["id"]) == "running"
        assert self.beta.state_of(server["id"]) is None
        assert not self.disks(self.beta)

    def test_killed_while_an_image_is_made(self) -> None:
        """The guest's layer is merged back, and no image is there to be used."""
        server = self.boot()
        before = self.alpha.disk(server["id"])

        def killed(*_: Any) -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upload.Upload, "take", killed)
            patch.setattr(livesnapshot.Images, "_cleared", killed)
            self.admin_api.post_server_action(
                server["id"], {"createImage": {"name": "made"}}
            )
            cloud.until(lambda: self.called.get("snapshot"))
        assert self.alpha.disk(server["id"]) != before
        self.restart("alpha")
        self.wait(server, "ACTIVE")
        assert self.alpha.disk(server["id"]) == before
        assert self.alpha.state_of(server["id"]) == "running"
        (image,) = [
            each for each in self.glance.images.values() if each["name"] == "made"
        ]
        assert image["status"] == "queued"

    def test_leftover_goes_in_the_name_of_novas_own_user(self) -> None:
        """Where it has one: the user's token went with the process."""
        image = self.glance.create(None, {"name": "made"})["id"]
        upload.Uploads()(image, is_new=False).abort()
        assert image in self.glance.images
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service_auth, "get_service_auth_plugin", lambda _: object())
            upload.Uploads()(image, is_new=False).abort()
        assert image not in self.glance.images

    def test_killed_in_a_live_migration(self) -> None:
        """Not through: the guest runs on at its source, and nothing is awaited."""
        server = self.killed_live("virtmigrate.livemigration.steering.Steering.run")
        assert self.alpha.state_of(server["id"]) == "running"
        self.expect_one(server, self.alpha)
        assert not list((self.beta.state / "awaited").glob("*"))

    def test_killed_past_the_switch_of_a_live_migration(self) -> None:
        """It goes on at the destination; Nova still names the source."""
        path = "virtmigrate.livemigration.departure.Departure.finish"
        server = self.killed_live(path)
        assert self.beta.state_of(server["id"]) == "running"
        self.expect_one(server, self.beta)

    @pytest.mark.long
    def test_started_again_with_guests(self) -> None:
        """They run on, and are found."""
        server = self.boot()
        with self.alpha.libvirt() as conn:
            before = conn.lookupByUUIDString(server["id"]).ID()
        self.restart("alpha")
        self.act(server, "pause")
        self.wait(server, "PAUSED")
        with self.alpha.libvirt() as conn:
            assert conn.lookupByUUIDString(server["id"]).ID() == before

    def test_deleted_after_a_move_that_failed_at_the_target(self) -> None:
        """With the next pass of the image cache all that is left goes."""
        server = self.boot()

        def fail(*_: Any, **__: Any) -> None:
            raise errors.SourceUnreadable(volume="vda", reason="injected")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core.VirtMigrateDriver, "finish_migration", fail)
            self.act(server, "migrate")
            self.wait(server, "ERROR")
        driver = self.computes["alpha"].manager.driver
        driver.manage_image_cache(context.get_admin_context(), [])
        assert self.disks(self.alpha), "the only proven copy beside the target's"
        self.admin_api.delete_server(server["id"])
        self.wait_until_gone(server)
        driver.manage_image_cache(context.get_admin_context(), [])
        for site in (self.alpha, self.beta):
            assert site.state_of(server["id"]) is None
            assert not self.disks(site)
        assert driver.core.open_operations() == []

    # Private

    def killed_live(self, path: str) -> Any:
        """Return a server whose source was killed there, and is back."""
        server = self.boot()

        def killed(*_: Any) -> None:
            raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(path, killed)
            self.act(server, "os-migrateLive", host=None, block_migration="auto")
            cloud.until(lambda: self.called.get("live_migration"))
        self.restart("alpha")
        found = self.wait(server, "ACTIVE")
        assert found["OS-EXT-SRV-ATTR:host"] == "alpha"
        return server

    def disks(self, site: Any) -> list[str]:
        return [name for name in site.volumes() if name.startswith("vd")]

    def restart(self, name: str) -> None:
        """Have a compute with nothing but what its host and the database know."""
        compute = self.computes[name]
        compute.manager.driver.cleanup_host(name)
        made = self.restart_compute_service(compute, keep_hypervisor_state=False)
        self.computes[name] = made
        self.addCleanup(made.manager.driver.cleanup_host, name)
