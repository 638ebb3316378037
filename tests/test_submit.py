"""What would be lost: a job on a cluster that ends here as it ended there, that can be left and taken up again, and whose
credentials no log shows; and a wrong request that is refused before anything is sent. The cluster is a real one, of one node."""

import io
import os
import pty
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pyarrow.parquet as pq
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from jobs import cluster, following, progress, submit
from jobs.cli import app
from models.domains import DOMAINS
from pipeline.config import ConfigError
from pipeline.schema import image_bytes

ROOT = Path(__file__).parent.parent
HELD_OUT = str(DOMAINS["pixelface"].held_out)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TOKEN = secrets.token_hex(16)


# ---- a cluster, and commands that are given to it --------------------------------------------------------------------


def environment(**changes: str) -> dict[str, str]:
    """Of a process that knows the token and nothing of AWS and of other clusters."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    return {**kept, **ray, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@dataclass
class Head:
    address: str
    folder: Path
    waiting: str = ""
    """A job that runs until it is stopped."""

    def start(self, *words: str, address: str = "", **changes: str) -> "subprocess.Popen[str]":
        """A command of ours, with pipes."""
        place = ("--address", address or self.address) if words[0] in {"submit", "jobs"} else ()
        python = ("--python", sys.executable) if words[0] == "submit" and "--python" not in words else ()
        command = [sys.executable, "-m", "jobs.cli", *words, *place, *python]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment(**changes), cwd=ROOT, text=True, start_new_session=True, **pipes)

    def run(self, *words: str, status: int = 0, **changes: str) -> tuple[str, str]:
        """What a command of ours says, on stdout and on stderr."""
        process = self.start(*words, **changes)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status, out + err
        assert "Traceback" not in err
        return out, err


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A node of its own with a dashboard on loopback and the token; it runs in a folder without this project."""
    folder = Path(tempfile.mkdtemp(prefix="dc"))  # short: paths of sockets in it are limited
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=100000000"]
    command += ["--port=0", f"--dashboard-port={port}", f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-log-monitor=false", f"--temp-dir={folder / 'ray'}"]
    env = environment(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0", RAY_worker_niceness="0", RAY_JOB_STOP_WAIT_TIME_S="1")
    del env["PYTHONPATH"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    made = Head(f"http://127.0.0.1:{port}", folder)
    try:
        until("the dashboard answers", lambda: process.poll() is not None or answers(port))
        assert process.poll() is None, (folder / "head.log").read_text()
        yield made
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for left in psutil.wait_procs(family, timeout=5)[1]:
            left.kill()
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def until(what: str, true: Callable[[], Any], seconds: float = 90) -> None:
    """Looks until it is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        select.select([], [], [], 0.05)


def read_until(stream: Any, words: str, seconds: float = 90) -> str:
    """What a process says up to and with the line that has the words."""
    said, end = "", time.monotonic() + seconds
    while words not in said:
        assert select.select([stream], [], [], max(0, end - time.monotonic()))[0], f"{words!r} did not come: {said}"
        try:
            piece = os.read(stream if isinstance(stream, int) else stream.fileno(), 65536).decode()
        except OSError:  # the other side of a pseudo terminal is closed
            piece = ""
        assert piece, f"{words!r} did not come: {said}"
        said += piece
    return said


@pytest.fixture
def waiting(head: Head, tmp_path: Path) -> str:
    """The id of a job that waits; the same for all tests until one has stopped it."""
    if not head.waiting:
        job = f"waits-{secrets.token_hex(4)}"
        words = ("invert", HELD_OUT, str(tmp_path / "out"), "--gpus", "1", "--shared-paths")  # and this cluster has no GPU
        out, err = head.run("submit", "--no-wait", "--submission-id", job, *words)
        assert out == f"{job}\n"
        assert f"diffusionclip jobs logs {job} --follow" in err
        head.waiting = job
    return head.waiting


# ---- jobs that end ---------------------------------------------------------------------------------------------------


def test_a_job_runs_with_our_code_and_credentials_and_no_log_of_the_cluster_shows_these(head: Head, s3: str) -> None:
    """The cluster has neither: without them the driver finds no command, and neither it nor the workers reach the bucket."""
    fs = fsspec.filesystem("s3")
    for i, data in enumerate(image_bytes(pq.read_table(HELD_OUT)["image"].slice(0, 3))):
        fs.pipe(f"{s3}/submitted/faces/{i}.png", data)
    secret = secrets.token_hex(16)
    given = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {"AWS_SECRET_ACCESS_KEY": secret}
    names = [word for name in given for word in ("--env", name)]
    walk = ("--return-step", "200", "--steps-up", "2", "--workers", "1")
    out, err = head.run("submit", "invert", f"{s3}/submitted/faces", f"{s3}/submitted/latents", *walk, *names, **given)
    assert "invert: 3/3 rows, 0 rejected" in out
    assert re.search(r"job invert-\w{8} succeeded\n$", out)
    with fs.open(fs.glob(f"{s3}/submitted/latents/*.parquet")[0], "rb") as file:
        assert pq.read_table(file)["latent"].null_count == 0
    listed = head.run("jobs", "list")[0]
    logs = [file.read_text(errors="replace") for file in (head.folder / "ray").glob("*/logs/**/*") if file.is_file()]
    assert any("diffusionclip_environment" in log or "jobs.environment" in log for log in logs)
    assert [text for text in (out, err, listed, *logs) if secret in text] == []


def test_an_impossible_request_ends_with_2_here_as_it_does_there(head: Head) -> None:
    out, err = head.run("submit", "invert", "s3://b/faces", "s3://b/out", "--domain", "pixelfaec", "--entrypoint-cpus", "1", status=2)
    assert "did you mean 'pixelface'?" in out
    assert "failed with exit status 2" in err


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 3, 3),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
        ("FAILED", 256, 1),
        ("STOPPED", None, 4),
    ],
)
def test_the_exit_status_is_that_of_the_command_and_never_0_for_what_did_not_succeed(state: str, code: int | None, status: int) -> None:
    assert cluster.exit_status(state, code) == status


# ---- jobs that are left, taken up again and stopped ------------------------------------------------------------------


def test_ctrl_c_on_a_terminal_asks_and_another_one_detaches(head: Head, waiting: str) -> None:
    with on_a_terminal(head, "jobs", "logs", waiting, "--follow") as (process, screen):
        read_until(screen, "invert: starting")
        os.write(screen, b"\x03")
        read_until(screen, "Enter goes on following: ")
        os.write(screen, b"\x03")
        assert "goes on without this command" in read_until(screen, "jobs stop")
        assert process.wait(30) == 5


def test_ctrl_c_without_a_terminal_detaches_and_says_how_to_go_on(head: Head, waiting: str) -> None:
    process = head.start("jobs", "logs", waiting, "--follow")
    read_until(process.stdout, "invert: starting")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 5
    assert f"diffusionclip jobs logs {waiting} --follow --address {head.address}" in err
    assert f"job {waiting} is running" in head.run("jobs", "status", waiting)[0]


def test_a_lost_connection_is_made_again_without_repeating_the_log_or_given_up_with_a_word_on_how_to_go_on(
    head: Head, waiting: str
) -> None:
    with bridge(int(head.address.rpartition(":")[2])) as way:
        patient = head.start("jobs", "logs", waiting, "--follow", address=way.address)
        hasty = head.start("jobs", "logs", waiting, "--follow", "--reconnect", "0.5", address=way.address)
        said = read_until(patient.stdout, "invert: starting")
        read_until(hasty.stdout, "invert: starting")
        way.close()
        _, err = hasty.communicate(timeout=60)
        assert hasty.returncode == 5
        assert "lost for good" in err
        assert f"diffusionclip jobs logs {waiting} --follow" in err
        said += read_until(patient.stdout, "the connection is lost; job")
        way.open()
        said += read_until(patient.stdout, "connected again")
        patient.send_signal(signal.SIGINT)
        out, _ = patient.communicate(timeout=60)
    assert patient.returncode == 5
    assert (said + out).count("invert: starting") == 1


def test_a_job_that_was_stopped_on_the_terminal_does_not_end_with_0(head: Head, waiting: str) -> None:
    with on_a_terminal(head, "jobs", "logs", waiting, "--follow") as (process, screen):
        read_until(screen, "invert: starting")
        os.write(screen, b"\x03")
        read_until(screen, "Enter goes on following: ")
        os.write(screen, b"\n")
        read_until(screen, "following job")
        os.write(screen, b"\x03")
        read_until(screen, "Enter goes on following: ")
        os.write(screen, b"s\n")
        head.waiting = ""
        read_until(screen, "was stopped")
        assert process.wait(30) == 4


def test_a_job_that_was_stopped_by_its_id_does_not_end_with_0(head: Head, tmp_path: Path) -> None:
    job = head.run("submit", "--no-wait", "invert", HELD_OUT, str(tmp_path), "--shared-paths")[0].strip()
    assert head.run("jobs", "stop", job)[0] == f"job {job} was stopped\n"
    assert f"error: job {job} was stopped" in head.run("jobs", "logs", job, "--follow", status=4)[1]


def test_a_submission_id_is_good_for_one_job(head: Head, waiting: str) -> None:
    _, err = head.run("submit", "--submission-id", waiting, "invert", "s3://b/faces", "s3://b/out", "--no-code", status=2)
    assert err == f"error: the cluster has a job {waiting} already; give another --submission-id\n"


def test_a_job_that_the_cluster_does_not_know_is_said(head: Head) -> None:
    assert "the cluster knows no job 'nobody'" in head.run("jobs", "logs", "nobody", "--follow", status=2)[1]


@contextmanager
def on_a_terminal(head: Head, *words: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A command of ours whose terminal is ours to read and type on."""
    screen, theirs = pty.openpty()
    python = ("--python", sys.executable) if words[0] == "submit" else ()
    command = [sys.executable, "-m", "jobs.cli", *words, "--address", head.address, *python]
    leader = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", leader, *command],
        env=environment(),
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, screen
    finally:
        process.kill()
        process.wait()
        os.close(screen)


class Bridge:
    """A port of this machine that leads to another, until it is closed; then nothing answers there."""

    def __init__(self, port: int) -> None:
        self.port, self.ends = port, set[socket.socket]()
        self.here = free_port()
        self.address = f"http://127.0.0.1:{self.here}"
        self.open()

    def open(self) -> None:
        self.door = socket.create_server(("127.0.0.1", self.here))
        threading.Thread(target=self.let_in, args=(self.door,), daemon=True).start()

    def close(self) -> None:
        self.door.shutdown(socket.SHUT_RDWR)
        self.door.close()
        for end in list(self.ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def let_in(self, door: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = door.accept()
                far = socket.create_connection(("127.0.0.1", self.port))
                self.ends |= {near, far}
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self.carry, args=ends, daemon=True).start()

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@contextmanager
def bridge(port: int) -> Iterator[Bridge]:
    made = Bridge(port)
    try:
        yield made
    finally:
        with suppress(OSError):
            made.close()


# ---- what is refused before anything is sent -------------------------------------------------------------------------


def test_a_token_that_is_missing_or_wrong_is_said_and_never_shown(head: Head) -> None:
    edit = ("submit", "edit", "s3://b/faces", "s3://b/out", "-a", "glasses")
    assert "wants a token" in head.run(*edit, status=2, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")[1]
    err = head.run(*edit, status=2, RAY_AUTH_TOKEN="ab" * 16)[1]
    assert "refuses the token" in err
    assert "ab" * 16 not in err


def test_an_address_where_nothing_answers_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^nothing answers at http://127\.0\.0\.1:\d+: [^\n]*$"):
        cluster.connect(f"http://someone:hidden@127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("answer", "says"), [(b'{"ray_version": "2.49.1"}', "runs Ray 2.49.1"), (b"<html>", "is not the dashboard of a Ray")]
)
def test_a_ray_that_is_too_old_and_a_server_that_is_no_ray_are_said(answer: bytes, says: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            with pytest.raises(ConfigError, match=says):
                cluster.connect(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["report", "s3://b/edits"], "report does not use a cluster; submit align, edit"),
        (["edti", "s3://b/faces", "s3://b/out"], "did you mean 'edit'?"),
        (["invert", "faces", "s3://b/out"], "the cluster does not see paths of this machine (input faces)"),
        (["invert", "s3://b/faces", "file:///out"], "(output file:///out)"),
        (["edit", "s3://b/faces", "s3://b/out", "--models", str(ROOT)], "(--models"),
        (["invert", "s3://user:word@b/faces", "s3://b/out"], "has a credential in it"),
        (["edit", "s3://b/faces", "s3://b/out", "--models", "https://h/m.safetensors?X-Amz-Signature=word"], "has a credential in it"),
        (["invert", "s3://b/faces", "s3://b/out", "--env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE is not set"),
        (["invert", "s3://b/faces", "s3://b/out", "--env", "KEY=word"], "--env takes the name alone"),
        (["invert", "s3://b/faces", "s3://b/out", "--submission-id", "a/b"], "a submission id has letters"),
        (["invert", "s3://b/faces", "s3://b/out", "--address", "localhost:8265"], "with http:// or https://"),
        (["--address", "http://h", "--", "invert", "s3://b/faces", "s3://b/out", "--address", "http://i"], "before the --"),
    ],
)
def test_a_wrong_request_is_refused_without_asking_the_cluster_and_without_showing_a_secret(words: list[str], says: str) -> None:
    error = CliRunner().invoke(app, ["submit", *words]).exception
    assert isinstance(error, ConfigError)
    assert says in str(error)
    assert "word" not in str(error)


def test_the_submitted_command_is_parsed_by_its_own_parser() -> None:
    done = CliRunner().invoke(app, ["submit", "invert", "s3://b/faces", "s3://b/out", "--steps-up", "many"])
    assert done.exit_code == 2
    assert "--steps-up" in done.output


# ---- the command as the cluster gets it ------------------------------------------------------------------------------


def sent(*words: str, shared: bool = False) -> list[str]:
    """The words of the command that the cluster would run."""
    root = typer.main.get_command(app).make_context("diffusionclip", ["submit", *words])
    name, found = submit.parsed(root, list(words))  # type: ignore[arg-type]
    return submit.entrypoint("python", name, submit.seen_from_there(found, shared), False).split()[4:]


def test_a_command_arrives_as_it_was_given() -> None:
    words = ["edit", "s3://b/faces", "s3://b/out", "-aglasses", "-a", "none", "--degree=0.5", "--overwrite", "--models", "org/name"]
    parts = ["--attribute", "glasses", "--attribute", "none", "--degree", "0.5", "--models", "org/name", "--overwrite"]
    assert sent(*words) == ["edit", "s3://b/faces", "s3://b/out", *parts]


def test_paths_that_all_nodes_share_are_made_absolute_and_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    words = sent("edit", "faces", "s3://b/out", "-a", "faces", "--models", "faces", "--domain", "pixelface", shared=True)
    here = str(tmp_path / "faces")
    assert words == ["edit", here, "s3://b/out", "--attribute", "faces", "--domain", "pixelface", "--models", here]


def test_options_of_submit_can_stand_anywhere_because_no_submitted_command_has_one_of_that_name() -> None:
    ours = {option for p in COMMANDS["submit"].params for option in (*p.opts, *p.secondary_opts)} - {"--address"}
    for name in ("align", "edit", "finetune", "invert"):
        assert ours.isdisjoint(option for p in COMMANDS[name].params for option in (*p.opts, *p.secondary_opts) if option.startswith("-"))


def test_the_ray_that_a_cluster_must_run_is_the_one_that_is_installed_here() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert next(w for w in wanted if w.startswith("ray[")).partition("]")[2] == cluster.RAY


# ---- the display -----------------------------------------------------------------------------------------------------


def test_on_a_terminal_the_lines_that_a_job_prints_become_the_bar_that_its_command_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, terminal = io.StringIO(), io.StringIO()
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "console", Console(file=lines, width=120, highlight=False))
    with progress.display("edit", 40) as shown:
        shown.update(10, "2 rejected")
        shown.update(40, "3 rejected")
    assert "edit: 10/40 rows, 2 rejected" in lines.getvalue()
    monkeypatch.setattr(progress, "console", Console(file=terminal, width=120, force_terminal=True, highlight=False))
    screen = following.Screen()
    for piece in re.findall(r".{1,7}", lines.getvalue() + "edit took 2.0 s [a/b]", re.DOTALL):  # chunks do not end with lines
        screen.add(piece)
    screen.end()
    seen = terminal.getvalue()
    assert re.search(r"━.*40/40.*3 rejected", seen)
    assert "edit: 10/40" not in seen
    assert "edit took 2.0 s [a/b]" in seen
