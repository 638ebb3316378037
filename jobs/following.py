"""Following a job of a cluster to its end: its log on this screen, Ctrl-C, and connections that are lost."""

import asyncio
import re
import select
import signal
import sys
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from jobs.cluster import FAILED, UNKNOWN, details, finish, last_line, shown, told

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

SILENT_SECONDS = 30.0
"""After so long without a line, ask whether the job and the connection are alive."""
LOOK_SECONDS = 0.2
"""Between two looks whether Ctrl-C was pressed."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Between two attempts to connect; twice as long each time."""

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
    print(f"\nJob {job} is running: s stops it, d or Ctrl-C detaches, Enter goes on following: ", end="", flush=True)
    with suppress(KeyboardInterrupt):
        while not ctrl_c.pressed:  # not input(): a Ctrl-C between its question and its waiting is noticed at the next key
            if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
                line = sys.stdin.readline()
                return line.strip().lower()[:1] if line else "d"
    ctrl_c.pressed = False
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
