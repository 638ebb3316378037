"""``--storage-option``: how buckets are reached, for this run and its workers. It sets the environment variables that the clients read.

Only what may be seen by others is taken: a command line is shown to whoever may list processes, jobs or manifests.
"""

import os
from urllib.parse import urlsplit

VARIABLES = {
    "endpoint_url": "AWS_ENDPOINT_URL_S3",
    "region": "AWS_DEFAULT_REGION",
    "profile": "AWS_PROFILE",
    "anon": "FSSPEC_S3_ANON",
    "requester_pays": "FSSPEC_S3_REQUESTER_PAYS",
}
_TRUTHS = ("anon", "requester_pays")
_SECRETS = ("key", "secret", "token", "password", "credential", "sas")

carried: dict[str, str] = {}
"""The variables that were asked for on the command line; workers of a cluster get them too."""


def parse(options: list[str]) -> dict[str, str]:
    """Environment variables for options like ``region=eu-west-1``. Raises ConfigError, which repeats no value that may be secret."""
    from pipeline.config import ConfigError

    problems: list[str] = []
    variables: dict[str, str] = {}
    for option in options:
        name, _, value = (part.strip() for part in option.partition("="))
        if problem := _problem(name, value):
            problems.append(problem)
        else:
            variables[VARIABLES[name]] = value.lower() if name in _TRUTHS else value
    if problems:
        raise ConfigError(*problems)
    return variables


def _problem(name: str, value: str) -> str | None:
    from pipeline.config import unknown

    if name not in VARIABLES:
        if any(word in name.lower() for word in _SECRETS):
            return (
                "secrets are not taken from the command line, where others can see them; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_PROFILE"
            )
        return unknown("storage option", name[:40], sorted(VARIABLES)) + "; others are set in the environment, as FSSPEC_S3_NAME"
    if not value:
        return f"--storage-option {name} needs a value, like {name}={'true' if name in _TRUTHS else '...'}"
    if name in _TRUTHS and value.lower() not in ("true", "false"):
        return f"--storage-option {name} must be true or false"
    if name == "endpoint_url":
        address = urlsplit(value)
        if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
            return "--storage-option endpoint_url must be http://HOST or https://HOST, with a port if need be and without a password"
    return None


def use(options: list[str] | None) -> list[str] | None:
    """Called by typer with the options of a command, before it runs."""
    if options:
        from fsspec import config

        carried.update(parse(options))
        os.environ.update(carried)
        config.set_conf_env(config.conf, carried)  # which fsspec reads from the environment only once
    return options
