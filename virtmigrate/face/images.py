# SPDX-License-Identifier: Apache-2.0
"""Images: made of instances, cached before they are needed, dropped when idle."""

from collections.abc import Callable
from typing import Any

from virtmigrate import livesnapshot, mapping, sources
from virtmigrate.face import base
from virtmigrate.livesnapshot import Kind, Saved, Stage, Target, Wanted
from virtmigrate.units import MiB

_PENDING = "image_pending_upload"
_UPLOADING = "image_uploading"


class Images(base.Base):
    """Makes images, and keeps the image caches of one host."""

    def snapshot(
        self,
        context: object,
        instance: Any,
        image_id: str,
        update_task_state: Callable[..., object],
        **_: object,
    ) -> None:
        """Make an instance's root disk an image of the image service.

        The guest goes on. The image is queued there, and is active afterwards. It is
        quiesced as its own image wants it (os_require_quiesce, hw_qemu_guest_agent).
        On failure the image is deleted, and the guest is as it was; see
        livesnapshot.Images.save() for what is raised. What `update_task_state` raises
        goes on.
        """
        self._save(instance, self._wanted(instance, image_id, update_task_state))

    def live_snapshot(
        self,
        context: object,
        instance: Any,
        image_id: str,
        update_task_state: Callable[..., object],
        **options: Any,
    ) -> list[Saved]:
        """As snapshot(), with options: those of livesnapshot.Wanted, by name."""
        wanted = self._wanted(instance, image_id, update_task_state, **options)
        return self._save(instance, wanted)

    def quiesce(
        self, context: object, instance: Any, image_meta: object, **_: object
    ) -> None:
        """Have the guest's agent freeze its file systems, until unquiesce().

        At most `freeze_limit` seconds. Raises AgentNotThere, QuiesceFailed.
        """
        self._quiescing.freeze(instance.uuid)

    def unquiesce(
        self, context: object, instance: Any, image_meta: object, **_: object
    ) -> None:
        """Thaw it; QuiesceFailed when it was not frozen until now."""
        self._quiescing.thaw(instance.uuid)

    def cache_image(
        self, context: object, image_id: str | sources.Source, **_: object
    ) -> bool:
        """Fetch an image of the service before somebody needs it.

        Into all backends of this host; one after the other. False when all had it. A
        caller that has a source of its own gives that.
        """
        if isinstance(image_id, str):
            image_id = mapping.named_image(self._conf, image_id)
        return self.images.seed(image_id, self._progress)

    def manage_image_cache(
        self, context: object, all_instances: object = None, **_: object
    ) -> None:
        """Drop idle images beyond each backend's limits.

        What is in use is what records say; `all_instances` is not asked.
        """
        self.images.tend()

    # Private

    def _save(self, instance: Any, wanted: Wanted) -> list[Saved]:
        return self.saves.save(instance.uuid, wanted, self._progress())

    def _wanted(
        self,
        instance: Any,
        image_id: str,
        update_task_state: Callable[..., object],
        **options: Any,
    ) -> Wanted:
        def tell(stage: Stage) -> None:
            if stage is Stage.FROZEN:
                update_task_state(task_state=_PENDING)
            else:
                update_task_state(task_state=_UPLOADING, expected_state=_PENDING)

        target = Target(
            kind=Kind.SERVICE,
            where=str(image_id),
            name=str(getattr(instance, "name", "") or instance.uuid),
            is_new=False,
        )
        fmt = options.get("format", self.node.options.image_save_format)
        asked: dict[str, Any] = {
            "format": fmt,
            "compress": self.node.options.image_save_compress and fmt == "qcow2",
            "quiesce": mapping.quiescing(getattr(instance, "image_meta", None)),
            "bandwidth": self.node.options.image_save_bandwidth_mib * MiB,
            "timeout": float(self.node.options.image_save_timeout),
            "by": "snapshot",
            "properties": mapping.saved_properties(instance),
            **options,
        }
        return livesnapshot.Wanted(target=target, told=tell, **asked)
