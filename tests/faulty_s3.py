"""A proxy in front of an S3 server that answers some requests as a bad day would."""

import http.client
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Fault = Callable[[str, str], str | None]
"""Method and path of a request -> what happens to it, one of ``KINDS``; None: it is passed on."""
ERRORS = {
    "busy": (503, "SlowDown", "Please reduce your request rate."),
    "down": (500, "InternalError", "We encountered an internal error."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
OF_THE_CONNECTION = {"Transfer-Encoding", "Connection", "Content-Length"}
KINDS = (*ERRORS, "reset", "lost", "cut", "slow")
"""``reset``: the connection breaks before anything happens; ``lost``: after it happened; ``cut``: in the middle of the answer."""


@dataclass
class FaultyS3:
    behind: str
    url: str = ""
    fault: Fault = lambda method, path: None
    happened: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def choose(self, method: str, path: str) -> str | None:
        with self.lock:
            kind = self.fault(method, path)
            self.happened[kind or "none"] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: FaultyS3, *args: object):
        self.proxy = proxy
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None: ...

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.proxy.choose(self.command, self.path)
        if kind in ERRORS:
            status, code, text = ERRORS[kind]
            answer = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
            self.reply(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else answer)
        elif kind == "reset":
            self.break_off()
        else:
            self.pass_on(body, kind)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

    def pass_on(self, body: bytes, kind: str | None) -> None:
        server = http.client.HTTPConnection(urlsplit(self.proxy.behind).netloc)
        server.request(self.command, self.path, body, dict(self.headers.items()))
        response = server.getresponse()
        data = response.read()
        headers = [
            (name, value) for name, value in response.getheaders() if name not in {"Transfer-Encoding", "Connection", "Content-Length"}
        ]
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        server.close()
        if kind == "lost":
            self.break_off()
        elif kind == "cut" and len(data) > 1:
            self.reply(response.status, headers, data[: len(data) // 2], str(len(data)))
            self.break_off()
        else:
            threading.Event().wait(0.4 if kind == "slow" else 0)
            self.reply(response.status, headers, data, length)

    def reply(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in [*headers, ("Content-Length", length or str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def break_off(self) -> None:
        """The other side sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            return


@contextmanager
def faulty_s3(behind: str) -> Iterator[FaultyS3]:
    proxy = FaultyS3(behind)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, proxy))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
