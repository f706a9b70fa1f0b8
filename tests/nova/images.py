# SPDX-License-Identifier: Apache-2.0
"""Nova's fake of the image service, with bytes and digests as the real one has."""

import hashlib
from typing import Any

from nova.tests import fixtures as nova_fixtures

from sandbox import guest

GUEST = "9d4f2c31-6f0e-4b7a-8a53-0c1e5b7d2f64"
"""The image that boots, and counts."""

Fake: Any = nova_fixtures.GlanceFixture


class Images(Fake):
    """Keeps the bytes that are given to update(), and knows what it has."""

    def setUp(self) -> None:
        super().setUp()
        data = guest.image().path.read_bytes()
        entry = {
            "id": GUEST,
            "name": "guest",
            "status": "active",
            "container_format": "bare",
            "disk_format": "raw",
            "min_disk": 0,
            "min_ram": 0,
            "visibility": "public",
            "tags": [],
            "properties": {},
        }
        self.create(None, entry)
        self.keep(GUEST, data)

    def keep(self, image_id: str, data: bytes) -> None:
        """Have the bytes of an image."""
        self._imagedata[image_id] = data
        self.images[image_id].update(
            size=len(data),
            status="active",
            os_hash_algo="sha512",
            os_hash_value=hashlib.sha512(data).hexdigest(),
        )

    def create(self, context: Any, metadata: Any, data: Any = None) -> Any:
        """An image is queued until it has bytes, as at the real service."""
        if "status" not in metadata:
            metadata = {"properties": {}, **metadata, "status": "queued", "size": None}
        return super().create(context, metadata, data)

    def update(
        self,
        context: Any,
        image_id: str,
        metadata: Any,
        data: Any = None,
        purge_props: bool = False,
    ) -> Any:
        found = super().update(context, image_id, metadata, None, purge_props)
        if data is not None:
            # As glanceclient asks for it: by pieces, after asking whether it is true.
            assert data
            self.keep(image_id, b"".join(iter(lambda: data.read(2**16), b"")))
        return found
