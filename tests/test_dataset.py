"""What would be lost: with GPUs as without, a block reaches an actor whole, and so is written as one file."""

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.codec import latents_to_arrow
from pipeline.config import Source
from pipeline.dataset import AuditError, audit
from pipeline.ids import check_ids
from pipeline.sources import find, plan_blocks, read_block
from pipeline.worker import pack, unpack, write_file

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
plan = SimpleNamespace(run=run, found=found, writing=())
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


POOL = """
import os, sys, threading
from pathlib import Path
from types import SimpleNamespace
import ray
from pipeline import dataset, worker
from pipeline.config import Resources, Source
from pipeline.sources import find, plan_blocks

def until(seen):
    for _ in range(600):
        if seen():
            return
        threading.Event().wait(0.1)
    raise TimeoutError("it was not seen within a minute")

class Waiting:
    def __init__(self, *arguments):
        Path(FOLDER, f"actor-{os.getpid()}").touch()
    def __call__(self, table):
        block = worker.unpack(table["block"][0])
        until(lambda: len(list(Path(FOLDER).glob("actor-*"))) == 3)
        if block["id"][0].as_py() == "0":  # the first, so that it is under way when all others are done
            until(lambda: ray.available_resources().get("CPU", 0) == 3)
        return worker.receipt(start=block["__row__"][0].as_py(), rows=len(block), errors=[])

FOLDER = sys.argv[2]
dataset.Worker = Waiting
ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
found = find(Source(path=sys.argv[1]))
run = SimpleNamespace(resources=Resources(workers=int(sys.argv[3]), cpus=1))
plan = SimpleNamespace(run=run, found=found, writing=())
print(sum(sum(r["rows"].to_pylist()) for r in dataset._receipts(plan, plan_blocks(found, 1))))
"""


@pytest.mark.parametrize(("rows", "workers"), [(9, 3), pytest.param(3, 4, marks=pytest.mark.slow)])
def test_a_pool_has_as_many_actors_as_are_queued_blocks_and_gives_back_those_that_have_nothing_left_to_do(
    rows: int, workers: int, tmp_path: Path
) -> None:
    """Three actors start; while one still works on its block the others' CPUs are free again."""
    pq.write_table(pa.table({"id": [str(i) for i in range(rows)], "image": [b"x"] * rows}), tmp_path / "x.parquet", row_group_size=1)
    actors = tmp_path / "actors"
    actors.mkdir()
    command = [sys.executable, "-c", POOL, str(tmp_path / "x.parquet"), str(actors), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.stdout.split()[-1:] == [str(rows)], done.stdout + done.stderr[-3000:]
    assert len(list(actors.iterdir())) == 3


def user_columns() -> dict[str, pa.Array]:
    """Three rows of every kind of column that Parquet holds, nulls among them."""
    return {
        "boxes": pa.array([[{"left": 1, "name": "a"}, None], None, []], pa.list_(pa.struct([("left", pa.int32()), ("name", pa.string())]))),
        "category": pa.array(["a", None, "b"]).dictionary_encode(),
        "nothing": pa.nulls(3),
        "when": pa.array([0, None, 2], pa.timestamp("us", "Europe/Berlin")),
        "price": pa.array([Decimal("1.50"), None, Decimal("-2.25")], pa.decimal128(7, 2)),
        "story": pa.array(["long", None, ""], pa.large_string()),
        "extras": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        "blob": pa.array([b"\0\xff", None, b""], pa.large_binary()),
        "vector": pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float16(), 2)),
        "day": pa.array([1, None, 3], pa.date32()),
        "deep": pa.array([[[1], None], None, [[]]], pa.list_(pa.list_(pa.int8()))),
    }


def test_the_users_columns_of_every_kind_are_in_the_output_file_as_they_were_in_the_input_file(tmp_path: Path) -> None:
    given = pa.table({"id": ["a", "b", "c"], "image": [b"1", b"2", b"3"], **user_columns()})
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    pq.write_table(given, tmp_path / "in" / "x.parquet", row_group_size=2)  # dictionaries differ between row groups
    found = find(Source(path=str(tmp_path / "in")))
    (block,) = plan_blocks(found, 10)
    arrived = unpack(pack(read_block(found, block))["block"][0])
    columns = schema.latents_schema(found.user_columns, 4, {})
    done = arrived.append_column("latent", latents_to_arrow([None] * 3, 4)).append_column("error", pa.nulls(3, pa.string()))
    write_file(str(tmp_path / "out"), "part-000000000000.parquet", done.select(columns.names).cast(columns))
    written = pq.read_table(tmp_path / "out")
    for name, column in user_columns().items():
        assert written[name].to_pylist() == column.to_pylist(), name
        assert written.schema.field(name).type == given.schema.field(name).type, name


def test_ids_that_are_lost_doubled_or_foreign_fail_the_audit(tmp_path: Path) -> None:
    def part(start: int, *names: str) -> None:
        write_file(str(tmp_path), f"part-{start:012d}.parquet", pa.table({"id": names, "image": [b"x"] * len(names)}))

    part(0, "a", "b")
    part(2, "c", "d")
    wanted = check_ids(find(Source(path=str(tmp_path))))
    audit(wanted, str(tmp_path))
    part(2, "c")
    with pytest.raises(AuditError, match="1 input ids are missing and 0 ids are not of the input"):
        audit(wanted, str(tmp_path))
    part(2, "c", "a")
    with pytest.raises(AuditError, match=r"ids must be unique, but column 'id' has 'a' \(2 times\)"):
        audit(wanted, str(tmp_path))
    part(2, "c", "x")
    with pytest.raises(AuditError, match="1 input ids are missing and 1 ids are not of the input"):
        audit(wanted, str(tmp_path))


def test_row_groups_hold_at_most_100_pictures_however_many_rows_a_file_has(tmp_path: Path) -> None:
    write_file(str(tmp_path), "x.parquet", pa.table({"id": [str(i) for i in range(250)]}))
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [100, 100, 50]
