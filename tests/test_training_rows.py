"""What would be lost: which latents an attribute is trained on is what was asked for, whatever comes first in the dataset."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from servers import ROOT

from models.domains import DOMAINS
from models.recipe import Tuning
from pipeline.training import rows_wanted

SCRIPT = """
import sys
import ray
from pipeline.config import Source
from pipeline.sources import find
from pipeline.training import first_usable

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
rows = first_usable(find(Source(path=sys.argv[1])), int(sys.argv[2])).take_all()
print(",".join(row["id"] for row in rows))
"""


def test_the_first_usable_rows_are_taken_in_order_even_if_most_of_the_beginning_was_rejected(tmp_path: Path) -> None:
    for i in range(5):
        ids = [f"{64 * i + row:03d}" for row in range(64)]
        errors = [None if int(name) % 100 == 3 or int(name) > 310 else "no face" for name in ids]
        table = {"id": ids, "image": [b"x"] * 64, "latent": [[0.0]] * 64, "error": pa.array(errors, pa.string())}
        pq.write_table(pa.table(table), tmp_path / f"part-{64 * i:012d}.parquet")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "6"]
    calm = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=calm)
    assert done.stdout.split()[-1:] == ["003,103,203,303,311,312"], done.stdout + done.stderr[-3000:]


def test_as_many_latents_are_looked_at_as_the_images_are_to_be_chosen_from() -> None:
    assert rows_wanted(Tuning(images=32, choose_from=96, held_out=4)) == 100
    assert rows_wanted(Tuning(images=48)) == 48
    assert rows_wanted(DOMAINS["pixelface"].tuning) == 96
