"""Connecting to Ray, quietly."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jobs import storage


@contextmanager
def ray_session(address: str | None = None, verbose: bool = False) -> Iterator[None]:
    """A connection to a running cluster (``address`` or RAY_ADDRESS), or a Ray of one's own on this machine.

    A local Ray counts two CPUs more than there are, because readers and bookkeeping do next to nothing beside actors that
    hold a CPU each.
    """
    if not verbose:
        _hush()
    import ray
    from ray.data import DataContext

    level = logging.INFO if verbose else logging.ERROR
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        environment = {"env_vars": dict(storage.carried)} if storage.carried else None
        ray.init(address=address, logging_level=level, log_to_driver=verbose, runtime_env=environment)
    else:
        cpus = (os.cpu_count() or 1) + 2
        with _silent(not verbose), _on_loopback():
            # "local": without it, Ray connects to any other Ray that somebody started on this machine.
            ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level=level, log_to_driver=verbose)
    DataContext.get_current().enable_progress_bars = verbose
    if not verbose:
        for name in ("ray.data", "ray.train", "ray"):  # what they log as an error is raised as well, and told once
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


def refuse_too_much(address: str | None, gpus: float, cpus: float, workers: int = 1, reading: float = 0.0) -> None:
    """Raises ConfigError if a Ray of this machine has fewer GPUs or CPUs than ``workers`` at the same time need, and ``reading`` beside
    them: they would be waited for without end. A cluster may grow, so there it is only said."""
    import ray

    from jobs.progress import console
    from pipeline.config import ConfigError

    there = ray.cluster_resources()
    needs = (("GPU", workers * gpus), ("CPU", workers * cpus + reading))
    lacking = [f"{need:g} {kind}s, and there are {there.get(kind, 0):g}" for kind, need in needs if need > there.get(kind, 0)]
    if not lacking:
        return
    if is_cluster(address):
        console.print(f"note: waiting for the cluster to grow; needed are {'; '.join(lacking)}", markup=False)
    else:
        raise ConfigError(*(f"needed are {what} on this machine (CPUs: two more than cores); ask for less" for what in lacking))


def side_by_side(address: str | None, wanted: int, cpus: float, reading: float) -> int:
    """How many of ``wanted`` jobs of so many CPUs fit on this machine, with room for reading: at least 1. A cluster may grow."""
    import ray

    room = ray.cluster_resources().get("CPU", 0) - reading
    return wanted if is_cluster(address) or not cpus else max(1, min(wanted, int(room / cpus)))


def is_cluster(address: str | None) -> bool:
    """Whether Ray is one that somebody else started."""
    return bool(address or os.environ.get("RAY_ADDRESS"))


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started meanwhile listens on 127.0.0.1 alone, with all its processes, also those that it starts later.

    Ray's own switch for it is meant for desktops, whose firewalls ask about every program that listens, and works on Linux too. Each
    process reads it when it imports Ray, which this one may have done; afterwards it is as before, since with it no cluster can be joined.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    asked, allowed = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = allowed
        if asked is None:
            del os.environ[name]
        else:
            os.environ[name] = asked


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Nothing on standard error, not even from C++: Ray announces there that it will say little. Exceptions still come through."""
    if not wanted:
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _hush() -> None:
    """Ray reads these at import or start; they only concern what it prints and reports home."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # or a local Ray starves beside any other busy program
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


def command_line() -> str:
    """The command that is running, as a person would type it, but without passwords and signatures in addresses."""
    from models.references import public

    program = "diffusionclip" if sys.argv[0].endswith(("diffusionclip", "cli.py", "-c")) else sys.argv[0]
    return " ".join([program, *(f"'{a}'" if " " in a or "*" in a else a for a in map(public, sys.argv[1:]))])
