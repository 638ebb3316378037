"""What would be lost: knowing what a run takes before anything is spent, and knowing all that stands in its way."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from jobs.cli import main
from jobs.plan import between, duration, ranged, size
from jobs.requests import domain_named, make_edits
from models.domains import DOMAINS
from models.recipe import Recipe
from models.unet import load_base
from pipeline import schema
from pipeline.config import Resources, Run, Source
from pipeline.manifest import write_manifest
from pipeline.plan import _outputs, make_plan
from pipeline.resume import clear
from pipeline.sources import find
from pipeline.worker import Worker, read_packed

FACTOR = 2.0
"""Between which the size of edits is foretold for pictures that are flat, the worst case: the network's noise is most of the file."""
OPTIONS = ("--steps-up", "3", "--batch", "5", "--block-rows", "8")

Told = Callable[..., dict[str, Any]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """``told("invert", ..., status=0)``: the JSON of a plan; its errors are under ``errors``."""

    def run(*words: str, status: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["diffusionclip", "plan", *map(str, words), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, errors = capsys.readouterr()
        assert ended.value.code == status, errors
        return {**(json.loads(out) if out else {}), "errors": errors}

    return run


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """24 faces in row groups of 8."""
    assert DOMAINS["pixelface"].held_out
    pq.write_table(pq.read_table(DOMAINS["pixelface"].held_out).slice(0, 24), tmp_path / "faces.parquet", row_group_size=8)
    return tmp_path / "faces.parquet"


def compute(run: Run, blocks: int) -> tuple[int, int]:
    """Computes the first blocks that are left, as a worker does. Returns the images that the networks saw and the bytes of the files."""
    plan = make_plan(run)
    seen = 0

    def count(module: object, given: tuple[Any, ...], result: object) -> None:
        nonlocal seen
        seen += len(given[0])

    handle = load_base(run.domain.weights).register_forward_hook(count)  # copies of the base model count as well
    try:
        for output in plan.pending:
            clear(output.folder, lambda name: True)
        worker = Worker(run, plan.writing, plan.found.has_latents)
        for block in plan.left[:blocks]:
            worker(read_packed(plan.found, block))
    finally:
        handle.remove()
    for output in plan.pending:
        state = "finished" if len(plan.left) <= blocks else "running"
        write_manifest(output.folder, {"state": state, "request": output.request})
    return seen, sum(file.stat().st_size for output in plan.pending for file in Path(output.folder).glob("*.parquet"))


def request(source: Path, output: Path, *names: str) -> Run:
    domain = domain_named("pixelface")
    recipe = Recipe.from_dict({**domain.recipe.to_dict(), "steps_up": 3, **({"steps_down": 3} if names else {})})
    edits = make_edits(domain, list(names), [], [1.0], []) if names else ()
    resources = Resources(workers=2, batch=5, block_rows=8)
    return Run(source=Source(path=str(source)), output=str(output), domain=domain, recipe=recipe, edits=edits, resources=resources)


def test_a_plan_is_what_the_run_then_does_and_counts_only_what_is_left(told: Told, faces: Path, tmp_path: Path) -> None:
    latents, edits = tmp_path / "latents", tmp_path / "edits"
    # Up: exact, and of what is left after one of three blocks.
    foretold = told("invert", faces, latents, *OPTIONS)
    assert not latents.exists()  # a plan leaves nothing
    first, _ = compute(request(faces, latents), 1)
    left = told("invert", faces, latents, *OPTIONS)
    assert (left["rows"]["done"], left["rows"]["left"]) == (8, 16)
    rest, written = compute(request(faces, latents), 2)
    assert first + rest == foretold["model_calls"]["all"]
    assert rest == left["model_calls"]["all"]
    table = pq.read_table(latents)
    assert len(table) == foretold["rows"]["left"]
    assert table["latent"].combine_chunks().flatten().nbytes == foretold["bytes"]["latents"]
    assert foretold["bytes"]["written"][str(latents)][1] == pytest.approx(written, rel=0.1)
    done = told("invert", faces, latents, *OPTIONS)
    assert (done["rows"]["left"], done["model_calls"]["all"], done["bytes"]["read"]) == (0, 0, 0)
    # Down: calls exact, bytes within a factor.
    foretold = told("edit", latents, edits, "-a", "glasses", "--steps-down", "3", "--batch", "5", "--block-rows", "8")
    computed, written = compute(request(latents, edits, "glasses"), 3)
    assert computed == foretold["model_calls"]["all"]
    low, likely = foretold["bytes"]["written"][str(edits / "glasses")]
    assert low < written * FACTOR
    assert written / FACTOR < likely < written * FACTOR
    # Another edit beside one that has two of three blocks.
    compute(request(latents, tmp_path / "two", "glasses"), 2)
    foretold = told(
        *("edit", latents, tmp_path / "two", "-a", "glasses", "-a", "none", "--steps-down", "3", "--batch", "5", "--block-rows", "8")
    )
    assert foretold["model_calls"]["all"] == 3 * (10 + 30)  # batches of 5 are filled up
    computed, _ = compute(request(latents, tmp_path / "two", "glasses", "none"), 3)
    assert computed == foretold["model_calls"]["all"]
    assert not ray.is_initialized()


def test_every_problem_is_told_beside_the_numbers_and_nothing_is_left_behind(told: Told, faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "edits"
    found = told("edit", faces, out, "-a", "glases", "-a", "none", "--models", tmp_path / "none", "--score-clip", "x", status=2)
    assert any("glases" in problem for problem in found["problems"])
    assert any("is not a folder" in problem for problem in found["problems"])
    assert all(problem in found["errors"] for problem in found["problems"])
    assert found["model_calls"]["an_image"] == 60
    assert not out.parent.exists()


def test_a_request_without_numbers_is_refused_with_every_problem(told: Told, tmp_path: Path) -> None:
    found = told("invert", tmp_path / "nothing", tmp_path / "out", "--steps-up", "1", "--batch", "0", status=2)
    assert all(words in found["errors"] for words in ("steps up", "batch", "there is nothing at"))


def test_a_million_images_of_a_domain_whose_weights_are_not_here(
    told: Told, faces: Path, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = ("--domain", "celebahq-256", "--limit", "4", "--rows", "1000000", "--workers", "8", "--gpus", "1", "--gpu-type", "h100")
    found = told("invert", faces, tmp_path / "out", *asked, "--price-per-gpu-hour", "2")
    assert found["model_calls"]["all"] == 20 * 1_000_000
    assert found["bytes"]["latents"] == 1_000_000 * 3 * 256 * 256 * 2
    assert not found["speed"]["measured"]
    least, likely, most = found["gpu_hours"]
    assert least < likely < most
    alone = 20e6 * found["flops"]["a_call"] / found["speed"]["flops"] / 3600
    assert alone < likely == pytest.approx(alone + found["cpu_seconds"] / 3600, rel=0.01)
    assert likely == pytest.approx(8 * found["wall_seconds"][1] / 3600)
    assert found["price"] == pytest.approx([2 * hours for hours in found["gpu_hours"]])
    assert any("not on this machine" in note for note in found["notes"])
    assert "did you mean 'h100'" in told("invert", faces, tmp_path / "out", *asked[:-1], "h10", status=2)["errors"]


def test_measuring_is_said_to_be_measuring(told: Told, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.plan.MEASURED_SECONDS", 0.0)
    found = told("invert", faces, tmp_path / "out", *OPTIONS, "--measure")
    least, likely, most = found["wall_seconds"]
    assert 0 < least <= likely <= most
    assert found["speed"]["measured"]
    assert found["gpu_hours"] is None


def test_training_is_planned_before_there_are_latents(told: Told, tmp_path: Path) -> None:
    asked = ("-a", "smiling", "-a", "sad", "--gpus", "1", "--parallel", "2", "--images", "10", "--epochs", "2", "--steps-down", "4")
    found = told("finetune", tmp_path / "latents", tmp_path / "models", *asked, status=2)
    assert "there is nothing at" in found["errors"]
    assert found["model_calls"]["all"] == 2 * 10 * 2 * 4
    assert found["gpus"] == 2
    assert len(found["bytes"]["written"]) == 2
    assert "learning rate 0.002 for low-rank weights (rank 8): smiling, sad" in found["notes"]


def test_the_rate_that_a_training_would_have_is_told(
    told: Told, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = ("finetune", tmp_path / "latents", tmp_path / "models", "-a", "pixar", "--domain", "celebahq-256", "--gpus", "1")
    for more, rate in (((), "8e-06 for the whole network"), (("--rank", "8"), "0.00016 for low-rank weights (rank 8)")):
        assert f"learning rate {rate}: pixar" in told(*asked, *more, status=2)["notes"]


def test_numbers_are_rounded_as_one_says_them() -> None:
    assert [size(n) for n in (0, 999, 1000, 393_216_000_000)] == ["0 B", "999 B", "1 kB", "393 GB"]
    assert [duration(s) for s in (0.5, 90, 5400, 26 * 3600, 10 * 86400)] == ["0.5 s", "1.5 min", "1.5 h", "26 h", "10 days"]
    assert ranged([22.0, 32.0, 56.0], lambda h: f"{h:g}") == "32 (22 to 56)"
    assert between([5.0, 5.0], size) == "5 B"


def test_a_plan_finds_that_an_output_cannot_be_made_without_making_anything(told: Told, faces: Path, tmp_path: Path) -> None:
    told("invert", faces, tmp_path / "deep" / "out", *OPTIONS)
    (tmp_path / "file").touch()
    assert "is a file; give another" in told("invert", faces, tmp_path / "file" / "out", *OPTIONS, status=2)["errors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces.parquet", "file"]


def test_credentials_in_the_address_of_a_clip_are_not_written_into_every_output_file(faces: Path, tmp_path: Path) -> None:
    asked = replace(request(faces, tmp_path / "out", "glasses"), score_clip="https://me:hunter2@host/clip?X-Amz-Signature=hunter2")
    (output,) = _outputs(asked, find(asked.source))
    assert schema.about(output.columns)["clip"] == "https://host/clip"
    assert "hunter2" not in str(output.columns.metadata)
