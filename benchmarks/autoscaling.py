"""Workers come and go around a job: 0 -> 2 -> 0 nodes of a cluster whose machines are processes of this one.

Ray's own autoscaler decides, its fake provider starts nodes with one GPU each that is only claimed; the job is an ordinary
``edit`` run on the embedded domain, whose actors reserve half of such a GPU and compute on the CPU.

python -m benchmarks.autoscaling --out benchmarks/results/autoscaling.json --picture docs/autoscaling.png
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from PIL import Image, ImageDraw

from jobs.evaluate import machine
from jobs.progress import console, display
from jobs.requests import domain_named, make_edits
from jobs.session import ray_session
from pipeline.config import Resources, Run, Source

LIMIT = 230
"""Seconds after which everything is given up."""
IDLE_MINUTES = 0.15
OBJECT_STORE = 100_000_000
HELD_OUT = Path("models/pixelface/held_out.parquet")


@dataclass(frozen=True, kw_only=True)
class ClaimedGpus(Resources):
    """GPUs are reserved, but the arithmetic is the CPU's: there are none."""

    @property
    def device(self) -> str:
        return "cpu"


@dataclass(kw_only=True)
class Trace:
    """Number of worker nodes and of rows done over time: a sample whenever one changed."""

    began: float = field(default_factory=time.monotonic)
    samples: list[dict[str, float]] = field(default_factory=list)
    rows: int = 0

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    @property
    def workers(self) -> int:
        return int(self.samples[-1]["workers"])

    def note(self, workers: int) -> None:
        """A sample, if anything changed since the last."""
        last = self.samples[-1] if self.samples else {}
        if (last.get("workers"), last.get("rows")) != (workers, self.rows):
            self.samples.append({"seconds": round(self.now, 1), "workers": workers, "rows": self.rows})


@contextmanager
def watched(trace: Trace) -> Iterator[None]:
    """Asks Ray twice a second how many workers there are."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.5):
            trace.note(alive_workers())

    trace.note(alive_workers())
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def alive_workers() -> int:
    """Nodes with a GPU, which are all but the head."""
    import ray

    return sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())


def launcher_config(port: int, most: int) -> dict[str, Any]:
    """What ``ray start --autoscaling-config`` reads: the head of cluster.yaml and its GPU workers, in small."""
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files")
    return {
        "cluster_name": "fake",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0, "GPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
            "gpu": {
                "resources": {"CPU": 2, "GPU": 1, "object_store_memory": OBJECT_STORE},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "rsync_exclude": [],
        "rsync_filter": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        **{name: [] for name in lists},
    }


@contextmanager
def fake_cluster(folder: Path, most: int) -> Iterator[str]:
    """A head with an autoscaler, on loopback and behind a token of its own; all its processes, and only these, are ended."""
    port = free_port()
    config = folder / "cluster.json"
    config.write_text(json.dumps(launcher_config(port, most)))
    settings = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_worker_niceness": "0"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=0", "--num-gpus=0", f"--object-store-memory={OBJECT_STORE}"]
    command += ["--include-dashboard=false", f"--autoscaling-config={config}", f"--temp-dir={folder}/ray", "--disable-usage-stats"]
    with (folder / "head.log").open("w") as log:
        head = psutil.Popen(command, env=settings, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_port(port, head)
        yield f"127.0.0.1:{port}"
    finally:
        end(head)


def end(head: psutil.Popen) -> None:
    """Ends a head, which ends its own processes, and then what is left of its descendants, each by its own number."""
    family = head.children(recursive=True)
    head.terminate()
    for process in psutil.wait_procs([head, *family], timeout=15)[1]:
        with suppress(psutil.NoSuchProcess):  # gone in the meantime
            process.kill()
    head.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for_port(port: int, head: psutil.Popen) -> None:
    """Until something listens there. Raises RuntimeError if the head ended or took a minute."""
    for _ in range(120):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if head.poll() is not None:
                break
            time.sleep(0.5)
    raise RuntimeError("the head did not start; its log is head.log in the temporary folder")


def job(folder: Path, rows: int, most: int) -> Run:
    """Two actors share each claimed GPU."""
    domain = domain_named("pixelface")
    return Run(
        source=Source(path=str(HELD_OUT.absolute()), limit=rows),
        output=str(folder / "edits"),
        domain=domain,
        recipe=domain.recipe,
        edits=make_edits(domain, ["glasses"], [], [1.0], []),
        score_clip="none",
        resources=ClaimedGpus(workers=2 * most, gpus=0.5, cpus=0.5, block_rows=16),
        command="python -m benchmarks.autoscaling",
    )


def go(folder: Path, rows: int, most: int) -> dict[str, Any]:
    """One run on a cluster of its own. Returns the trace and what became of the rows."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # Ray reads them when it is imported
    with fake_cluster(folder, most) as address, ray_session(address):
        from pipeline.dataset import execute
        from pipeline.plan import make_plan

        trace = Trace()
        with watched(trace):
            plan = make_plan(job(folder, rows, most))
            with display("edit", plan.found.rows) as shown:

                def seen(report: Any) -> None:
                    trace.rows = report.done
                    shown.update(report.done, f"{trace.workers} worker nodes")

                started = trace.now
                report = execute(plan, seen)
                ended = trace.now
            while trace.workers:
                time.sleep(0.5)
    return {
        "rows": report.rows,
        "rejected": report.rejected,
        "job": {"started": round(started, 1), "ended": round(ended, 1)},
        "workers_gone": trace.samples[-1]["seconds"],
        "idle_timeout_seconds": IDLE_MINUTES * 60,
        "trace": trace.samples,
    }


def course(trace: list[dict[str, float]]) -> list[tuple[float, int]]:
    """When the number of workers changed, and to what."""
    changes: list[tuple[float, int]] = []
    for sample in trace:
        if not changes or changes[-1][1] != sample["workers"]:
            changes.append((sample["seconds"], int(sample["workers"])))
    return changes


def draw(result: dict[str, Any], nodes: int) -> Image.Image:
    """Worker nodes and rows done over time, the job's time shaded."""
    width, height, left, top, bottom = 900, 260, 60, 30, 40
    span = result["workers_gone"] * 1.05
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    base = height - bottom

    def x(seconds: float) -> float:
        return left + (width - left - 80) * seconds / span

    def y(share: float) -> float:
        return base - (base - top) * share

    pen.rectangle([x(result["job"]["started"]), top, x(result["job"]["ended"]), base], fill="#eef3fa")
    for count in range(nodes + 1):
        pen.line([x(0), y(count / nodes), x(span), y(count / nodes)], fill="#dddddd")
        pen.text((left - 20, y(count / nodes) - 6), str(count), fill="#1f5fa8", font_size=13)
    for name, most, colour, thickness in (("rows", result["rows"], "#c8781e", 2), ("workers", nodes, "#1f5fa8", 3)):
        corners = [(x(0), y(0))]
        for sample in [*result["trace"], {**result["trace"][-1], "seconds": span}]:
            corners += [(x(sample["seconds"]), corners[-1][1]), (x(sample["seconds"]), y(sample[name] / most))]
        pen.line(corners, fill=colour, width=thickness)
    for seconds in range(0, int(span) + 1, 10):
        pen.line([x(seconds), base, x(seconds), base + 4], fill="#555555")
        pen.text((x(seconds) - 8, base + 6), f"{seconds}", fill="#555555", font_size=12)
    pen.text((x(span) - 60, base + 20), "seconds", fill="#555555", font_size=12)
    pen.text((left, 6), "worker nodes", fill="#1f5fa8", font_size=14)
    pen.text((left + 120, 6), f"rows done, of {result['rows']}", fill="#c8781e", font_size=14)
    pen.text((left + 290, 6), "shaded: the job runs", fill="#7d93ad", font_size=14)
    return picture


def too_long(*_: object) -> None:
    raise TimeoutError(f"after {LIMIT} seconds it is given up")


def main(
    rows: int = 192,
    nodes: int = 2,
    out: Annotated[Path | None, typer.Option()] = None,
    picture: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Prints when nodes came and went, and fails if they did not go 0 -> ``nodes`` -> 0."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    with tempfile.TemporaryDirectory(prefix="scale", ignore_cleanup_errors=True) as folder:
        result = go(Path(folder), rows, nodes)
    for seconds, workers in course(result["trace"]):
        console.print(f"{seconds:6.1f} s  {workers} worker nodes")
    console.print(f"{result['rows']} rows, {result['rejected']} rejected, in {result['job']['ended'] - result['job']['started']:.1f} s")
    numbers = [workers for _, workers in course(result["trace"])]
    if numbers[0] != 0 or numbers[-1] != 0 or max(numbers) != nodes:
        raise SystemExit(f"the workers did not go 0 -> {nodes} -> 0 but {' -> '.join(map(str, numbers))}")
    if out:
        out.write_text(json.dumps({"machine": machine(), "nodes": nodes, **result}, indent=2) + "\n")
    if picture:
        draw(result, nodes).save(picture, optimize=True)


if __name__ == "__main__":
    typer.run(main)
