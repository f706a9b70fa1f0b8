# SPDX-License-Identifier: Apache-2.0
"""What users do with servers, on two hosts with real guests."""

import base64
import os
from typing import Any

import pytest

from sandbox import guest, watch
from tests.nova import cloud, images, sites
from virtmigrate import errors

pytestmark = pytest.mark.usefixtures("empty_hosts")


class TestLife(cloud.Cloud):
    """A server on one host."""

    def test_created_stopped_started_deleted(self) -> None:
        server = self.boot()
        uuid = server["id"]
        assert self.alpha.state_of(uuid) == "running"
        assert "owner>nova<" in self.alpha.xml(uuid)
        cloud.until(lambda: "BEAT" in self._console(server))
        self.act(server, "os-stop")
        self.wait(server, "SHUTOFF")
        assert self.alpha.state_of(uuid) == "shutoff"
        self.act(server, "os-start")
        self.wait(server, "ACTIVE")
        self.admin_api.delete_server(uuid)
        self.wait_until_gone(server)
        assert self.alpha.state_of(uuid) is None
        assert not [name for name in self.alpha.volumes() if name.startswith("vd")]

    def test_paused_suspended_rebooted(self) -> None:
        server = self.boot()
        uuid = server["id"]
        for action, status, state in (
            ("pause", "PAUSED", "paused"),
            ("unpause", "ACTIVE", "running"),
            ("suspend", "SUSPENDED", "shutoff"),
            ("resume", "ACTIVE", "running"),
        ):
            self.act(server, action)
            self.wait(server, status)
            assert self.alpha.state_of(uuid) == state, action
        for kind in ("HARD", "SOFT"):
            self.act(server, "reboot", type=kind)
            self.wait(server, "ACTIVE")
            assert self.alpha.state_of(uuid) == "running"
        with self.alpha.libvirt() as conn:
            conn.lookupByUUIDString(uuid).destroy()
        # Told by an event: nobody asked Nova.
        self.wait(server, "SHUTOFF")

    def test_config_drive(self) -> None:
        """An ISO of Nova's own builder, that says who the server is."""
        server = self.boot(config_drive=True)
        written = self.alpha.disk(server["id"], "sda").read_bytes()
        assert b"config-2" in written[32768:34816]
        assert server["id"].encode() in written

    def test_rebuilt(self) -> None:
        """By Nova's own way: destroyed, and made again with the same id."""
        server = self.boot()
        before = self.alpha.disk(server["id"])
        self.act(server, "rebuild", imageRef=images.GUEST)
        self.wait(server, "ACTIVE")
        assert self.alpha.state_of(server["id"]) == "running"
        assert self.alpha.disk(server["id"]) != before

    def test_image_is_cached_before_it_is_booted(self) -> None:
        context = self._context()
        drivers = [self.computes[name].manager.driver for name in ("alpha", "beta")]
        assert [each.cache_image(context, images.GUEST) for each in drivers] == [
            True
        ] * 2
        assert not drivers[0].cache_image(context, images.GUEST)
        del self.glance._imagedata[images.GUEST]
        server = self.boot()
        assert self.alpha.state_of(server["id"]) == "running"

    def test_inventory_and_traits(self) -> None:
        for name in ("alpha", "beta"):
            uuid = self._get_provider_uuid_by_host(name)
            found = self._get_provider_inventory(uuid)
            assert set(found) == {"VCPU", "MEMORY_MB", "DISK_GB"}
            ours = {
                trait
                for trait in self._get_provider_traits(uuid)
                if trait.startswith("CUSTOM_VIRTMIGRATE_")
            }
            assert ours == {
                "CUSTOM_VIRTMIGRATE_BACKEND_LOCAL",
                "CUSTOM_VIRTMIGRATE_MEDIA_SSD",
            }
        told = self.admin_api.api_get("os-hypervisors/detail").body["hypervisors"]
        assert {each["hypervisor_hostname"] for each in told} == {"alpha", "beta"}

    # Private

    def _console(self, server: Any) -> str:
        found = self.admin_api.post_server_action(
            server["id"], {"os-getConsoleOutput": {}}
        )
        return str(found["output"])

    def _context(self) -> Any:
        from nova import context

        return context.get_admin_context()


class TestRefused(cloud.Cloud):
    """What is not honoured is refused by name, before anything is made."""

    def test_extra_specs_swap_and_properties(self) -> None:
        pinned = self.flavor("tpm", {"quota:cpu_shares": "10"}, memory_mb=64)
        swap = self.flavor("swap", memory_mb=64, swap=64)
        self.expect_refused("quota:cpu_shares=10", flavorRef=pinned)
        self.expect_refused("swap", flavorRef=swap)
        self.glance.images[images.GUEST]["properties"]["hw_disk_bus"] = "ide"
        self.expect_refused("hw_disk_bus=ide")

    @pytest.mark.long
    def test_files_without_a_drive(self) -> None:
        # The last one with files to inject; it has no `networks: none` to leave out.
        self.admin_api.microversion = "2.56"
        file = {"path": "/x", "contents": base64.b64encode(b"x").decode()}
        self.expect_refused("config drive", personality=[file])

    def expect_refused(self, word: str, **more: Any) -> None:
        """In ERROR, with the reason, and nothing left."""
        server = self.wait(self.create(**more), "ERROR")
        assert word in server["fault"]["message"], server["fault"]
        assert self.alpha.state_of(server["id"]) is None
        assert self.alpha.volumes() == {}


class TestMoves(cloud.Cloud):
    """Resizes and cold migrations, each judged by digests of the disks."""

    def test_resized_and_confirmed(self) -> None:
        server, before = self.stopped()
        self.act(server, "resize", flavorRef=self.large())
        self.expect_at_beta(server, before)
        self.act(server, "confirmResize")
        self.wait(server, "SHUTOFF")
        self.expect_one(server, self.beta)
        assert self.beta.memory(server["id"]) == 160
        self.act(server, "os-start")
        self.wait(server, "ACTIVE")

    def test_resized_and_reverted(self) -> None:
        server, before = self.stopped()
        self.act(server, "resize", flavorRef=self.large())
        self.expect_at_beta(server, before)
        self.act(server, "revertResize")
        self.wait(server, "SHUTOFF")
        self.expect_one(server, self.alpha)
        assert self.alpha.memory(server["id"]) == 128
        assert self.root(server, self.alpha) == before

    def test_migrated_running_and_confirmed(self) -> None:
        server = self.boot()
        counted = self.beats(self.alpha, server)
        hosts = (self.alpha.host, self.beta.host)
        watched = [os.getpid(), *(host.libvirtd_pid for host in hosts)]
        with watch.programs(watched) as started:
            self.act(server, "migrate")
            self.wait(server, "VERIFY_RESIZE")
        assert "qemu-system-x86_64" in started.names
        assert not started.names & {"ssh", "scp", "sftp", "rsync"}
        self.act(server, "confirmResize")
        self.wait(server, "ACTIVE")
        assert self.alpha.state_of(server["id"]) is None
        assert self.beta.state_of(server["id"]) == "running"
        log = self.log(self.beta, server)
        cloud.until(lambda: len(guest.boots(log)) == 2)
        assert guest.boots(log)[-1] > counted

    def test_migrated_running_and_reverted(self) -> None:
        server = self.boot()
        self.act(server, "migrate")
        self.wait(server, "VERIFY_RESIZE")
        self.act(server, "revertResize")
        self.wait(server, "ACTIVE")
        assert self.alpha.state_of(server["id"]) == "running"
        self.expect_one(server, self.alpha)

    def test_failure_is_rolled_back(self) -> None:
        """The copy fails: the server is ACTIVE, its guest runs on the source again."""
        server = self.boot()

        def fail(*_: Any, **__: Any) -> None:
            raise errors.SourceUnreadable(volume="vda", reason="injected")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("virtmigrate.stream.Mover.copy", fail, raising=True)
            self.act(server, "migrate")
            self.wait_for_migration(server, "error")
        found = self.wait(server, "ACTIVE")
        assert found["OS-EXT-SRV-ATTR:host"] == "alpha"
        cloud.until(lambda: self.alpha.state_of(server["id"]) == "running")
        self.expect_one(server, self.alpha)
        raised = self.called["migrate_disk_and_power_off"][-1]
        assert type(raised).__name__ == "InstanceFaultRollback", raised

    def test_deleted_while_a_resize_waits_to_be_confirmed(self) -> None:
        server = self.boot()
        self.act(server, "migrate")
        self.wait(server, "VERIFY_RESIZE")
        self.admin_api.delete_server(server["id"])
        self.wait_until_gone(server)
        for site in (self.alpha, self.beta):
            assert site.state_of(server["id"]) is None
            assert not [name for name in site.volumes() if name.startswith("vd")]

    @pytest.mark.long
    def test_disks_that_a_resize_does_not_make(self) -> None:
        server = self.boot()
        more = self.flavor("more", memory_mb=128, ephemeral_gb=1)
        self.act(server, "resize", flavorRef=more)
        self.wait_for_migration(server, "error")
        found = self.wait(server, "ACTIVE")
        assert found["OS-EXT-SRV-ATTR:host"] == "alpha"
        assert self.alpha.state_of(server["id"]) == "running"

    # Private

    def large(self) -> str:
        return self.flavor("large", memory_mb=160, root_gb=1)

    def stopped(self) -> tuple[Any, str]:
        """Return a server that wrote something and is off, and its disk's digest."""
        server = self.boot()
        self.beats(self.alpha, server)
        self.act(server, "os-stop")
        self.wait(server, "SHUTOFF")
        return server, self.root(server, self.alpha)

    def root(self, server: Any, site: sites.Site) -> str:
        """Return the digest of the disk's file."""
        return sites.digest(site.disk(server["id"]))

    def expect_at_beta(self, server: Any, before: str) -> None:
        found = self.wait(server, "VERIFY_RESIZE")
        assert found["OS-EXT-SRV-ATTR:host"] == "beta"
        assert self.beta.state_of(server["id"]) == "shutoff"
        assert self.root(server, self.beta) == before
        assert self.alpha.state_of(server["id"]) is None
