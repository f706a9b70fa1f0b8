# SPDX-License-Identifier: Apache-2.0
"""What is not done, said by Nova's own exceptions.

Where Nova itself turns NotImplementedError into an answer for the user, nothing stands
here: docs/nova.md names those methods.
"""

from typing import Any, NoReturn

from nova import exception

from virtmigrate.nova_plugin import base


class Refused(base.Base):
    """Says no, before anything is touched."""

    def attach_volume(
        self,
        context: Any,
        connection_info: Any,
        instance: Any,
        mountpoint: str,
        disk_bus: Any = None,
        device_type: Any = None,
        encryption: Any = None,
        **_: Any,
    ) -> NoReturn:
        raise exception.VolumeAttachFailed(
            volume_id=(connection_info or {}).get("serial", mountpoint),
            reason="the virtmigrate driver has no volumes of Cinder yet",
        )

    def get_volume_connector(self, instance: Any) -> NoReturn:
        raise exception.InvalidVolume(
            reason="the virtmigrate driver has no volumes of Cinder yet"
        )

    def attach_interface(
        self, context: Any, instance: Any, image_meta: Any, vif: Any
    ) -> NoReturn:
        raise exception.InterfaceAttachFailed(instance_uuid=instance.uuid)

    def detach_interface(self, context: Any, instance: Any, vif: Any) -> NoReturn:
        raise exception.InterfaceDetachFailed(instance_uuid=instance.uuid)

    def get_vnc_console(self, context: Any, instance: Any) -> NoReturn:
        raise exception.ConsoleTypeUnavailable(console_type="vnc")

    def get_spice_console(self, context: Any, instance: Any) -> NoReturn:
        raise exception.ConsoleTypeUnavailable(console_type="spice")

    def get_serial_console(self, context: Any, instance: Any) -> NoReturn:
        raise exception.ConsoleTypeUnavailable(console_type="serial")

    def get_mks_console(self, context: Any, instance: Any) -> NoReturn:
        raise exception.ConsoleTypeUnavailable(console_type="webmks")

    def rescue(
        self,
        context: Any,
        instance: Any,
        network_info: Any,
        image_meta: Any,
        rescue_password: str,
        block_device_info: Any,
        share_info: Any = None,
        **_: Any,
    ) -> NoReturn:
        raise exception.InstanceNotRescuable(
            instance_id=instance.uuid,
            reason="the virtmigrate driver does not rescue yet",
        )

    def set_admin_password(self, instance: Any, new_pass: str) -> NoReturn:
        raise exception.SetAdminPasswdNotSupported()
