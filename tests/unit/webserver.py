# SPDX-License-Identifier: Apache-2.0
"""A real web server with faults to choose, for sources of images."""

import contextlib
import http.server
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trustme

Handler = Callable[["Request"], None]


@dataclass
class Fault:
    """What the server does wrong, and how often."""

    times: int = 1
    """Requests for the data that it is done to."""
    cut: int | None = None
    """Bytes after which the connection breaks."""
    stall: bool = False
    """It then says nothing more, instead of breaking."""
    drip: bool = False
    """One byte at a time."""
    status: int | None = None
    no_range: bool = False
    """All is sent, whatever part was asked for."""
    wrong_range: bool = False
    more: bytes = b""
    """What is sent behind the end."""
    unsized: bool = False
    """No length is told: the end of the connection is the end of the data."""


@dataclass
class Site:
    """What is served."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    fault: Fault | None = None
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of each request."""
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)

    def faulty(self) -> Fault:
        """Return the fault of this request; it is used up."""
        if self.fault is None or self.fault.times <= 0:
            return Fault(times=0)
        self.fault.times -= 1
        return self.fault


class Request(http.server.BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    # Private

    def _answer(self) -> None:
        self.site.asked.append((self.command, self.path, self.headers["Range"]))
        self.site.headers.append(dict(self.headers))
        path = self.path.partition("?")[0]
        if path in self.site.redirects:
            self.send_response(302)
            self.send_header("Location", self.site.redirects[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path in self.site.files:
            self._send(self.site.files[path])
        else:
            self._status(404)

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes) -> None:
        is_body = self.command == "GET"
        fault = self.site.faulty() if is_body else Fault(times=0)
        if fault.status:
            self._status(fault.status)
            return
        body = self._part(data, fault) + fault.more
        if body is data or not self.headers["Range"] or fault.no_range:
            self.send_response(200)
        if fault.unsized:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if is_body:
            self._write(body, fault)

    def _part(self, data: bytes, fault: Fault) -> bytes:
        asked = self.headers["Range"]
        if not asked or fault.no_range:
            return data
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return b""
        shift = 1 if fault.wrong_range else 0
        self.send_response(206)
        span = f"{start + shift}-{len(data) - 1}"
        self.send_header("Content-Range", f"bytes {span}/{len(data)}")
        return data[start + shift :]

    def _write(self, body: bytes, fault: Fault) -> None:
        self.close_connection = fault.unsized or fault.cut is not None
        with contextlib.suppress(OSError):
            if fault.drip:
                for number in range(len(body)):
                    self.wfile.write(body[number : number + 1])
                    if self.site.stopped.wait(0.02):
                        return
            self.wfile.write(body[: fault.cut])
            self.wfile.flush()
            if fault.stall:
                self.site.stopped.wait(60)
            if fault.cut is not None:
                self.connection.shutdown(socket.SHUT_RDWR)


class _Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Connections break on purpose here."""


@contextlib.contextmanager
def serving(authority: trustme.CA | None = None) -> Iterator[Site]:
    """Serve a site on this machine, by TLS if an authority is given."""
    site = Site()
    server = _Quiet(("127.0.0.1", 0), type("Handler", (Request,), {"site": site}))
    if authority is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if authority is None else "https"
    site.url = f"{scheme}://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join(30)
