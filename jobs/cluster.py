"""Jobs on a cluster: reaching its dashboard, and what the end of a job means."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # importing Ray takes a second, and --help must not
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

SUCCEEDED, FAILED, STOPPED, UNKNOWN = 0, 1, 4, 5
"""Exit status: 2 and 3 are also those of the commands themselves; 5 says that the job goes on and nobody looks."""
RAY = ">=2.60,<2.64"
"""Of the cluster: what this project runs on (pyproject.toml says the same)."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 30.0
PATIENCE_SECONDS = 300.0

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
