"""What would be lost: with GPUs as without, a block reaches an actor whole, and so is written as one file."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset import pack, unpack

SCRIPT = """
import sys
from types import SimpleNamespace
import pyarrow as pa
import ray
from pipeline import dataset
from pipeline.config import Resources, Source
from pipeline.sources import find, plan_blocks

class Sizes:  # in place of the networks, which need a real GPU
    def __init__(self, *arguments):
        pass
    def __call__(self, table):
        sizes = [len(dataset.unpack(cell)) for cell in table["block"]]
        return pa.table({"rows": sizes, "errors": pa.array([[] for _ in sizes], pa.list_(pa.string()))})

dataset.Worker = Sizes
ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
found = find(Source(path=sys.argv[1]))
blocks = plan_blocks(found, 4)
run = SimpleNamespace(resources=Resources(workers=2, gpus=float(sys.argv[2]), cpus=0.5))
plan = SimpleNamespace(run=run, found=found, pending=())
receipts = list(dataset._receipts(plan, blocks))
print(sorted(n for r in receipts for n in r["rows"].to_pylist()) == sorted(b.rows for b in blocks), len(blocks))
"""


def test_a_packed_block_is_one_row_and_comes_back_as_it_was() -> None:
    table = pa.table({"id": ["a", None], "latent": pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2))}, metadata={"a": "b"})
    packed = pack(table)
    assert len(packed) == 1
    assert unpack(packed["block"][0]).equals(table, check_metadata=True)


@pytest.mark.parametrize("gpus", ["0", "0.5"])
def test_blocks_of_different_sizes_reach_the_actors_whole(gpus: str, tmp_path: Path) -> None:
    for i, rows in enumerate([10, 7, 3, 9]):
        ids = [f"{i}-{row}" for row in range(rows)]
        pq.write_table(pa.table({"id": ids, "image": [b"x"] * rows}), tmp_path / f"{i}.parquet", row_group_size=5)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), gpus], capture_output=True, text=True, timeout=200)
    assert done.stdout.split()[-2:] == ["True", "6"], done.stdout + done.stderr[-3000:]
