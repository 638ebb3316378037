"""``diffusionclip jobs``: looking after the jobs of a cluster."""

import re
import sys
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cluster import ANSWER_SECONDS, FAILED, PATIENCE_SECONDS, Address, Job, Patience, connect, details, ending, exit_status, told
from jobs.following import RAYS_OWN, watch

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails

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
