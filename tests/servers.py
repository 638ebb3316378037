"""Servers on the loopback interface that speak as the real stores do, and processes that ask them."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMIT, LATER_COMMIT = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@dataclass
class Web:
    """A folder behind http; ``/denied/...`` is forbidden, ``/broken/...`` an error, ``/cut/...`` ends too early, and of
    ``/silent/...`` nothing is said by which a change could be noticed."""

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Every request: ``GET /path``."""
    on_request: Callable[[str], object] = lambda request: None
    """Called before each answer."""


class _WebHandler(SimpleHTTPRequestHandler):
    def __init__(self, web: Web, *args: object):
        self.web = web
        super().__init__(*args, directory=str(web.folder))  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None: ...

    def send_header(self, keyword: str, value: str) -> None:
        if not (keyword == "Last-Modified" and self.path.startswith("/silent/")):
            super().send_header(keyword, value)

    def do_HEAD(self) -> None:
        if not self.answered_badly():
            super().do_HEAD()

    def do_GET(self) -> None:
        if not self.answered_badly():
            super().do_GET()

    def answered_badly(self) -> bool:
        self.web.asked.append(f"{self.command} {self.path}")
        self.web.on_request(self.web.asked[-1])
        status = {"denied": 403, "broken": 500}.get(self.path.split("/")[1])
        if status:
            self.send_error(status)
        elif self.path.startswith("/cut/"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"few")
        else:
            return False
        return True


class _HubHandler(SimpleHTTPRequestHandler):
    """What the client of the Hugging Face hub asks for: a model's revision with its files, and the files."""

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        about = self.path.startswith("/api/models/")
        owner, name, *rest = self.path.removeprefix("/api/models").strip("/").split("/")
        model = Path(self.directory, owner, name)
        if owner == "gated":
            self.reply(403, {"X-Error-Code": "GatedRepo"})
        elif owner == "down":
            self.reply(503)
        elif owner == "forbidden":
            self.reply(403)
        elif not model.is_dir():
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        elif len(rest) > 1 and rest[1] not in {"main", "moving", COMMIT}:
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif about:
            files = [{"rfilename": file.relative_to(model).as_posix()} for file in sorted(model.rglob("*")) if file.is_file()]
            body = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": files}).encode()
            self.reply(200, {"Content-Type": "application/json"}, body)
        else:
            body = model.joinpath(*rest[2:]).read_bytes()
            commit = LATER_COMMIT if rest[1] == "moving" else COMMIT
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
            self.reply(200, headers, body, with_body)

    def reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextmanager
def _serving(handler: Callable[..., SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def web_server(folder: Path) -> Iterator[Web]:
    web = Web(folder)
    with _serving(partial(_WebHandler, web)) as web.url:
        yield web


@contextmanager
def hub_server(folder: Path) -> Iterator[str]:
    """A hub with the models ``folder/OWNER/NAME`` at ``COMMIT``. Those of gated, down and forbidden are as their owner's name
    says; the branch ``moving`` is at ``LATER_COMMIT`` for whoever asks for its files."""
    with _serving(partial(_HubHandler, directory=str(folder))) as url:
        yield url


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment in which ``s3://`` is a server on this machine."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


def start_elsewhere(code: str, **env: object) -> "subprocess.Popen[str]":
    """Runs Python code in a process of its own, with the project's modules; what it prints is read from its stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in env.items()}},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def elsewhere(code: str, **env: object) -> str:
    """What a process of its own prints, where nothing is remembered; a WeightsError is printed by its name and message."""
    body = "\n".join(f"    {line}" for line in code.strip().splitlines())
    return ended(
        start_elsewhere(
            f"from models.references import WeightsError\ntry:\n{body}\nexcept WeightsError as e:\n    print(type(e).__name__, e)", **env
        )
    )
