# SPDX-License-Identifier: Apache-2.0
"""A stand-in for OpenStack's image service, with faults to choose.

It answers what is used of API v2 over real HTTP, and keeps to the rules that matter
here: bytes go to a queued image, once, and it is active when the last chunk came. What
breaks off leaves it queued. Glance itself needs a database and some sixty packages.
"""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PATCH = "application/openstack-images-v2.1-json-patch"


@dataclass
class Faults:
    """What the service does wrong."""

    refuse: dict[str, int] = field(default_factory=dict)
    """By method: the status that it answers with."""
    break_after: int | None = None
    """Bytes of a body after which the connection breaks."""
    flip: bool = False
    """One bit is stored otherwise than it came."""
    algorithm: str | None = "sha512"
    """Of what is stored; None: it tells MD5 only."""
    lost: int = 0
    """Bytes of the end that are not stored."""
    after: str = "active"
    """The status that an image has when its last byte came."""


@dataclass
class Service:
    """What it has."""

    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    asked: list[str] = field(default_factory=list)
    url: str = ""
    received: int = 0
    """Bytes of bodies, also of those that broke off."""

    def queue(self, image_id: str, **more: Any) -> None:
        """Make an image as a compute service does before it asks for a snapshot."""
        entry = {"id": image_id, "name": "wanted", "status": "queued", "min_disk": 0}
        self.images[image_id] = {**entry, **more}

    def store(self, image_id: str, data: bytes) -> None:
        faults = self.faults
        if faults.flip:
            data = bytes([data[0] ^ 1]) + data[1:]
        data = data[: len(data) - faults.lost]
        entry = self.images[image_id]
        entry.update(status=faults.after, size=len(data))
        entry["checksum"] = hashlib.md5(data).hexdigest()
        if faults.algorithm:
            entry["os_hash_algo"] = faults.algorithm
            entry["os_hash_value"] = hashlib.new(faults.algorithm, data).hexdigest()
        self.data[image_id] = data


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def do_GET(self) -> None:
        if self.path in ("/", "/v2", "/v2/"):
            self._say(200, self._versions())
        elif self.path.endswith("/file") and self._entry:
            kind = "application/octet-stream"
            self._answer(200, self.service.data[self._id], kind)
        elif self._noted() and self._entry:
            self._say(200, self._entry)
        else:
            self._say(404)

    def do_POST(self) -> None:
        said = json.loads(self._body())
        if not self._noted():
            return
        if said["id"] in self.service.images:
            self._say(409)
            return
        self.service.images[said["id"]] = {**said, "status": "queued"}
        self._say(201, said)

    def do_PATCH(self) -> None:
        changes = json.loads(self._body())
        if not self._noted():
            return
        assert self.headers["Content-Type"] == PATCH
        assert self._entry is not None
        for each in changes:
            assert each["op"] in ("add", "replace")
            self._entry[each["path"].removeprefix("/")] = each["value"]
        self._say(200, self._entry)

    def do_PUT(self) -> None:
        if not self._noted(reads=False):
            return
        entry = self._entry
        if entry is None or entry["status"] != "queued":
            self.close_connection = True
            self._say(404 if entry is None else 409)
            return
        entry["status"] = "saving"
        data = self._chunks()
        if data is None:
            entry["status"] = "queued"
            self.close_connection = True
            return
        if self._id in self.service.images:
            self.service.store(self._id, data)
        self._say(204)

    def do_DELETE(self) -> None:
        if not self._noted():
            return
        found = self.service.images.pop(self._id, None)
        self.service.data.pop(self._id, None)
        self._say(204 if found else 404)

    def log_message(self, *_: object) -> None:
        pass

    # Private

    @property
    def _id(self) -> str:
        return self.path.split("/")[3] if self.path.count("/") > 2 else ""

    @property
    def _entry(self) -> dict[str, Any] | None:
        return self.service.images.get(self._id)

    def _noted(self, *, reads: bool = True) -> bool:
        """Note a request; False when it is refused, which is said."""
        self.service.asked.append(f"{self.command} {self.path}")
        status = self.service.faults.refuse.get(self.command)
        if status is None:
            return True
        self.close_connection = not reads
        self._answer(status, b"on purpose", "text/plain")
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _chunks(self) -> bytes | None:
        """Return a body sent in chunks; None when it broke off."""
        assert self.headers["Transfer-Encoding"] == "chunked"
        data = bytearray()
        with contextlib.suppress(OSError):
            while line := self.rfile.readline():
                size = int(line, 16)
                part = self.rfile.read(size + 2)
                if len(part) < size + 2:
                    return None
                if not size:
                    return bytes(data)
                data += part[:-2]
                self.service.received += size
                limit = self.service.faults.break_after
                if limit is not None and len(data) > limit:
                    return None
        return None

    def _versions(self) -> dict[str, Any]:
        links = [{"rel": "self", "href": f"{self.service.url}/v2/"}]
        version = {"id": "v2.9", "status": "CURRENT", "links": links}
        return {"versions": [version]}

    def _say(self, status: int, said: Any = None) -> None:
        body = b"" if said is None else json.dumps(said).encode()
        self._answer(status, body, "application/json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            if body:
                self.send_header("Content-Type", kind)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if status != 204:
                self.wfile.write(body)


class _Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Connections break on purpose here."""


@contextlib.contextmanager
def serving() -> Iterator[Service]:
    """Serve images on this machine."""
    service = Service()
    server = _Quiet(
        ("127.0.0.1", 0), type("Handler", (_Request,), {"service": service})
    )
    service.url = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


def clouds(service: Service) -> str:
    """Return a clouds.yaml with a cloud `here` that has this service."""
    return (
        "clouds:\n  here:\n    auth_type: none\n"
        f"    image_endpoint_override: {service.url}\n"
    )
