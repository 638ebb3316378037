"""What would be lost: with GPUs as without, a block reaches an actor whole, and so is written as one file."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = """
import sys
from types import SimpleNamespace
import pyarrow as pa
import ray
from pipeline import dataset, worker
from pipeline.config import Resources, Source
from pipeline.sources import find, plan_blocks

class Sizes:  # in place of the networks, which need a real GPU
    def __init__(self, *arguments):
        pass
    def __call__(self, table):
        blocks = [worker.unpack(cell) for cell in table["block"]]
        return pa.concat_tables([worker.receipt(start=block["__row__"][0].as_py(), rows=len(block), errors=[]) for block in blocks])

dataset.Worker = Sizes
cpus = 4 if float(sys.argv[2]) else 1  # the two actors leave none: reading must be done in them
ray.init("local", num_cpus=cpus, num_gpus=1, include_dashboard=False, log_to_driver=False)
found = find(Source(path=sys.argv[1]))
blocks = plan_blocks(found, 4)
run = SimpleNamespace(resources=Resources(workers=2, gpus=float(sys.argv[2]), cpus=0.5))
plan = SimpleNamespace(run=run, found=found, pending=())
receipts = list(dataset._receipts(plan, blocks))
print(sorted(n for r in receipts for n in r["rows"].to_pylist()) == sorted(b.rows for b in blocks), len(blocks))
"""


@pytest.mark.parametrize("gpus", ["0", "0.5"])
def test_blocks_of_different_sizes_reach_the_actors_whole(gpus: str, tmp_path: Path) -> None:
    for i, rows in enumerate([10, 7, 3, 9]):
        ids = [f"{i}-{row}" for row in range(rows)]
        pq.write_table(pa.table({"id": ids, "image": [b"x"] * rows}), tmp_path / f"{i}.parquet", row_group_size=5)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), gpus], capture_output=True, text=True, timeout=200)
    assert done.stdout.split()[-2:] == ["True", "6"], done.stdout + done.stderr[-3000:]
