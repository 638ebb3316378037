"""Memory of the driver and of the node against the number of rows: the same inversion of more and of fewer rows, a process each.

The network is tiny and random and the pictures are small, so that many rows take minutes; what is measured is what a run keeps.

python -m benchmarks.memory_rows --out benchmarks/results/driver_memory.json
"""

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from jobs.evaluate import machine
from jobs.progress import console, display
from jobs.session import ray_session
from jobs.tables import count_table
from models.domains import Domain
from models.recipe import Recipe
from pipeline.config import Resources, Run, Source

MIB = 2**20
SIDE = 16
FILE_ROWS = 1000
BLOCK_ROWS = 50
KINDS = {"driver": "the driver", "worker": "all workers", "ray": "Ray's own processes", "node": "the whole node"}


# ---- a run -----------------------------------------------------------------------------------------------------------


def save_network(folder: Path) -> Path:
    """A diffusers folder with some thousand random weights."""
    UNet2DModel(
        sample_size=SIDE,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).save_pretrained(folder)
    DDPMScheduler(num_train_timesteps=1000).save_config(folder)
    return folder


def save_rows(folder: Path, rows: int) -> Path:
    """Parquet files of pictures of noise, which no codec makes smaller."""
    folder.mkdir()
    for start in range(0, rows, FILE_ROWS):
        count = min(FILE_ROWS, rows - start)
        pixels = np.random.default_rng(start).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
        table = pa.table({"id": [f"row-{start + i:09d}" for i in range(count)], "image": [png(p) for p in pixels]})
        pq.write_table(table, folder / f"{start:09d}.parquet", row_group_size=BLOCK_ROWS)
    return folder


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def request(folder: Path) -> Run:
    domain = Domain(name="tiny", image_size=SIDE, weights=str(folder / "network"), recipe=Recipe(steps_up=2, steps_down=2))
    return Run(
        source=Source(path=str(folder / "rows")),
        output=str(folder / "latents"),
        domain=domain,
        recipe=domain.recipe,
        resources=Resources(workers=2, batch=50, block_rows=BLOCK_ROWS),
        command="python -m benchmarks.memory_rows",
    )


def carry_out(folder: Path) -> None:
    """The run of a folder, in this process."""
    with ray_session():
        from pipeline.dataset import execute
        from pipeline.plan import make_plan

        execute(make_plan(request(folder)), lambda report: print(report.done, flush=True))


# ---- watching it -----------------------------------------------------------------------------------------------------


def sizes(driver: psutil.Process) -> dict[str, float]:
    """MiB held now: what each process has for itself, and what they share (Ray's object store) once."""
    own = dict.fromkeys(KINDS, 0.0)
    shared = 0.0
    for process in [driver, *driver.children(recursive=True)]:
        try:
            memory, words = process.memory_info(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        kind = "driver" if process == driver else "worker" if words.startswith("ray::") else "ray"
        own[kind] += (memory.rss - memory.shared) / MIB
        shared = max(shared, memory.shared / MIB)
    return {**own, "node": sum(own.values()) + shared}


def watched(folder: Path, rows: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Rows done and sizes, sampled while a process of its own carries out the run. Raises RuntimeError if it fails."""
    log = (folder / "log").open("w+")
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.memory_rows", "--run", str(folder)], stdout=log, stderr=subprocess.STDOUT)
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        told = (folder / "log").read_text().split()
        done = int(told[-1]) if told and told[-1].isdigit() else 0
        yield done, sizes(driver)
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError((folder / "log").read_text()[-3000:])
    yield rows, dict.fromkeys(KINDS, 0.0)


def run_of(rows: int) -> dict[str, Any]:
    """The greatest sizes in MiB over a run of so many rows, and what the driver held when a tenth of them and when the last were done:
    before that come its imports, afterwards the audit."""
    greatest, under_way = dict.fromkeys(KINDS, 0.0), []
    with tempfile.TemporaryDirectory() as temporary, display(f"{rows} rows", rows) as shown:
        folder = Path(temporary)
        save_network(folder / "network")
        save_rows(folder / "rows", rows)
        for done, now in watched(folder, rows):
            greatest = {kind: max(value, now[kind]) for kind, value in greatest.items()}
            if rows / 10 <= done < rows:
                under_way.append(round(now["driver"], 1))
            shown.update(done, f"driver {now['driver']:.0f} MiB, node {now['node']:.0f} MiB")
    mib = {kind: round(value, 1) for kind, value in greatest.items()}
    return {"rows": rows, "blocks": rows // BLOCK_ROWS, "mib": mib, "driver_from_a_tenth_to_the_last": [under_way[0], under_way[-1]]}


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Numbers of rows to compare.")] = None,
    out: Annotated[Path | None, typer.Option()] = None,
    run: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Prints the greatest memory of both runs and how much more the longer one took."""
    if run:
        carry_out(run)
        return
    counts = sorted(rows or [1000, 4000, 16000])
    results = [run_of(count) for count in counts]
    few, many = results[0]["mib"], results[-1]["mib"]
    ratios: dict[str, Any] = {kind: round(many[kind] / few[kind], 3) for kind in KINDS}
    lines = [(words, f"{few[kind]:.0f} -> {many[kind]:.0f} MiB, {ratios[kind]:.2f}x") for kind, words in KINDS.items()]
    first, last = results[-1]["driver_from_a_tenth_to_the_last"]
    lines.append((f"the driver over the last nine tenths of {counts[-1]} rows", f"{first:.1f} -> {last:.1f} MiB"))
    console.print(count_table(f"peak memory, {counts[0]} and {counts[-1]} rows", lines))
    if out:
        out.write_text(json.dumps({"machine": machine(), "runs": results, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
