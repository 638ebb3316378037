"""Jobs on a cluster: reaching its dashboard, following a job to its end, and ``diffusionclip jobs``."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # importing Ray takes a second, and --help must not
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

SUCCEEDED, FAILED, REFUSED, STOPPED, UNKNOWN = 0, 1, 2, 4, 5
"""Exit status: 2 and 3 are also those of the commands themselves; 5 says that the job goes on and nobody looks."""
RAY = ">=2.60,<2.64"
"""Of the cluster: what this project runs on (pyproject.toml says the same)."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 30.0
SILENT_SECONDS = 30.0
"""After so long without a line, ask whether the job and the connection are alive."""
PATIENCE_SECONDS = 300.0
LOOK_SECONDS = 0.2
"""Between two looks whether Ctrl-C was pressed."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Between two attempts to connect; twice as long each time."""

Address = Annotated[
    str | None,
    typer.Option(
        help="Of the cluster's dashboard, like http://localhost:8265 through `ray dashboard cluster.yaml`.",
        show_default="RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if that is one",
    ),
]
Job = Annotated[str, typer.Argument(metavar="ID", help="The submission id.")]
Patience = Annotated[float, typer.Option("--reconnect", min=0, help="Seconds to go on trying when the connection is lost while following.")]


# ---- the connection --------------------------------------------------------------------------------------------------


def dashboard(address: str | None) -> str:
    """The address that was given, or else that of the environment. Raises ConfigError if it is none of a dashboard."""
    from pipeline.config import ConfigError

    named = [os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    found = address or next((a for a in named if a.startswith(("http://", "https://"))), "")
    if not re.fullmatch(r"https?://[^/\s]+.*", found):
        raise ConfigError("say where the cluster's dashboard is, with http:// or https://, like --address http://localhost:8265")
    return found.rstrip("/")


def connect(address: str | None) -> "JobSubmissionClient":
    """A client of a cluster that answers, lets us in and runs a Ray that this project runs on. Raises ConfigError."""
    from pipeline.config import ConfigError

    place = dashboard(address)
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray sends the token only then, and reads this once
    with told(place), environment_without("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # which Ray would prefer to ours
        client = _client_class()(place)
    version = getattr(client, "_server_ray_version", None)
    if version and not supported(version):
        raise ConfigError(f"the cluster at {shown(place)} runs Ray {version}; this project needs {RAY}")
    return client


def supported(version: str) -> bool:
    """True for a Ray that this project runs on."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(RAY).contains(version, prereleases=True)


def _client_class() -> type["JobSubmissionClient"]:
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):
        """Ray's own waits forever for a machine that takes connections and says nothing."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **options)

    return Client


@contextmanager
def told(address: str) -> Iterator[None]:
    """What goes wrong between us and a dashboard, as one sentence: ConfigError."""
    import requests
    from ray.exceptions import AuthenticationError

    from pipeline.config import ConfigError

    where = shown(address)
    try:
        yield
    except AuthenticationError as error:
        if "required" in str(error).partition("\n")[0]:
            raise ConfigError(f"the cluster at {where} wants a token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH") from None
        raise ConfigError(f"the cluster at {where} refuses the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token") from None
    except requests.exceptions.SSLError:
        raise ConfigError(f"the certificate of {where} cannot be verified") from None
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError):
        raise ConfigError(f"nothing answers at {where}: is the cluster up, and is that its dashboard's address?") from None
    except (requests.exceptions.RequestException, RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} is not the dashboard of a Ray cluster, or it is broken: {last_line(error)}") from None


@contextmanager
def environment_without(*names: str) -> Iterator[None]:
    """The environment of this process without some variables, for as long as it lasts."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def shown(address: str) -> str:
    """An address without user and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", address)


def last_line(error: object) -> str:
    """Of a traceback from the head the line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else type(error).__name__


def details(client: "JobSubmissionClient", job: str) -> "JobDetails":
    """What the cluster knows about a job. Raises ConfigError if nothing, OSError or RuntimeError if it cannot be asked."""
    from pipeline.config import ConfigError

    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "status code 404" in str(error):
            raise ConfigError(f"the cluster knows no job {job!r}; diffusionclip jobs list says which it knows") from None
        raise


# ---- the end of a job ------------------------------------------------------------------------------------------------


def exit_status(state: str, code: int | None) -> int:
    """Of a job that ended: its command's own where there is one; a signal n as shells say it, 128 + n; STOPPED is 4."""
    if state in ("SUCCEEDED", "STOPPED"):
        return SUCCEEDED if state == "SUCCEEDED" else STOPPED
    status = 128 - code if code is not None and code < 0 else code
    return status if status is not None and 0 < status < 256 else FAILED


def ending(job: str, info: "JobDetails") -> str:
    """One line about a job that ended."""
    if info.status == "SUCCEEDED":
        return f"job {job} succeeded"
    if info.status == "STOPPED":
        return f"job {job} was stopped"
    if info.driver_exit_code is None:
        return f"job {job} failed, and not by its command: {last_line(info.message or 'no reason is known')}"
    return f"job {job} failed with exit status {exit_status('FAILED', info.driver_exit_code)}"


def finish(job: str, info: "JobDetails") -> int:
    """Says how a job ended and returns the exit status."""
    from jobs.progress import console

    status = exit_status(info.status.value, info.driver_exit_code)
    if status:
        print(f"error: {ending(job, info)}", file=sys.stderr)
    else:
        console.print(ending(job, info), markup=False)
    return status


# ---- following -------------------------------------------------------------------------------------------------------

RAYS_OWN = re.compile(r"\[?\d{4}-\d\d-\d\d [\d:,]+\s.*(job_manager\.py|logging\.cc):\d+.*|Running entrypoint for job .*")
"""Lines that Ray puts at the start of every job's log."""
PROGRESS = re.compile(r"(?P<name>.+?): (?P<done>\d+)/(?P<total>\d+) (?P<unit>\S+), (?P<note>.*?)(?:, \d+ s left)?")
"""The plain lines of jobs/progress.py, which a job prints that has no terminal."""


class LostError(Exception):
    """The connection could not be made again; the job goes on."""


class Screen:
    """Shows a job's log as it comes: on a terminal its progress lines as the bar that the command would show here."""

    def __init__(self) -> None:
        from jobs.progress import console

        self.console = console
        self.seen = 0
        """Characters of the log so far: what to leave out when it is read again from its start."""
        self.rest = ""
        self.said = ""
        self.live = ExitStack()
        self.bar: Any = None

    def add(self, text: str) -> None:
        self.seen += len(text)
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.line(line)

    def line(self, line: str) -> None:
        if RAYS_OWN.fullmatch(line):
            return
        progress = PROGRESS.fullmatch(line) if self.console.is_terminal else None
        if progress is None:
            self.console.print(line, markup=False, soft_wrap=True)
        else:
            self.progress(progress["name"], int(progress["done"]), int(progress["total"]), progress["unit"], progress["note"])

    def progress(self, name: str, done: int, total: int, unit: str, note: str) -> None:
        from jobs.progress import display

        if self.bar is None or (self.bar.name, self.bar.total) != (name, total):
            self.close()
            self.bar = self.live.enter_context(display(name, total, unit))
        self.bar.bar.update(self.bar.task, completed=done, note=note)  # its own words, which count from the job's start
        if done >= total:
            self.close()

    def say(self, words: str) -> None:
        """A line of our own, unless it was the last one."""
        if words != self.said:
            self.console.print(words, markup=False, soft_wrap=True)
        self.said = words

    def close(self) -> None:
        """Ends the bar, so that something else can be written or asked."""
        self.live.close()
        self.bar = None

    def end(self) -> None:
        self.add("\n" if self.rest else "")
        self.close()


class CtrlC:
    """Notes Ctrl-C for those who look, because an exception that comes in the midst of a library can get lost there.

    Another Ctrl-C, if nobody has looked yet, is an exception after all.
    """

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> "CtrlC":
        self.kept = signal.signal(signal.SIGINT, self.press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.kept)

    def press(self, *_: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def look(self) -> None:
        if self.pressed:
            self.pressed = False
            raise KeyboardInterrupt

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Where it is an exception as everywhere else: while somebody is asked."""
        noting = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, noting)

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.pressed and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))


def follow(client: "JobSubmissionClient", job: str, screen: Screen, patience: float, ctrl_c: CtrlC) -> "JobDetails":
    """Shows a job's log until the job ends. Raises LostError, ConfigError if the cluster forgot the job, KeyboardInterrupt."""
    import aiohttp
    from ray.exceptions import AuthenticationError

    lost, wait = 0.0, SHORTEST_PAUSE
    while True:
        seen, since = screen.seen, time.monotonic()
        try:
            info = details(client, job)
            if info.status.is_terminal():
                screen.add(client.get_job_logs(job)[screen.seen :])
                screen.end()
                return info
            if lost:
                screen.say(f"connected again; job {job} is {info.status.value.lower()}")
            asyncio.run(_tail(client, job, screen, ctrl_c))
            lost, wait = 0.0, SHORTEST_PAUSE
        except AuthenticationError as error:
            raise LostError(str(error).partition("\n")[0]) from None
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            now = time.monotonic()
            if not lost or screen.seen > seen or now - since > SILENT_SECONDS:  # it worked in between
                lost, wait = now, SHORTEST_PAUSE
            wait = min(2 * wait, LONGEST_PAUSE)
            if now - lost + wait > patience:
                raise LostError(last_line(error)) from None
            screen.say(f"the connection is lost; job {job} goes on; trying again for {patience:.0f} s")
        ctrl_c.wait(wait)
        ctrl_c.look()


async def _tail(client: "JobSubmissionClient", job: str, screen: Screen, ctrl_c: CtrlC) -> None:
    """Shows what is new in the log until the job ends or Ctrl-C; if nothing comes, asks every so often whether it has ended."""
    skip, heard = screen.seen, time.monotonic()
    chunks = aiter(client.tail_job_logs(job))
    coming: asyncio.Future[str] | None = None
    try:
        while not ctrl_c.pressed:
            coming = coming or asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait({coming}, timeout=LOOK_SECONDS)
            if done:
                text = coming.result()
                coming, heard = None, time.monotonic()
                screen.add(text[skip:])
                skip = max(0, skip - len(text))
            elif time.monotonic() - heard > SILENT_SECONDS:
                info, heard = details(client, job), time.monotonic()  # blocks for a moment, which here harms nobody
                if info.status.is_terminal():
                    return
                if info.status == "PENDING":
                    screen.say(f"job {job} is waiting: {info.message}")
    except StopAsyncIteration:
        return
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def watch(client: "JobSubmissionClient", job: str, patience: float) -> int:
    """Follows a job; Ctrl-C asks what to do with it. Returns the exit status of the job, or 5 if it is left alone."""
    from pipeline.config import ConfigError

    screen, stopping = Screen(), False
    with CtrlC() as ctrl_c:
        while True:
            try:
                return finish(job, follow(client, job, screen, patience, ctrl_c))
            except LostError as error:
                screen.close()
                print(f"error: the connection is lost for good ({error})", file=sys.stderr)
                return left_alone(client, job)
            except ConfigError as error:  # the request was fine: the head has lost its memory meanwhile
                screen.close()
                print(f"error: {error}", file=sys.stderr)
                return FAILED
            except KeyboardInterrupt:
                screen.close()
                answer = "d" if stopping else asked(job, ctrl_c)
            if answer == "d":
                return left_alone(client, job)
            if answer == "s":
                stopping = stopped(client, job, screen)
            else:
                screen.say(f"following job {job}")


def asked(job: str, ctrl_c: CtrlC) -> str:
    """``s`` to stop the job, ``d`` to leave it alone (without a terminal, at the end of the input, at another Ctrl-C), or neither."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return "d"
    try:
        with ctrl_c.raised():
            return input(f"\nJob {job} is running: s stops it, d or Ctrl-C detaches, Enter goes on following: ").strip().lower()[:1]
    except (KeyboardInterrupt, EOFError):
        print()
        return "d"


def stopped(client: "JobSubmissionClient", job: str, screen: Screen) -> bool:
    """Tells a job to stop; False if the cluster could not be told."""
    from pipeline.config import ConfigError

    try:
        with told(client.get_address()):
            client.stop_job(job)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    screen.say(f"stopping job {job}; Ctrl-C detaches")
    return True


def left_alone(client: "JobSubmissionClient", job: str) -> int:
    print(f"job {job} goes on without this command\n{what_next(client.get_address(), job)}", file=sys.stderr)
    return UNKNOWN


def what_next(address: str, job: str) -> str:
    """The commands that take a job up again."""
    place = f"--address {shown(address)}"
    return f"follow: diffusionclip jobs logs {job} --follow {place}\nstop:   diffusionclip jobs stop {job} {place}"


# ---- diffusionclip jobs ----------------------------------------------------------------------------------------------

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look after the jobs of a cluster: list, status, logs, stop.")


@app.command("list")
def list_jobs(address: Address = None) -> None:
    """List the jobs that were submitted to the cluster, the latest first.

    [bold]Examples[/bold]

    diffusionclip jobs list --address http://localhost:8265
    """
    from rich import box
    from rich.table import Table

    from jobs.progress import console

    client = connect(address)
    with told(client.get_address()):
        found = [info for info in client.list_jobs() if info.submission_id]
    table = Table("job", "state", "exit", "started", "took", "command", box=box.SIMPLE, pad_edge=False)
    table.columns[-1].no_wrap = True
    for info in sorted(found, key=lambda info: info.start_time or 0, reverse=True):
        code = str(exit_status(info.status.value, info.driver_exit_code)) if info.status.is_terminal() else ""
        table.add_row(info.submission_id, info.status.value.lower(), code, *when(info), typed(info.entrypoint))
    console.print(table)


@app.command()
def status(job: Job, address: Address = None) -> None:
    """Say how a job is: its state, since when, and the last line of its log.

    [bold]Examples[/bold]

    diffusionclip jobs status edit-1f2e3d4c --address http://localhost:8265
    """
    from jobs.progress import console

    client = connect(address)
    with told(client.get_address()):
        info = details(client, job)
        log = client.get_job_logs(job)
    started, took = when(info)
    words = ending(job, info) if info.status.is_terminal() else f"job {job} is {info.status.value.lower()}"
    console.print(f"{words}\n  {typed(info.entrypoint)}\n  started {started or '-'}, took {took or '-'}", markup=False, soft_wrap=True)
    told_last = [line for line in log.splitlines() if line.strip() and not RAYS_OWN.fullmatch(line)]
    if told_last:
        console.print(f"  {told_last[-1]}", markup=False, soft_wrap=True)


@app.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends; the exit status is the job's.")] = False,
    reconnect: Patience = PATIENCE_SECONDS,
) -> None:
    """Print the log of a job, or follow it as `diffusionclip submit` does.

    [bold]Examples[/bold]

    diffusionclip jobs logs edit-1f2e3d4c --follow --address http://localhost:8265
    """
    client = connect(address)
    with told(client.get_address()):
        details(client, job)
        if not follow:
            sys.stdout.write(client.get_job_logs(job))
            return
    raise typer.Exit(watch(client, job, reconnect))


@app.command()
def stop(job: Job, address: Address = None) -> None:
    """Stop a job and wait until it has ended; what it has written stays.

    [bold]Examples[/bold]

    diffusionclip jobs stop edit-1f2e3d4c --address http://localhost:8265
    """
    from jobs.progress import console

    client = connect(address)
    with told(client.get_address()):
        info = details(client, job)
        if not info.status.is_terminal():
            client.stop_job(job)
            until = time.monotonic() + ANSWER_SECONDS
            while not (info := details(client, job)).status.is_terminal() and time.monotonic() < until:
                time.sleep(0.5)
    if not info.status.is_terminal():
        why = ": it will when it starts; Ray fails what cannot start" if info.status == "PENDING" else ""
        print(f"error: job {job} was told to stop and has not ended yet{why}", file=sys.stderr)
        raise typer.Exit(FAILED)
    console.print(ending(job, info), markup=False)


def when(info: "JobDetails") -> tuple[str, str]:
    """When a job started, and how long it took or has taken."""
    if not info.start_time:
        return "", ""
    started = info.start_time // 1000
    ended = info.end_time // 1000 if info.end_time else time.time()
    return f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M:%S}", str(timedelta(seconds=int(max(0, ended - started))))


def typed(entrypoint: str) -> str:
    """The command of a job as a person would type it."""
    return re.sub(r"^\S+ -P -m jobs\.(cli|environment) ", "diffusionclip ", entrypoint)
