"""What would be lost: rows beside one that must not be touched, and pixels when memory runs out; without Ray."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import TinyDomain, TinyEdit

from pipeline.config import Edit, Resources, Run, Source
from pipeline.faults import from_bytes
from pipeline.manifest import write_manifest
from pipeline.plan import make_plan
from pipeline.resume import clear
from pipeline.sources import Block
from pipeline.worker import Worker, pack, read, read_packed, unpack, write_file


def test_a_packed_block_is_one_row_and_comes_back_as_it_was() -> None:
    table = pa.table({"id": ["a", None], "latent": pa.array([[1.0, 2.0], None], pa.list_(pa.float16(), 2))}, metadata={"a": "b"})
    packed = pack(table)
    assert len(packed) == 1
    assert unpack(packed["block"][0]).equals(table, check_metadata=True)


@pytest.fixture
def edit_run(tiny_domain: TinyDomain, tiny_edit: TinyEdit, save_pictures: Callable[..., Path], tmp_path: Path) -> Run:
    """Five pictures, one block, one edit."""
    domain = tiny_domain()
    return Run(
        source=Source(path=str(save_pictures(*(f"{i}.png" for i in range(5))))),
        output=str(tmp_path / "out"),
        domain=domain,
        recipe=domain.recipe,
        edits=(Edit(parts=(tiny_edit(domain, "smiling"),)),),
        score_clip="none",
        resources=Resources(batch=4),
    )


def computed(run: Run, withheld: dict[int, str], change: Callable[[Worker], object] = lambda worker: None) -> list[dict[str, Any]]:
    plan = make_plan(run)
    worker = Worker(run, plan.outputs, plan.found.has_latents)
    change(worker)
    ((_, done),) = worker.compute(read(plan.found, plan.blocks[0]), withheld)
    return done.to_pylist()


def test_only_the_edits_that_lack_a_block_are_computed_and_written(edit_run: Run) -> None:
    plain = Edit()
    run = replace(edit_run, edits=(*edit_run.edits, plain), resources=replace(edit_run.resources, block_rows=2))
    first = make_plan(replace(run, edits=edit_run.edits))
    for output in make_plan(run).outputs:  # as a run that is killed leaves them
        clear(output.folder, lambda name: True)
        write_manifest(output.folder, {"state": "running", "request": output.request})
    smiling = Worker(first.run, first.writing, False)
    for block in first.left[:2]:
        smiling.finish(read(first.found, block))
    there = {file: file.stat().st_mtime_ns for file in Path(run.output).rglob("*.parquet")}
    plan = make_plan(run)
    assert [block.wanted for block in plan.left] == [(f"{run.output}/none",)] * 2 + [()]
    assert ([plan.rows_kept(output) for output in plan.pending], plan.done.rows) == ([4, 0], 0)
    worker = Worker(plan.run, plan.writing, False)
    names = [[output.edit.name for output, _ in worker.compute(read(plan.found, block), {}) if output.edit] for block in plan.left]
    assert names == [["none"], ["none"], ["smiling", "none"]]
    for block in plan.left:
        assert worker(read_packed(plan.found, block))["failure"].to_pylist() == [None]
    assert {file: file.stat().st_mtime_ns for file in there} == there
    after = make_plan(run)
    assert (after.left, after.writing, len(after.pending)) == ([], (), 2)  # all rows are there, and both records are still to be closed


@pytest.mark.parametrize("from_latents", [False, True])
def test_a_row_that_must_not_be_touched_becomes_a_reject_and_the_others_are_as_they_would_be(
    from_latents: bool, edit_run: Run, tmp_path: Path
) -> None:
    run = edit_run
    if from_latents:
        plan = make_plan(replace(run, edits=(), output=str(tmp_path / "latents")))
        ((_, latents),) = Worker(plan.run, plan.outputs, False).compute(read(plan.found, plan.blocks[0]), {})
        write_file(str(tmp_path), "latents.parquet", latents)
        run = replace(run, source=Source(path=str(tmp_path / "latents.parquet")))
    usual, done = computed(run, {}), computed(run, {2: "it kills"})
    for row, (before, after) in enumerate(zip(usual, done, strict=True)):
        if row == 2:
            assert (after["error"], after["edited"], after["mae"]) == ("it kills", None, None)
            assert (after["id"], after["image"]) == (before["id"], before["image"])
        else:
            assert after == before


def test_memory_that_runs_out_changes_no_pixel_by_more_than_rounding(edit_run: Run) -> None:
    sizes: list[int] = []

    def little_memory(worker: Worker) -> None:
        assert worker.invert is not None
        model = worker.invert.model

        def limited(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return model(x, t)

        worker.invert.model = limited  # type: ignore[assignment]

    run = replace(edit_run, edits=())
    usual, done = (torch.tensor([row["latent"] for row in rows]) for rows in (computed(run, {}), computed(run, {}, little_memory)))
    assert set(sizes) == {4, 2}
    assert torch.allclose(usual, done, atol=2e-3)


def test_a_block_that_cannot_be_read_brings_the_reason_in_place_of_its_rows(edit_run: Run) -> None:
    found = make_plan(edit_run).found
    packed = read_packed(found, Block(start=0, rows=1, files=(f"{edit_run.source.path}/gone.png",)))
    assert packed["block"].null_count == 1
    assert "gone.png cannot be read (No such file or directory)" in str(from_bytes(packed["failure"][0].as_py()))
