"""What would be lost: a run that was stopped goes on, loses nothing, doubles nothing, and never goes on as another run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TinyDomain, TinyEdit
from test_end_to_end import PIXELFACE, TINY, run
from tiny import save_clip

from models.clip import clip_fingerprint
from models.recipe import Recipe, Tuning
from pipeline import schema
from pipeline.config import ConfigError, Edit, Resources, Run, Source, TuneRun
from pipeline.manifest import FAILED, RECORD, read_manifest, write_manifest
from pipeline.resume import (
    alone,
    clear,
    differences,
    done_by_all,
    errors_in,
    file_name,
    finished,
    nested,
    output_problems,
    request_of,
    tuning_request,
)
from pipeline.sources import find, plan_blocks

# ---- the request -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_run(tiny_domain: TinyDomain, save_pictures: Callable[..., Path], tmp_path: Path) -> Run:
    pictures = save_pictures(*(f"{i}.png" for i in range(6)))
    domain = tiny_domain()
    return Run(source=Source(path=str(pictures)), output=str(tmp_path / "out"), domain=domain, recipe=domain.recipe)


def request(run: Run, edit: Edit | None = None) -> dict[str, Any]:
    return request_of(run, find(run.source), edit)


def test_a_request_is_the_same_whatever_decides_only_the_speed(tiny_run: Run) -> None:
    assert request(tiny_run) == request(replace(tiny_run, resources=Resources(workers=3, cpus=2, batch=5), command="other", overwrite=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": Recipe(return_step=200, steps_up=5, steps_down=4)}, ["recipe return_step was 300, now 200"]),
        ({"resources": Resources(block_rows=2)}, ["block rows was 64, now 2"]),
    ],
)
def test_what_changed_is_named_with_both_values(changes: dict[str, Any], says: list[str], tiny_run: Run) -> None:
    assert differences(request(tiny_run), request(replace(tiny_run, **changes))) == says


def test_which_rows_and_columns_are_taken_is_part_of_the_request_and_how_much_memory_they_may_take_is_not(tiny_run: Run) -> None:
    found, source = find(tiny_run.source), tiny_run.source
    before = request_of(tiny_run, found, None)
    asked = replace(found, source=replace(source, where="age > 3", columns=("caption",)))
    assert differences(before, request_of(tiny_run, asked, None)) == [
        'columns was nothing, now ["caption"]',
        "where was nothing, now age > 3",
    ]
    assert differences(before, request_of(tiny_run, replace(found, source=replace(source, max_block_bytes=2**22)), None)) == []


def test_other_contents_of_the_input_under_the_same_names_are_another_request(tiny_run: Run) -> None:
    before = request(tiny_run)
    file = Path(tiny_run.source.path, "3.png")
    file.write_bytes(file.read_bytes() + b" ")
    assert [change.split(" was ")[0] for change in differences(before, request(tiny_run))] == ["input files"]
    file.unlink()
    assert "number of input files was 6, now 5" in differences(before, request(tiny_run))


def test_the_input_is_listed_once_and_not_again_for_each_request(tiny_run: Run) -> None:
    """A bucket of a million pictures is a thousand requests."""
    found, before = find(tiny_run.source), request(tiny_run)
    shutil.rmtree(tiny_run.source.path)
    assert request_of(tiny_run, found, None) == before


def test_another_edit_model_of_the_same_name_is_another_request(tiny_run: Run, tiny_edit: TinyEdit) -> None:
    part = tiny_edit(tiny_run.domain, "smiling")
    before = request(tiny_run, Edit(parts=(part,)))
    assert before == request(tiny_run, Edit(parts=(tiny_edit(tiny_run.domain, "smiling"),)))
    other = replace(part, file=tiny_edit(tiny_run.domain, "sad").file)
    assert [change.split(" was ")[0] for change in differences(before, request(tiny_run, Edit(parts=(other,))))] == ["edit"]
    assert differences(before, request(tiny_run, Edit(parts=(part,), degree=0.5))) == ["degree was 1.0, now 0.5"]


def test_other_weights_at_the_same_place_are_another_request(
    tiny_run: Run, tiny_edit: TinyEdit, face_weights: Path, tmp_path: Path
) -> None:
    clip, faces = tmp_path / "clip", tmp_path / "faces.safetensors"
    shutil.copytree(tiny_run.domain.clip, clip)
    shutil.copy(face_weights, faces)
    run, edit = replace(tiny_run, score_clip=str(clip), identity=str(faces)), Edit(parts=(tiny_edit(tiny_run.domain, "smiling"),))
    tune = TuneRun(
        latents=run.source.path,
        output=tmp_path / "models",
        domain=run.domain,
        attribute="smiling",
        source_text="face",
        target_text="smiling face",
        recipe=run.recipe,
        tuning=Tuning(),
        clips=(str(clip), "ViT-B-16/openai"),
        identity=str(faces),
    )

    def now() -> list[dict[str, Any]]:
        return [request(run, edit), tuning_request(tune, find(run.source))]

    def changed() -> list[list[str]]:
        return [[change.split(" was ")[0] for change in differences(*pair)] for pair in zip(before, now(), strict=True)]

    before = now()
    assert changed() == [[], []]
    shutil.rmtree(clip)
    save_clip(clip, seed=2)
    assert changed() == [[f"weights of {clip}"]] * 2
    faces.write_bytes(face_weights.read_bytes()[:-1] + b"x")
    assert changed() == [[f"weights of {clip}", f"weights of {faces}"]] * 2
    assert not [name for asked in now() for name in asked if "openai" in name], "published weights go by their name; none are fetched"
    older = [{name: value for name, value in asked.items() if not name.startswith("weights of")} for asked in before]
    assert [differences(*pair) for pair in zip(older, now(), strict=True)] == [[], []]


def test_weights_in_a_bucket_are_told_apart_by_what_it_says_of_them(s3: str, tiny_run: Run) -> None:
    store = fsspec.filesystem("s3")
    store.put(tiny_run.domain.clip, f"{s3}/weights-of/clip", recursive=True)
    before = clip_fingerprint(f"{s3}/weights-of/clip")
    assert before == clip_fingerprint(f"{s3}/weights-of/clip")
    assert before
    store.pipe_file(f"{s3}/weights-of/clip/open_clip_model.safetensors", b"others")
    assert clip_fingerprint(f"{s3}/weights-of/clip") not in {before, None}


def test_a_manifest_comes_back_equal_so_that_requests_can_be_compared(tiny_run: Run, tmp_path: Path) -> None:
    asked = request(tiny_run, Edit(ranges=((0, ()),)))
    write_manifest(str(tmp_path), {"request": asked})
    assert read_manifest(str(tmp_path))["request"] == asked


def test_another_process_may_not_write_to_the_same_place_at_the_same_time(tmp_path: Path, empty_cache: Path) -> None:
    code = "import sys; from pipeline.resume import alone\nwith alone([sys.argv[1]]): print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with alone([str(tmp_path / "elsewhere"), "memory://out"]):
            pass
        for name in ("out", "link"):
            with pytest.raises(ConfigError, match="another process is writing to"), alone([str(tmp_path / name)]):
                pass
        other.kill()
        other.wait()
    with alone([str(tmp_path / "out")]):  # a process that was killed holds nothing
        pass
    assert not (tmp_path / "out").exists()


# ---- what is done ----------------------------------------------------------------------------------------------------


def write(folder: Path, start: int, errors: list[str | None]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / file_name(start)
    pq.write_table(pa.table({"id": [str(start + i) for i in range(len(errors))], "error": pa.array(errors, pa.string())}), file)
    return file


def blocks(run: Run) -> Any:
    return plan_blocks(find(run.source), 2)


def test_a_block_is_done_when_every_output_has_it_whole(tiny_run: Run, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for start in (0, 2, 4):
        write(one, start, [None, "broken"])
    write(two, 0, [None, "broken"])
    cut = write(two, 2, [None, None])
    cut.write_bytes(cut.read_bytes()[:-20])
    write(two, 4, [None])  # fewer rows than the block has
    kept = [finished(blocks(tiny_run), str(folder), retry_rejects=False) for folder in (one, two)]
    assert kept == [{start: ["broken"] for start in (0, 2, 4)}, {0: ["broken"]}]
    done = done_by_all(blocks(tiny_run), kept)
    assert (done.starts, done.rows, dict(done.reasons)) == ({0}, 2, {"broken": 1})


def test_blocks_with_rejects_are_computed_again_if_asked_for(tiny_run: Run, tmp_path: Path) -> None:
    write(tmp_path / "one", 0, [None, None])
    write(tmp_path / "one", 2, [None, "broken"])
    assert finished(blocks(tiny_run), str(tmp_path / "one"), retry_rejects=False) == {0: [], 2: ["broken"]}
    assert finished(blocks(tiny_run), str(tmp_path / "one"), retry_rejects=True) == {0: []}


def test_rows_of_something_else_are_never_taken_for_ones_own(tiny_run: Run, tmp_path: Path) -> None:
    folder, asked = tmp_path / "out", request(tiny_run)
    assert output_problems(str(folder), asked) == []
    write(folder, 0, [None])
    assert "of something else" in output_problems(str(folder), asked)[0]
    write_manifest(str(folder), {"request": asked})
    assert output_problems(str(folder), asked) == []
    changed = output_problems(str(folder), {**asked, "limit": 3})[0]
    assert "another request (limit was nothing, now 3); give another folder, or --overwrite" in changed
    (folder / RECORD).write_text("{")
    with pytest.raises(ConfigError, match=r"_run\.json is damaged"):
        output_problems(str(folder), asked)


def test_what_a_killed_process_left_is_removed_and_other_peoples_files_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for start in (0, 2):
        write(folder, start, [None])
    (folder / f".{file_name(2)}.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    clear(str(folder), {file_name(0)}.__contains__)
    assert sorted(p.name for p in folder.iterdir()) == ["notes.txt", file_name(0)]


def test_a_file_without_errors_column_is_not_ours(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "x.parquet")
    assert errors_in(fsspec.filesystem("file"), str(tmp_path / "x.parquet"), 1) is None


@pytest.mark.parametrize(("source", "out"), [("a", "a"), ("a/x.parquet", "a"), ("a/b", "a"), ("a", "a/b"), ("a/../a", "a")])
def test_input_and_output_may_not_hold_each_other(source: str, out: str, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert "give another output folder" in nested(str(tmp_path / source), str(tmp_path / out))[0]
    assert nested(str(tmp_path / "a"), str(tmp_path / "ab")) == []


def test_files_that_no_run_wrote_are_neither_removed_nor_taken_in(tiny_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, 0, [None])
    (folder / "mine.parquet").write_bytes(b"mine")
    assert "that no run wrote, like mine.parquet" in output_problems(str(folder), request(tiny_run), overwrite=True)[0]
    clear(str(folder), lambda name: False)
    assert [p.name for p in folder.iterdir()] == ["mine.parquet"]


def test_every_damaged_byte_of_a_small_file_is_noticed_or_harmless(tmp_path: Path) -> None:
    file = write(tmp_path, 0, [None, "broken"])
    data = file.read_bytes()
    for position in range(0, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        found = errors_in(fsspec.filesystem("file"), str(file), 2)
        assert found is None or len(found) <= 2


# ---- real runs -------------------------------------------------------------------------------------------------------

ROWS = ("--limit", "24", "--block-rows", "4", "--workers", "1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in row groups of 4."""
    file = tmp_path_factory.mktemp("source") / "faces.parquet"
    pq.write_table(pq.read_table(PIXELFACE.held_out).slice(0, 24), file, row_group_size=4)
    return file


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "edits"
    run("edit", str(source), str(out), "-a", "none", "-a", "glasses", *TINY, "--steps-down", "3", *ROWS)
    return out


def rows(folder: Path) -> dict[str, bytes | None]:
    table = pq.read_table(folder)
    assert table["id"].to_pylist() == sorted(set(table["id"].to_pylist()), key=table["id"].to_pylist().index)
    return dict(zip(table["id"].to_pylist(), schema.image_bytes(table["edited"]), strict=True))


def test_a_run_that_was_killed_goes_on_to_the_same_pixels_and_computes_nothing_twice(source: Path, whole: Path, tmp_path: Path) -> None:
    words = ["edit", str(source), str(tmp_path / "cut"), "-a", "none", "-a", "glasses", *TINY, "--steps-down", "3", *ROWS]
    command = [sys.executable, "-m", "jobs.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None and len(list((tmp_path / "cut" / "glasses").glob("part-*.parquet"))) < 2:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        assert process.poll() is None, "it was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
    assert json.loads((tmp_path / "cut" / "glasses" / RECORD).read_text())["state"] == "running"
    there = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut" / "glasses").glob("part-*.parquet")}
    assert "glasses is not finished" in run("evaluate", str(tmp_path / "cut"), status=2).stderr
    done = run(*words)
    assert "rows are there from an earlier run" in done.stdout
    for name in ("none", "glasses"):
        assert rows(tmp_path / "cut" / name) == rows(whole / name)
    same = [name for name, time in there.items() if (tmp_path / "cut" / "glasses" / name).stat().st_mtime_ns == time]
    assert len(same) == len(there)
    manifest = json.loads((tmp_path / "cut" / "glasses" / RECORD).read_text())
    assert (manifest["state"], manifest["rows"]) == ("finished", 24)
    assert manifest["resumed_rows"] >= 4


def test_a_finished_run_asked_for_again_does_nothing_and_another_one_is_refused_by_name(source: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("part-*.parquet")}
    words = ["edit", str(source), str(whole), "-a", "none", "-a", "glasses", *TINY, *ROWS]
    assert "24 of 24 rows are there" in run(*words, "--steps-down", "3").stdout
    assert "recipe steps_down was 3, now 4" in run(*words, "--steps-down", "4", status=2).stderr
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("part-*.parquet")} == before


@pytest.mark.slow
def test_a_further_attribute_leaves_the_finished_ones_alone(source: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    run("edit", str(source), str(whole), "-a", "none", "-a", "glasses", "-a", "sad", *TINY, *ROWS, "--steps-down", "3")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(rows(whole / "sad")) == 24


def test_what_is_done_of_one_attribute_stays_when_others_are_asked_for_with_it(source: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "glasses", tmp_path / "glasses")
    (tmp_path / "glasses" / file_name(8)).unlink()
    manifest = read_manifest(str(tmp_path / "glasses"))
    write_manifest(str(tmp_path / "glasses"), manifest | {"state": "running", "seconds": 1000.0})  # as if it had been killed just now
    there = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("part-*.parquet")}
    words = ["edit", str(source), str(tmp_path), "-a", "glasses", "-a", "none", *TINY, *ROWS, "--steps-down", "3"]
    assert "20 of 24 rows are there and are left as they are" in " ".join(run(*words).stdout.split())
    assert len(there) == 5
    assert {p: p.stat().st_mtime_ns for p in there} == there
    for name in ("none", "glasses"):
        assert rows(tmp_path / name) == rows(whole / name)
    first, other = (read_manifest(str(tmp_path / name)) for name in ("glasses", "none"))
    assert (first["state"], first["resumed_rows"], other["resumed_rows"]) == ("finished", 20, 0)
    assert first["seconds"] > 1000 > other["seconds"]


LOSING = """
from pathlib import Path
from jobs import cli
from pipeline import dataset

audit = dataset.audit

def after_a_loss(input_ids, folder):
    Path(folder, "part-000000000004.parquet").unlink()
    audit(input_ids, folder)

dataset.audit = after_a_loss
cli.main()
"""


@pytest.mark.slow
def test_a_file_lost_before_the_audit_ends_the_job_with_status_1_and_the_same_command_mends_it(source: Path, tmp_path: Path) -> None:
    words = ["invert", str(source), str(tmp_path / "latents"), *TINY, *ROWS]
    lost = subprocess.run([sys.executable, "-c", LOSING, *words], capture_output=True, text=True, timeout=280, check=False)
    assert lost.returncode == 1
    assert "latents: 4 input ids are missing and 0 ids are not of the input; run again" in lost.stderr
    assert read_manifest(str(tmp_path / "latents"))["state"] == FAILED
    assert "latents failed its audit" in run("edit", str(tmp_path / "latents"), str(tmp_path / "edits"), "-a", "none", status=2).stderr
    assert "20 of 24 rows are there" in run(*words).stdout
    assert read_manifest(str(tmp_path / "latents"))["state"] == "finished"
    assert len(pq.read_table(tmp_path / "latents")) == 24


@pytest.mark.slow
def test_in_a_bucket_a_run_goes_on_with_what_is_missing_too(source: Path, s3: str) -> None:
    store = fsspec.filesystem("s3")
    store.put(str(source), f"{s3}/resume/faces.parquet")
    words = ["invert", f"{s3}/resume/faces.parquet", f"{s3}/resume/latents", *TINY, *ROWS]
    run(*words)
    store.invalidate_cache()
    files = [file for file in store.ls(f"{s3}/resume/latents", detail=False) if file.endswith(".parquet")]
    assert len(files) == 6
    whole = {file: store.cat_file(file) for file in files}
    store.rm_file(files[2])
    assert "20 of 24 rows are there" in run(*words).stdout
    store.invalidate_cache()
    assert {file: pq.read_table(pa.BufferReader(store.cat_file(file))) for file in files} == {
        file: pq.read_table(pa.BufferReader(data)) for file, data in whole.items()
    }


def test_nothing_private_in_an_address_is_written_down(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.session import command_line

    monkeypatch.setattr(
        sys,
        "argv",
        ["diffusionclip", "edit", "https://me:secret@host/faces?X-Amz-Signature=secret", "out", "--models", "s3://k:secret@b/m"],
    )
    assert command_line() == "diffusionclip edit https://host/faces out --models s3://b/m"
    asked = request(replace(tiny_run, identity="https://host/face.pth?sig=secret"), Edit())
    assert "secret" not in json.dumps(asked)
