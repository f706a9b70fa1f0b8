# SPDX-License-Identifier: Apache-2.0
"""Images of servers, and servers of images: createImage, shelve, unshelve."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import guest
from tests.nova import cloud, images
from tests.nova.images import Images
from virtmigrate import agent, domainxml

pytestmark = pytest.mark.usefixtures("empty_hosts")


class TestImages(cloud.Cloud):
    """createImage of a server on one host."""

    def test_of_a_running_server(self) -> None:
        """It counts on, and the image has whole records of it."""
        server = self.boot()
        counted = self.beats(self.alpha, server)
        kept, before = self.alpha.volumes().keys(), self.alpha.disk(server["id"])
        with self.task_states() as states:
            image = self.image_of(server)
        assert states == ["image_pending_upload", "image_uploading"]
        assert (image["status"], image["disk_format"]) == ("active", "qcow2")
        assert image["container_format"] == "bare"
        said = image["properties"]
        assert (said["image_location"], said["image_state"]) == (
            "snapshot",
            "available",
        )
        assert said["instance_uuid"] == server["id"]
        assert guest.verify(self.raw(image)).last >= counted
        self.expect_untouched(server, before, set(kept), counted)

    def test_of_a_paused_server_is_its_disk(self) -> None:
        """Byte for byte."""
        server = self.boot()
        self.beats(self.alpha, server)
        self.act(server, "pause")
        self.wait(server, "PAUSED")
        found = f"json:{self.alpha.view(server['id'])}"
        image = self.raw(self.image_of(server))
        argv = ["qemu-img", "compare", "-U", "-f", "raw", str(image), found]
        subprocess.run(argv, check=True, timeout=60)
        assert self.alpha.state_of(server["id"]) == "paused"

    def test_failed_upload(self) -> None:
        """No image, and the server is what it was, whatever became of the bytes."""
        server = self.boot()
        counted = self.beats(self.alpha, server)
        kept, before = self.alpha.volumes().keys(), self.alpha.disk(server["id"])
        update, keep = Images.update, Images.keep

        def broken(*args: Any, **more: Any) -> Any:
            more["data"].read(2**16)
            raise OSError("it went away")

        def again(*args: Any, **more: Any) -> Any:
            more["data"].read(2**16)
            return update(*args, **more)

        def other(self: Images, image_id: str, data: bytes) -> None:
            keep(self, image_id, data[:-1] + b"!")

        for name, fault, reason in (
            ("update", broken, "it went away"),
            ("update", again, "broke off"),
            ("keep", other, "was sent"),
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Images, name, fault)
                self.expect_no_image(server, reason)
            self.expect_untouched(server, before, set(kept), counted)

    def test_quiesced_or_not_made(self) -> None:
        """By os_require_quiesce of the image that the server was made of."""
        self.glance.images[images.GUEST]["properties"]["os_require_quiesce"] = "yes"
        server = self.boot(flavorRef=self.flavor("two", memory_mb=128, ephemeral_gb=1))
        self.beats(self.alpha, server)
        # Without a file system there is nothing that an agent could freeze.
        self.expect_no_image(server, "no file system")
        self.act(server, "os-stop")
        self.wait(server, "SHUTOFF")
        disk = self.alpha.disk(server["id"], "vdb")
        subprocess.run(["mkfs.ext4", "-q", "-L", "beats", disk], check=True, timeout=60)
        self.act(server, "os-start")
        self.wait(server, "ACTIVE")
        cloud.until(lambda: self.agent_of(server) == "connected")
        frozen, freeze = [], agent.Agents.frozen

        def noted(self: agent.Agents, uuid: str) -> Any:
            frozen.append(uuid)
            return freeze(self, uuid)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agent.Agents, "frozen", noted)
            self.image_of(server)
        assert frozen == [server["id"]]

    def test_shelved_and_unshelved(self) -> None:
        """It goes from its host, and comes as it was, on another one if need be."""
        server = self.boot()
        counted = self.beats(self.alpha, server)
        self.act(server, "shelve")
        self.wait(server, "SHELVED_OFFLOADED")
        assert self.alpha.state_of(server["id"]) is None
        assert not self.alpha.disks()
        (image,) = [each for each in self.glance.images.values() if _is_of(each)]
        assert guest.verify(self.raw(image)).last >= counted
        service = self.computes["alpha"].service_ref.uuid
        self.admin_api.put_service(service, {"status": "disabled"})
        self.act(server, "unshelve")
        found = self.wait(server, "ACTIVE")
        assert found["OS-EXT-SRV-ATTR:host"] == "beta"
        log = self.log(self.beta, server)
        cloud.until(lambda: guest.boots(log) and guest.boots(log)[-1] > counted)
        assert image["id"] not in self.glance.images

    # Private

    def agent_of(self, server: Any) -> str | None:
        return domainxml.agent_state(self.alpha.live_xml(server["id"]))

    def image_of(self, server: Any) -> dict[str, Any]:
        """Have an image made; return it when the server is at rest."""
        self.admin_api.post_server_action(
            server["id"], {"createImage": {"name": "made"}}
        )
        found = self.admin_api.get_server(server["id"])["status"]
        self.wait(server, found)
        raised = self.called["snapshot"][-1]
        assert raised is None, repr(raised)
        (image,) = [
            each for each in self.glance.images.values() if each["name"] == "made"
        ]
        return dict(image)

    def expect_no_image(self, server: Any, reason: str) -> None:
        noted = len(self.called.get("snapshot", ()))
        self.admin_api.post_server_action(
            server["id"], {"createImage": {"name": "made"}}
        )
        cloud.until(lambda: len(self.called.get("snapshot", ())) > noted)
        assert reason in str(self.called["snapshot"][-1])
        self.wait(server, "ACTIVE")
        assert "made" not in {each["name"] for each in self.glance.images.values()}

    def expect_untouched(
        self, server: Any, disk: Path, volumes: set[str], counted: int
    ) -> None:
        """The same disks, no layer, one boot, and it counts on."""
        assert self.alpha.disk(server["id"]) == disk
        assert self.alpha.volumes().keys() == volumes
        log = self.log(self.alpha, server)
        now = guest.beats(log)[-1].number
        cloud.until(lambda: guest.beats(log)[-1].number > max(now, counted))
        assert len(guest.boots(log)) == 1

    @contextlib.contextmanager
    def task_states(self) -> Iterator[list[str]]:
        """Note what the driver tells of the task's state."""
        states: list[str] = []
        core = self.computes["alpha"].manager.driver.core
        snapshot = core.snapshot

        def noting(context: Any, instance: Any, image_id: str, tell: Any) -> None:
            def noted(task_state: str, **more: Any) -> None:
                tell(task_state=task_state, **more)
                states.append(instance.task_state)

            snapshot(context, instance, image_id, noted)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core, "snapshot", noting)
            yield states

    def raw(self, image: dict[str, Any]) -> Path:
        """Return the disk in an image."""
        stored, found = self.places.tmp / "stored", self.places.tmp / "raw"
        stored.write_bytes(self.glance._imagedata[image["id"]])
        argv = ["qemu-img", "convert", "-f", image["disk_format"], "-O", "raw"]
        subprocess.run([*argv, stored, found], check=True, timeout=60)
        return found


def _is_of(image: dict[str, Any]) -> bool:
    return bool(image["properties"].get("image_type") == "snapshot")
