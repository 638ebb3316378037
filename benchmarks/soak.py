"""An edit run on a cluster of several nodes, again and again, each time with something killed at a random moment.

Every output is compared with that of a run that nothing happened to. The nodes are processes of this machine, which Ray takes for
machines; what is killed is killed with SIGKILL. Of the pictures, 5% are corrupt in every run.

python -m benchmarks.soak --minutes 10 --out benchmarks/results/soak.json
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich import box
from rich.table import Table

from jobs.evaluate import machine
from jobs.progress import console

ROOT = Path(__file__).parent.parent
HELD_OUT = ROOT / "models/pixelface/held_out.parquet"
POISON = b"poison"
MOST_RUNS = 5
"""Of one trial: after a kill the same command is given again."""
OBJECT_STORE = 100_000_000


@dataclass(kw_only=True)
class Trial:
    fault: str
    hit: bool = True
    """Whether there was still something to kill."""
    runs: int = 0
    """The command was given so often until it ended with 0."""
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    """Rows with other pixels, or with another reason for their reject, than in the calm run."""
    status_right: bool = True
    seconds: float = 0.0


# ---- the job, in a process of its own --------------------------------------------------------------------------------


def drive(kind: str) -> None:
    """The command line with workers that have a fault of their own; the rest of the arguments are the command's."""
    from jobs import cli
    from pipeline import codec, dataset
    from pipeline.worker import Worker

    folder = Path(os.environ["SOAK_FOLDER"])

    class Faulty(Worker):
        def __init__(self, *arguments: Any):
            if kind == "constructor" and not all(_exists(folder / f"constructor.{i}") for i in range(2)):
                raise RuntimeError("not yet")
            super().__init__(*arguments)
            decode = codec.decode

            def fatal(data: bytes | None, *more: Any) -> Any:
                if kind == "poison" and data is not None and data.endswith(POISON):
                    os.kill(os.getpid(), signal.SIGSEGV)
                return decode(data, *more)

            codec.decode = fatal  # type: ignore[assignment]

    dataset.Worker = Faulty  # type: ignore[misc]
    cli.main()


def _exists(file: Path) -> bool:
    """Whether it did; afterwards it does."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def start(kind: str, source: Path, out: Path, address: str) -> subprocess.Popen[str]:
    words = ["edit", str(source), str(out), "-a", "glasses", "--score-clip", "none", "--return-step", "200", "--steps-up", "3"]
    words += ["--steps-down", "3", "--block-rows", "4", "--batch", "4", "--workers", "2", "--cpus", "0.5", "--address", address]
    code = f"from benchmarks.soak import drive; drive({kind!r})"
    environment = {**os.environ, "SOAK_FOLDER": str(out.parent)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


# ---- the cluster and what is killed of it ----------------------------------------------------------------------------


@contextmanager
def local_cluster() -> Iterator[Any]:
    """A head that runs no work and two nodes."""
    os.environ.update(PYTHONPATH=str(ROOT), RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal")
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": OBJECT_STORE, "include_dashboard": False})
    Path(get_ray_address_file(None)).unlink(missing_ok=True)  # or every Ray that starts on this machine would join it
    try:
        for _ in range(2):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> None:
    cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE, wait=False)


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def kill_driver(process: subprocess.Popen[str], cluster: Any, dice: random.Random) -> bool:
    process.kill()
    return True


def kill_worker(process: subprocess.Popen[str], cluster: Any, dice: random.Random) -> bool:
    """One of the actors that compute, if there is one yet."""
    children = [child for node in cluster.worker_nodes for child in raylet(node).children(recursive=True)]
    with suppress(psutil.NoSuchProcess, IndexError):
        dice.choice([child for child in children if "MapWorker" in " ".join(child.cmdline())]).kill()
        return True
    return False


def kill_node(process: subprocess.Popen[str], cluster: Any, dice: random.Random) -> bool:
    """A raylet; its workers end with it. Another node comes at once."""
    node = dice.choice(list(cluster.worker_nodes))
    raylet(node).kill()
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)
    return True


def kill_nothing(process: subprocess.Popen[str], cluster: Any, dice: random.Random) -> bool:
    return True


Kill = Callable[[subprocess.Popen[str], Any, random.Random], bool]
FAULTS: dict[str, tuple[str, Kill]] = {
    "driver killed": ("", kill_driver),
    "worker killed": ("", kill_worker),
    "node killed": ("", kill_node),
    "constructor fails twice": ("constructor", kill_nothing),
    "poisoned row": ("poison", kill_nothing),
}
"""What the workers do, and what is killed."""


# ---- trials ----------------------------------------------------------------------------------------------------------


def attempt(fault: str, source: Path, out: Path, cluster: Any, calm_seconds: float, dice: random.Random) -> Trial:
    """One run with a fault at a random moment, and then the same command until it is done."""
    kind, kill = FAULTS[fault]
    out.parent.mkdir(parents=True)
    trial, began, status = Trial(fault=fault), time.monotonic(), None
    while status != 0 and trial.runs < MOST_RUNS:
        process = start(kind, source, out, cluster.address)
        if trial.runs == 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0, calm_seconds))
            while (running := process.poll() is None) and not kill(process, cluster, dice):
                time.sleep(0.2)
            trial.hit = running
        message = process.communicate()[1]
        status, trial.runs = process.returncode, trial.runs + 1
        killed = fault == "driver killed" and trial.runs == 1 and status == -signal.SIGKILL
        if status != 0 and not killed:
            trial.status_right = False
            console.print(f"  {fault}: exit status {status}: {message.strip()[-300:]}", markup=False)
    trial.status_right &= status == 0
    trial.seconds = round(time.monotonic() - began, 1)
    return trial


def rows(out: Path) -> list[tuple[str, bytes | None, str | None]]:
    table = pq.read_table(out / "glasses", columns=["id", "edited", "error"])
    return [(row["id"], row["edited"] and row["edited"]["bytes"], row["error"]) for row in table.to_pylist()]


def compare(trial: Trial, calm: list[tuple[str, bytes | None, str | None]], found: list[tuple[str, bytes | None, str | None]]) -> None:
    """The poisoned row, which the calm run could read, must be the only one that differs."""
    from pipeline.isolation import REASON

    numbers, by_id = Counter(row[0] for row in found), {row[0]: row for row in found}
    trial.lost = sum(numbers[row[0]] == 0 for row in calm)
    trial.doubled = sum(count - 1 for count in numbers.values())
    for row in calm:
        expected = (row[0], None, REASON) if trial.fault == "poisoned row" and row[0] == "poisoned" else row
        trial.wrong += by_id.get(row[0], expected) != expected


def pictures(file: Path, count: int) -> None:
    """Held-out pictures in row groups of 4; every twentieth is corrupt, and one ends in ``POISON``, which decoders do not mind."""
    table = pq.read_table(HELD_OUT, columns=["id", "image"]).slice(0, count)
    records = table.to_pylist()
    for row in records[7::20]:
        row["image"]["bytes"] = row["image"]["bytes"][:60]
    guilty = records[count // 2]
    guilty["id"], guilty["image"]["bytes"] = "poisoned", guilty["image"]["bytes"] + POISON
    pq.write_table(pa.Table.from_pylist(records, table.schema), file, row_group_size=4)


def soak(folder: Path, minutes: float, count: int, seed: int) -> dict[str, Any]:
    source, dice, trials = folder / "pictures.parquet", random.Random(seed), []
    pictures(source, count)
    with local_cluster() as cluster:
        (folder / "calm").mkdir()
        began = time.monotonic()
        _, message = (first := start("", source, folder / "calm/out", cluster.address)).communicate()
        if first.returncode:
            raise SystemExit(f"the calm run failed: {message[-2000:]}")
        calm_seconds, calm = time.monotonic() - began, rows(folder / "calm/out")
        console.print(f"calm run: {count} rows in {calm_seconds:.0f} s")
        while time.monotonic() - began < 60 * minutes:
            fault = list(FAULTS)[len(trials) % len(FAULTS)]
            out = folder / f"trial-{len(trials)}" / "out"
            trial = attempt(fault, source, out, cluster, calm_seconds, dice)
            if trial.status_right or (out / "glasses").exists():
                compare(trial, calm, rows(out))
            trials.append(trial)
            console.print(
                f"{fault}: {trial.seconds:.0f} s, {trial.runs} runs, lost {trial.lost}, doubled {trial.doubled}, wrong {trial.wrong}"
            )
    return {"rows": count, "seed": seed, "minutes": minutes, "calm_seconds": round(calm_seconds, 1), "trials": [asdict(t) for t in trials]}


def summary(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a fault."""
    lines = []
    for fault in FAULTS:
        of_it = [trial for trial in trials if trial["fault"] == fault and trial["hit"]]
        sums = {name: sum(trial[name] for trial in of_it) for name in ("lost", "doubled", "wrong", "status_right")}
        lines.append({"fault": fault, "trials": len(of_it), **sums})
    return lines


def main(
    minutes: float = 10.0,
    rows: Annotated[int, typer.Option(help="Of the input.")] = 60,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Prints a table; fails if anything was lost, doubled or wrong, or an exit status was."""
    with tempfile.TemporaryDirectory(prefix="soak", ignore_cleanup_errors=True) as folder:
        result = soak(Path(folder), minutes, rows, seed)
    lines = summary(result["trials"])
    table = Table("fault", "trials", "rows lost", "doubled", "wrong pixels", "right status", box=box.SIMPLE, pad_edge=False)
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    console.print(table)
    if out:
        out.write_text(json.dumps({"machine": machine(), "faults": lines, **result}, indent=2) + "\n")
    bad = [line for line in lines if line["lost"] or line["doubled"] or line["wrong"] or line["status_right"] < line["trials"]]
    if bad:
        raise SystemExit(f"not as it should be: {', '.join(line['fault'] for line in bad)}")


if __name__ == "__main__":
    typer.run(main)
