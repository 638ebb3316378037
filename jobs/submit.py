"""``diffusionclip submit``: another command, run as a job of a Ray cluster."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import cluster as c
from jobs import following

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CODE = ("models", "pipeline", "jobs")
NOT_SHIPPED = ["__pycache__", "node_modules"]
PLACES = {"out", "work"}
"""Options that are paths of files to write; all arguments of our commands are paths."""
REFERENCES = {"domain", "models", "identity", "landmark_model", "clip", "score_clip"}
"""Options that may be paths, and names of other things too."""
SECRET = re.compile(r"://[^/@\s]*:[^/@\s]*@|[?&][^=&]*(signature|token|sig|secret|password|credential|key)[^=&]*=", re.IGNORECASE)
HEAD = {"node:__internal_head__": 0.001}
"""Ray's name for the node that every cluster has once; a job that asks for CPUs could be put on any other."""
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Words = Annotated[
    list[str], typer.Argument(metavar="COMMAND ...", help="A command of diffusionclip that can use a cluster, with all it needs.")
]
SubmissionId = Annotated[
    str | None, typer.Option("--submission-id", help="A name for the job; each can be used once.", show_default="made")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the submission id and leave.")]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME", help="Give the job this environment variable of yours; no log shows its value; may be repeated."),
]
NoCode = Annotated[bool, typer.Option("--no-code", help="Ship nothing: the cluster's image has this project installed.")]
SharedPaths = Annotated[
    bool, typer.Option("--shared-paths", help="Every node sees paths of this machine: a shared file system, or a cluster of one machine.")
]
Python = Annotated[str, typer.Option("--python", metavar="PROGRAM", help="The cluster's Python that has the packages.")]
DriverCpus = Annotated[float, typer.Option("--entrypoint-cpus", min=0, help="CPUs of the head to keep for the driver.")]


@dataclass(frozen=True)
class Word:
    """What was given for one parameter of a command, and how it is typed."""

    name: str
    is_argument: bool
    option: str
    value: str | None
    """None for a flag."""

    @property
    def is_local(self) -> bool:
        """True for a path of this machine."""
        if self.value is None or re.match(r"(?!file:)\w+:", self.value):
            return False
        if self.is_argument or self.name in PLACES:
            return True
        return self.name in REFERENCES and (self.value.startswith(("/", "./", "../", "~", "file:")) or Path(self.value).exists())

    @property
    def typed(self) -> list[str]:
        return [word for word in (self.option, self.value) if word is not None and word != ""]


def submit(
    context: typer.Context,
    command: Words,
    address: c.Address = None,
    submission_id: SubmissionId = None,
    no_wait: NoWait = False,
    env: Env = None,
    no_code: NoCode = False,
    shared_paths: SharedPaths = False,
    python: Python = "python",
    entrypoint_cpus: DriverCpus = 0.0,
    reconnect: c.Patience = c.PATIENCE_SECONDS,
) -> None:
    """Run a command as a job of a Ray cluster: ship the code, follow the log, end with the job's exit status.

    Ctrl-C asks whether to stop the job or to detach. Exit status: the command's own; 4 if the job was stopped; 5 if it
    goes on and this command does not.

    [bold]Examples[/bold]

    diffusionclip submit --address http://localhost:8265 edit s3://bucket/faces s3://bucket/edits -a glasses --workers 8 --gpus 1

    diffusionclip submit invert s3://bucket/faces s3://bucket/latents --env AWS_PROFILE --no-wait
    """
    from pipeline.config import ConfigError

    name, words = parsed(context, command)
    if submission_id and not JOB_ID.fullmatch(submission_id):
        raise ConfigError(f"a submission id has letters, digits, '.', '_' and '-', at most 100; got {submission_id!r}")
    values, words = chosen(env or []), seen_from_there(words, shared_paths)
    client = c.connect(address)
    job = send(client, name, submission_id, entrypoint(python, name, words, bool(values)), code(no_code), values, entrypoint_cpus)
    if no_wait:
        print(job)
        print(following.what_next(client.get_address(), job), file=sys.stderr)
        return
    print(f"job {job} is submitted to {c.shown(client.get_address())}")
    raise typer.Exit(following.watch(client, job, reconnect))


# ---- the command -----------------------------------------------------------------------------------------------------


def parsed(context: typer.Context, words: list[str]) -> tuple[str, list[Word]]:
    """The command's name and what was given to it, by its own parser, which ends the program if it refuses. Raises ConfigError."""
    from pipeline.config import ConfigError, unknown

    commands: dict[str, Any] = context.find_root().command.commands  # type: ignore[attr-defined]
    usable = sorted(name for name, c in commands.items() if name != "submit" and any(p.name == "address" for p in c.params))
    name, *rest = words
    if name not in usable:
        raise ConfigError(
            f"{name} does not use a cluster; submit {', '.join(usable)}" if name in commands else unknown("command", name, usable)
        )
    secret = next((word for word in rest if SECRET.search(word)), None)
    if secret:
        scheme = secret.partition("://")[0]
        raise ConfigError(f"{scheme}://... has a credential in it, and Ray logs commands: give it by --env, or by a role of the nodes")
    given = commands[name].make_context(name, rest, parent=context.find_root())
    found = list(given_words(commands[name], given))
    if any(word.name == "address" for word in found):
        raise ConfigError("give --address before the --")
    return name, found


def given_words(command: Any, given: Any) -> Iterator[Word]:
    """What was given on the command line, in the order in which the command declares it: arguments first."""
    for p in sorted(command.params, key=lambda p: p.param_type_name != "argument"):
        if given.get_parameter_source(p.name).name != "COMMANDLINE":
            continue
        value, is_argument = given.params[p.name], p.param_type_name == "argument"
        if isinstance(value, bool):
            yield Word(p.name, False, p.opts[0] if value else p.secondary_opts[0], None)
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            yield Word(p.name, is_argument, "" if is_argument else max(p.opts, key=len), str(one))


def seen_from_there(words: list[Word], shared: bool) -> list[Word]:
    """The words with local paths made absolute, if the nodes share them. Raises ConfigError if they do not."""
    from pipeline.config import ConfigError

    local = [word for word in words if word.is_local]
    if local and not shared:
        named = ", ".join(f"{word.option or word.name} {word.value}" for word in local)
        raise ConfigError(
            f"the cluster does not see paths of this machine ({named}): put them where every node can reach them, like s3://, "
            f"or say --shared-paths if every node has them at the same place"
        )
    return [replace(word, value=absolute(word.value)) if word.is_local and word.value else word for word in words]


def absolute(path: str) -> str:
    return path if path.startswith("file:") else str(Path(path).expanduser().absolute())


def entrypoint(python: str, name: str, words: list[Word], with_values: bool) -> str:
    """The shell command of the job. -P keeps Python from importing what lies in the head's working directory."""
    typed = [word for w in words for word in w.typed]
    return shlex.join([python, "-P", "-m", "jobs.environment" if with_values else "jobs.cli", name, *typed])


def chosen(names: list[str]) -> dict[str, str]:
    """Values of environment variables. Raises ConfigError with every name that cannot be passed on."""
    from pipeline.config import ConfigError

    problems = [f"--env takes the name alone, and the value from your environment: --env {n.partition('=')[0]}" for n in names if "=" in n]
    problems += [f"the environment variable {name} is not set" for name in names if "=" not in name and name not in os.environ]
    if problems:
        raise ConfigError(*problems)
    return {name: os.environ[name] for name in names}


# ---- the job ---------------------------------------------------------------------------------------------------------


def code(nothing: bool) -> list[str]:
    """Folders of the packages of this project, wherever they are installed: 36 MB, most of it the embedded domain's weights."""
    from importlib.util import find_spec

    found = [] if nothing else [find_spec(name) for name in CODE]
    return [str(Path(spec.origin).parent) for spec in found if spec and spec.origin]


def send(
    client: "JobSubmissionClient",
    name: str,
    job: str | None,
    entrypoint: str,
    folders: list[str],
    values: dict[str, str],
    cpus: float,
) -> str:
    """Uploads what the cluster does not have yet, and starts the job. Returns its id. Raises ConfigError if it did not start."""
    import secrets

    from jobs.environment import HOOK, save
    from pipeline.config import ConfigError

    job = job or f"{name}-{secrets.token_hex(4)}"
    with TemporaryDirectory() as temporary:
        runtime: dict[str, Any] = {"py_modules": list(folders), "excludes": NOT_SHIPPED}
        if values:
            runtime["py_modules"].append(str(save(values, Path(temporary))))
            runtime["worker_process_setup_hook"] = HOOK
        try:
            with c.told(client.get_address()):
                return client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job,
                    runtime_env=runtime if runtime["py_modules"] else {},
                    entrypoint_num_cpus=cpus or None,
                    entrypoint_resources=HEAD if cpus else None,
                )
        except ConfigError as error:
            if "already exists" in str(error):
                raise ConfigError(f"the cluster has a job {job} already; give another --submission-id") from None
            raise ConfigError(f"{error}; whether the job was taken says: diffusionclip jobs status {job}") from None
