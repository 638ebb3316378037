"""What would be lost: whoever waits for a run sees from its folder how far it is, and why rows were rejected."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TinyDomain
from test_checks import save_latents
from test_end_to_end import run
from test_summary import write_edits

from jobs.cli import main
from jobs.prospect import of_run
from models.recipe import Tuning
from pipeline.config import ConfigError, Edit, Run, Source, TuneRun
from pipeline.manifest import FAILED, FINISHED, RUNNING, write_manifest
from pipeline.plan import make_plan
from pipeline.standing import seconds_spent, standings
from pipeline.tuning import make_tune_plan


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


def test_the_time_of_a_run_that_was_killed_is_added_to_that_of_the_runs_before_it(tmp_path: Path) -> None:
    write(tmp_path, 0, [None] * 8)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    os.utime(tmp_path / "part-000000000000.parquet", (at.timestamp() + 50,) * 2)
    assert seconds_spent(str(tmp_path)) == 0
    write_manifest(str(tmp_path), {"state": RUNNING, "updated": at.isoformat(), "rows": 8, "seconds": 100.0})
    assert seconds_spent(str(tmp_path)) == 150
    write_manifest(str(tmp_path), {"state": FINISHED, "updated": at.isoformat(), "rows": 8, "resumed_rows": 6, "seconds": 160.0})
    assert seconds_spent(str(tmp_path)) == 160
    (one,) = standings(str(tmp_path))
    assert one.rate == 8 / 160  # of all rows, over all the time


def problems(make: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        make()
    return caught.value.problems


LEFT = "{} is not finished, 21 of 24 rows are left; wait for its run, or, if that was stopped, give the same command again first: invert x"
WRONG = "{} failed its audit: its ids are not those of its input; give the command that made it again first, with --overwrite if it fails"


@pytest.mark.parametrize("kind", ["local", "bucket"])
@pytest.mark.parametrize(("state", "says"), [(RUNNING, LEFT), (FAILED, WRONG)])
def test_latents_of_which_rows_are_missing_are_neither_edited_nor_trained_on_and_a_plan_says_so(
    kind: str, state: str, says: str, tiny_domain: TinyDomain, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    domain = tiny_domain()
    folder = save_latents(tmp_path / "latents", domain, domain.recipe).path
    write_manifest(folder, {"state": state, "rows": 24, "command": "invert x"})
    if kind == "bucket":
        address = f"{request.getfixturevalue('s3')}/standing-{state.split()[0]}/latents"
        fsspec.filesystem("s3").put(folder, address, recursive=True)
        folder = address
    edit = Run(source=Source(path=folder), output=str(tmp_path / "out"), domain=domain, recipe=domain.recipe, edits=(Edit(),))
    tune = TuneRun(
        latents=folder,
        output=str(tmp_path / "models"),
        domain=domain,
        attribute="smiling",
        source_text="face",
        target_text="smiling face",
        recipe=domain.recipe,
        tuning=Tuning(steps_down=2, images=2),
    )
    for found in (problems(lambda: make_plan(edit)), problems(lambda: make_tune_plan(tune)), of_run(edit).problems):
        assert len(found) == 1
        assert found[0].startswith(says.format(folder))
    # As part of a folder too.
    parent = replace(edit, source=Source(path=folder.rpartition("/")[0]), output=f"{tmp_path}-out")
    assert problems(lambda: make_plan(parent))[0].startswith(says.format(folder))
    write_manifest(folder, {"state": FINISHED, "rows": 24, "files": 8, "command": "invert x"})  # since then seven were removed
    (lost,) = problems(lambda: make_plan(edit))
    assert lost.startswith(f"{folder} has 3 of the 24 rows that its run wrote; remove _run.json there if that is meant, or give the")
    write_manifest(folder, {"state": FINISHED, "rows": 3, "files": 8})  # or were joined
    assert make_plan(edit).found.rows == make_tune_plan(tune).found.rows == 3


def test_edits_of_which_rows_are_missing_have_no_scores_and_no_pictures_yet_but_a_page_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(str(write_edits(tmp_path / "edits" / "none", [{}] * 3, parts=())), {"state": FINISHED, "rows": 3})
    (tmp_path / "edits" / "glasses").mkdir()
    write_manifest(f"{tmp_path}/edits/glasses", {"state": RUNNING, "updated": started(1), "rows": 3})  # killed before its first file

    def said(status: int, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["diffusionclip", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, errors = capsys.readouterr()
        assert ended.value.code == status, out + errors
        return errors

    told = f"error: {tmp_path}/edits/glasses is not finished, 3 of 3 rows are left"
    for words in (["evaluate", f"{tmp_path}/edits"], ["export", f"{tmp_path}/edits/", f"{tmp_path}/pictures"]):
        errors = said(2, *words)
        assert errors.startswith(told)
        assert errors.count("\n") == 1
    assert not (tmp_path / "pictures").exists()
    said(0, "report", f"{tmp_path}/edits", "--out", f"{tmp_path}/page.html")
    said(0, "status", f"{tmp_path}/edits")
    said(0, "evaluate", f"{tmp_path}/edits/none")


def test_a_run_that_has_just_started_has_no_rate(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), {"state": "running", "updated": started(1), "rows": 8})
    (one,) = standings(str(tmp_path))
    assert (one.done, one.rate, one.latest) == (0, None, None)
    assert run("status", str(tmp_path)).returncode == 0


def test_a_folder_that_no_run_wrote_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no _run.json"):
        standings(str(tmp_path))
    assert "there is no folder" in run("status", str(tmp_path / "gone"), status=2).stderr
