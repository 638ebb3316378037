"""What would be lost: rows and right messages when nodes of a cluster go, lack weights, or find damaged files. Minutes each."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import faulty
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import TinyDomain
from ray.cluster_utils import Cluster
from test_end_to_end import PIXELFACE, TINY, run
from tiny import picture

from pipeline import dataset, schema
from pipeline.config import Resources, Run, Source
from pipeline.faults import JobError
from pipeline.isolation import Attempts
from pipeline.plan import make_plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with faulty.cluster(1) as cluster:
        yield cluster


@pytest.fixture
def job(tiny_domain: TinyDomain, tmp_path: Path) -> Run:
    """40 pictures in a Parquet file of one picture a row group, two a block."""
    rows = []
    for i in range(40):
        picture(i).save(tmp_path / "one.png")
        rows.append({"id": str(i), "image": {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}})
    pq.write_table(
        pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("image", schema.IMAGE)])), tmp_path / "in.parquet", row_group_size=1
    )
    domain = tiny_domain()
    resources = Resources(workers=4, cpus=4, batch=2, block_rows=2)  # two actors a node
    source = Source(path=str(tmp_path / "in.parquet"))
    return Run(source=source, output=str(tmp_path / "out"), domain=domain, recipe=domain.recipe, resources=resources)


def kill_node(cluster: Cluster) -> None:
    """The youngest node but the head, and another in its place."""
    node = max(cluster.worker_nodes, key=lambda node: psutil.Process(node.all_processes["raylet"][0].process.pid).create_time())
    psutil.Process(node.all_processes["raylet"][0].process.pid).kill()
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=8, object_store_memory=100_000_000)


def test_a_node_that_goes_while_it_is_busy_costs_no_row(nodes: Cluster, job: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = replace(job, output=f"{job.output}-calm")
    monkeypatch.setattr(dataset, "Worker", faulty.Light)
    dataset.execute(make_plan(calm))  # before: once, actors of a run with a lost node kept their CPUs
    monkeypatch.setattr(dataset, "Worker", faulty.Slow)
    killed = []

    def at_the_first_rows(report: dataset.Report) -> None:
        if report.done and not killed:
            killed.append(report.done)
            kill_node(nodes)

    report = dataset.execute(make_plan(job), at_the_first_rows)
    assert killed
    assert killed[0] < 40
    assert (report.done, report.rejected) == (40, 0)
    assert faulty.rows_of(job.output) == faulty.rows_of(calm.output)


class Victim:
    """In place of an isolated worker: its node goes the first time it is asked for anything."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def tried(self, marker: Path) -> str:
        with suppress(FileExistsError):
            marker.touch(exist_ok=False)
            psutil.Process().parent().kill()
            signal.pause()
        return "alive"


def test_rows_are_not_blamed_for_a_lost_node(nodes: Cluster, job: Run, tmp_path: Path) -> None:
    head = ray.get_runtime_context().get_node_id()
    elsewhere = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != head)
    attempts = Attempts(job.resources)
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(elsewhere, soft=True)
    attempts.start = ray.remote(Victim).options(max_restarts=0, scheduling_strategy=strategy).remote
    try:
        assert attempts("tried", tmp_path / "killed") == (True, "alive")
    finally:
        attempts.end()
        nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
        nodes.add_node(num_cpus=8, object_store_memory=100_000_000)
    assert (attempts.deaths, (tmp_path / "killed").exists()) == (0, True)


def test_weights_that_a_node_lacks_end_the_job_and_are_named(nodes: Cluster, job: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "Worker", faulty.NoWeights)
    with pytest.raises(JobError, match=f"there is no {job.domain.weights} on node .*; every node must have the file"):
        dataset.execute(make_plan(job))
    monkeypatch.setattr(dataset, "Worker", faulty.Light)
    assert dataset.execute(make_plan(job)).done == 40


def test_a_file_that_is_damaged_after_the_plan_is_named_and_the_job_goes_on_when_it_is_mended(
    nodes: Cluster, job: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "Worker", faulty.Light)
    plan, file = make_plan(job), Path(job.source.path)
    whole, stamp = file.read_bytes(), file.stat().st_mtime_ns
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(JobError, match=r"in\.parquet cannot be read .*; see that the file is whole"):
        dataset.execute(plan)
    file.write_bytes(whole)
    os.utime(file, ns=(stamp, stamp))
    assert dataset.execute(make_plan(job)).done == 40


@pytest.mark.timeout(900)
def test_a_driver_killed_at_ten_random_moments_loses_nothing(tmp_path: Path) -> None:
    table = pq.read_table(PIXELFACE.held_out).slice(0, 48)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=4)
    words = ["invert", str(tmp_path / "in.parquet"), "OUT", *TINY, "--block-rows", "4", "--workers", "1"]
    dice, cut = random.Random(0), tmp_path / "cut"

    def command(out: str) -> list[str]:
        return [str(tmp_path / out) if word == "OUT" else word for word in words]

    def parts() -> int:
        return len(list(cut.glob("part-*")))

    def killed(wait_for: Callable[[], bool], then: float) -> None:
        """``then`` seconds after something is there to see, wherever the process is in what it does next."""
        with subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *command("cut")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            while process.poll() is None and not wait_for():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.02)
            with suppress(subprocess.TimeoutExpired):
                process.wait(then)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    for _ in range(3):  # before and while Ray starts
        killed(lambda: True, dice.uniform(0, 15))
    for _ in range(7):  # while blocks are written
        wanted = min(parts() + 1, 12)
        killed(lambda wanted=wanted: parts() >= wanted, dice.uniform(0, 1))  # type: ignore[misc]
    run(*command("cut"))
    run(*command("whole"))
    latents = [pq.read_table(tmp_path / out).sort_by("id").to_pylist() for out in ("cut", "whole")]
    assert latents[0] == latents[1]
    assert len(latents[0]) == 48
