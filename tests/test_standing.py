"""What would be lost: whoever waits for a run sees from its folder how far it is, and why rows were rejected."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_end_to_end import run

from pipeline.config import ConfigError
from pipeline.manifest import write_manifest
from pipeline.standing import standings


def write(folder: Path, start: int, errors: list[str | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"error": pa.array(errors, pa.string())}), folder / f"part-{start:012d}.parquet")


def started(seconds_ago: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat()


def test_a_run_on_its_way_tells_what_is_done_rejected_and_left_and_how_fast_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "glasses"
    for start in (0, 4, 8):
        write(folder, start, [None, None, None, "broken"])
    (folder / "part-000000000012.parquet").write_bytes(b"half a file")
    write_manifest(str(folder), {"state": "running", "updated": started(100), "rows": 32, "resumed_rows": 2})
    (one,) = standings(str(tmp_path))
    assert (one.state, one.rows, one.done, one.left, dict(one.reasons)) == ("running", 32, 12, 20, {"broken": 3})
    assert one.rate == pytest.approx(10 / 100, rel=0.05)
    told = run("status", str(tmp_path)).stdout
    assert "glasses" in told
    assert "3 x broken" in told
    assert "0:03:" in told  # 20 rows at a tenth a second
    assert "the same command goes on" in told


def test_a_finished_run_has_the_rate_of_all_of_it_and_nothing_left(tmp_path: Path) -> None:
    write(tmp_path, 0, [None] * 8)
    write_manifest(str(tmp_path), {"state": "finished", "updated": started(0), "rows": 8, "seconds": 4.0})
    (one,) = standings(str(tmp_path))
    assert (one.left, one.rate) == (0, 2.0)


def test_a_run_that_has_just_started_has_no_rate(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), {"state": "running", "updated": started(1), "rows": 8})
    (one,) = standings(str(tmp_path))
    assert (one.done, one.rate, one.latest) == (0, None, None)
    assert run("status", str(tmp_path)).returncode == 0


def test_a_folder_that_no_run_wrote_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no _run.json"):
        standings(str(tmp_path))
    assert "there is no folder" in run("status", str(tmp_path / "gone"), status=2).stderr
