"""The whole chain as people run it: real processes, real Ray, the shipped images and weights."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from servers import ROOT

from jobs.finetune import finetune
from models.domains import DOMAINS
from models.weights import load_card
from pipeline import codec, schema
from pipeline.config import ConfigError

PIXELFACE = DOMAINS["pixelface"]
TINY = ("--return-step", "200", "--steps-up", "3")


def run(*words: str, status: int = 0, limit: float = 280) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *words], capture_output=True, text=True, timeout=limit)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def run_watched(*words: str) -> set[tuple[str, str]]:
    """What listened, and at which address, while a command ran: of it and of all processes below it."""
    heard: set[tuple[str, str]] = set()
    with subprocess.Popen([sys.executable, "-m", "jobs.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        said = None
        while said is None:
            with suppress(subprocess.TimeoutExpired):
                said = job.communicate(timeout=0.5)[0]
            with suppress(psutil.NoSuchProcess):
                command = psutil.Process(job.pid)
                for process in [command, *command.children(recursive=True)]:
                    with suppress(psutil.Error):
                        words_of = " ".join(process.cmdline()).split() or [""]  # a process that has just ended has none
                        name = Path(words_of[0]).name
                        heard |= {(name, at.laddr.ip) for at in process.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    assert job.returncode == 0, said
    return heard


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory) -> Path:
    """Six good pictures and three broken ones."""
    folder = tmp_path_factory.mktemp("pictures")
    images = schema.image_bytes(pq.read_table(PIXELFACE.held_out)["image"].slice(0, 6))
    for i, data in enumerate(images):
        (folder / f"good-{i}.png").write_bytes(data)
    (folder / "cut.png").write_bytes(images[0][:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_bytes(b"hello")
    return folder


@pytest.fixture(scope="module")
def latents(mixed_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "latents"
    run("invert", str(mixed_folder), str(out), *TINY, "--max-reject-rate", "0.5", "--block-rows", "4", "--workers", "1")
    return out


def test_every_input_row_is_in_the_latents_and_broken_pictures_keep_their_reason(latents):
    table = pq.read_table(latents)
    errors = dict(zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True))
    assert sorted(errors) == sorted(["cut.png", "empty.jpg", "text.png", *(f"good-{i}.png" for i in range(6))])
    assert {name for name, error in errors.items() if error} == {"cut.png", "empty.jpg", "text.png"}
    assert table["latent"].null_count == 3


def test_output_files_are_named_after_the_rows_they_hold_and_nothing_half_written_is_left(latents):
    names = sorted(p.name for p in latents.iterdir())
    assert names == ["_run.json", "part-000000000000.parquet", "part-000000000004.parquet", "part-000000000008.parquet"]


def test_the_record_says_how_the_latents_were_made(latents):
    record = json.loads((latents / "_run.json").read_text())
    assert record["command"].startswith("diffusionclip invert ")
    assert (record["rows"], record["rejected"], record["model_calls_per_image"]) == (9, 3, 3)
    assert record["recipe"]["return_step"] == 200


@pytest.fixture(scope="module")
def tuning(latents, tmp_path_factory) -> tuple[Path, set[tuple[str, str]]]:
    """A folder with one edit model, and what listened where while it was made."""
    models = tmp_path_factory.mktemp("models")
    words = ("--name", "rosy", "--source-text", "face", "--target-text", "face with red hair")
    heard = run_watched("finetune", str(latents), str(models), *words, "--epochs", "2", "--batch", "4", "--steps-down", "2", "--cpus", "1",
        "--held-out", "2", "--patience", "3", "--rank", "0", "--learning-rate", "5e-5", "--views", "1")  # fmt: skip
    return models, heard


@pytest.fixture(scope="module")
def tuned(tuning) -> Path:
    return tuning[0]


def test_a_ray_of_ones_own_and_its_workers_listen_on_loopback_only(tuning):
    _, heard = tuning
    assert {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RayTrainWorker"} <= {name for name, _ in heard}
    assert {address.removeprefix("::ffff:") for _, address in heard} == {"127.0.0.1"}


def test_fine_tuning_with_ray_train_leaves_an_edit_model_with_a_card_that_says_how_it_was_made(tuned):
    card = load_card(tuned / "rosy.safetensors")
    assert (card.target, card.images, card.rank) == ("face with red hair", 4, None)
    assert card.losses["epoch"] in {1, 2}, "the epoch with the best held-out similarity is what is saved"
    assert card.steps == card.losses["epoch"]
    assert {"held_out", "similarity", "loss"} <= card.losses.keys()
    assert card.recipe["return_step"] == 200
    assert not list(tuned.glob(".training/*"))


@pytest.fixture(scope="module")
def edits(latents, tuned, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("edits")
    run("edit", str(latents), str(out), "-a", "none", "-a", "rosy", "-d", "1", "-d", "0.5", "--models", str(tuned), "--steps-down", "3",
        "--max-reject-rate", "0.5")  # fmt: skip
    return out


def test_each_edit_is_a_dataset_of_its_own_with_a_row_for_each_input_row(edits, latents):
    assert sorted(p.name for p in edits.iterdir()) == ["none", "rosy", "rosy_x0.5"]
    ids = sorted(pq.read_table(latents)["id"].to_pylist())
    for folder in edits.iterdir():
        table = pq.read_table(folder)
        assert sorted(table["id"].to_pylist()) == ids
        assert table["edited"].null_count == table["mae"].null_count == 3


def load(folder: Path, cache: Path):
    """With the ``datasets`` package, which knows pictures by what the files say of their columns."""
    import datasets

    return datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", cache_dir=str(cache))


def test_hugging_face_datasets_shows_pictures_and_latents(edits, latents, tmp_path):
    for folder, column in ((latents, "image"), (edits / "rosy", "edited")):
        rows = load(folder, tmp_path)
        assert len(rows) == 9
        good = rows.filter(lambda error: error is None, input_columns="error")
        assert good[0][column].convert("RGB").size == (32, 32)
        assert isinstance(good[0][column], Image.Image)
    table = load(latents, tmp_path)
    assert table.features["latent"].length == 3 * 32 * 32
    by_id = {row["id"]: row["error"] for row in table.select_columns(["id", "error"])}
    assert {name for name, error in by_id.items() if error} == {"cut.png", "empty.jpg", "text.png"}


def test_duckdb_and_pandas_read_scores_and_pictures(edits):
    import duckdb
    import pandas

    asked = f"select count(*), count(mae), min(octet_length(edited.bytes)) from '{edits}/rosy/*.parquet' where error is null"
    ((rows, scored, least),) = duckdb.sql(asked).fetchall()
    assert (rows, scored) == (6, 6)
    assert least > 100
    frame = pandas.read_parquet(edits / "rosy")
    assert frame["error"].notna().sum() == 3
    picture = frame.loc[frame["error"].isna(), "edited"].iloc[0]["bytes"]
    assert Image.open(io.BytesIO(picture)).size == (32, 32)


def test_edited_pictures_open_at_the_domains_size_and_differ_from_the_reconstruction(edits):
    def pictures(name: str) -> np.ndarray:
        table = pq.read_table(edits / name).sort_by("id")
        return np.stack([codec.decode(data, 32) for data in schema.image_bytes(table["edited"]) if data])

    assert pictures("none").shape == (6, 3, 32, 32)
    assert (pictures("none") != pictures("rosy")).any()


def test_the_page_of_a_run_is_one_file(edits, tmp_path):
    run("report", str(edits), "--out", str(tmp_path / "page.html"), "--rows", "4")
    page = (tmp_path / "page.html").read_text()
    assert "rosy" in page
    assert "cut.png" in page


@pytest.fixture(scope="module")
def lean(latents, tuned) -> Path:
    """A low-rank edit model beside the whole one, trained with recomputation until it no longer gets better."""
    words = ("--name", "lean", "--source-text", "face", "--target-text", "sad face", "--rank", "2", "--memory", "checkpoint")
    more = ("--epochs", "3", "--batch", "2", "--accumulate", "2", "--held-out", "2", "--images", "4", "--steps-down", "2", "--views", "1")
    run("finetune", str(latents), str(tuned), *words, *more)
    return tuned


@pytest.mark.slow
def test_a_low_rank_edit_model_is_small_and_says_so(lean):
    card = load_card(lean / "lean.safetensors")
    assert (card.rank, card.images, card.clips) == (2, 4, [PIXELFACE.clip])
    assert "held_out" in card.losses
    assert (lean / "lean.safetensors").stat().st_size < (lean / "rosy.safetensors").stat().st_size / 8


@pytest.mark.slow
def test_mixes_by_ranges_of_timesteps_use_both_kinds_of_edit_models(lean, latents, tmp_path):
    mixes = ("--mix", "lean=0.5,rosy=0.5", "--mix", "0:lean=1;150:rosy=0.5,base=0.5")
    run("edit", str(latents), str(tmp_path), *mixes, "--models", str(lean), "--steps-down", "3", "--max-reject-rate", "0.5")
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    tables = [pq.read_table(folder).sort_by("id") for folder in folders]
    assert [table["edited"].null_count for table in tables] == [3, 3]
    assert tables[0]["edited"] != tables[1]["edited"]


@pytest.mark.slow
def test_strokes_of_another_kind_are_brought_into_the_domain_before_they_are_edited(tuned, tmp_path):
    """A flat drawing comes nearer to what the model knows, the same one however often it is run and in whatever batch."""
    pictures = tmp_path / "strokes"
    pictures.mkdir()
    for i, colour in enumerate([(224, 172, 105), (120, 80, 50), (240, 200, 170)]):
        drawing = Image.new("RGB", (64, 64), (250, 220, 225))
        ImageDraw.Draw(drawing).rectangle((12, 12, 52, 52), fill=colour)
        drawing.save(pictures / f"{i}.png")
    words = ("-a", "none", "-a", "rosy", "--models", str(tuned), "--project", "2", "--return-step", "300", "--steps-up", "4")
    for out, batch in (("one", "1"), ("three", "3")):
        run("edit", str(pictures), str(tmp_path / out), *words, "--steps-down", "4", "--batch", batch, "--workers", "1")
    one, three = (pq.read_table(tmp_path / out / "none").sort_by("id") for out in ("one", "three"))
    again = [[codec.decode(data, 32).astype(int) for data in schema.image_bytes(table["edited"])] for table in (one, three)]
    assert max(np.abs(a - b).max() for a, b in zip(*again, strict=True)) <= 1
    source = [codec.decode(data, 32).astype(int) for data in schema.image_bytes(one["image"])]
    assert all(np.abs(a - b).mean() > 2 for a, b in zip(source, again[0], strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fine_tuning_that_was_killed_goes_on_and_ends_where_it_would_have_ended(latents, tmp_path):
    words = ("--name", "rosy", "--source-text", "face", "--target-text", "face with red hair", "--epochs", "8", "--batch", "4",
             "--steps-down", "4", "--views", "2", "--learning-rate-growth", "1.2", "--ema", "0.5")  # fmt: skip
    command = [sys.executable, "-m", "jobs.cli", "finetune", str(latents), str(tmp_path / "cut"), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None and not list((tmp_path / "cut").glob(".training/*/checkpoint_*/training.pt")):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        assert process.poll() is None, "it was over before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "cut" / "rosy.safetensors").exists()
    done = run(*command[3:])
    assert "rosy in" in done.stdout
    run("finetune", str(latents), str(tmp_path / "whole"), *words)
    cut, whole = (load_file(tmp_path / name / "rosy.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    cards = [load_card(tmp_path / name / "rosy.safetensors") for name in ("cut", "whole")]
    assert cards[0] == cards[1]


def test_more_rejects_than_allowed_end_with_status_3_after_everything_is_written(mixed_folder, tmp_path):
    done = run("invert", str(mixed_folder), str(tmp_path / "out"), *TINY, "--workers", "1", status=3)
    assert "3 of 9 rows were rejected" in done.stderr
    assert pq.read_table(tmp_path / "out").num_rows == 9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["invert", "nowhere/at/all", "{out}"], "there is nothing at"),
        (["invert", "{empty}", "{out}"], "is empty"),
        (["invert", "{table}", "{out}", "--image-column", "picture"], "no column 'picture'; it has id, image, caption, factors"),
        (["invert", "{table}", "{out}", "--return-step", "1000", "--steps-up", "1"], "must lie between 1 and 999"),
        (["invert", "{table}", "{out}", "--domain", "pixelfaec"], "did you mean 'pixelface'?"),
        (["edit", "{table}", "{out}", "-a", "glases"], "did you mean 'glasses'?"),
        (["edit", "{table}", "{out}"], "say what to edit"),
        (["edit", "{table}", "{out}", "-a", "none", "-d", "nan"], "degree"),
        (["edit", "{table}", "{out}", "--mix", "glasses=much,smiling=1"], "must be a number"),
        (["finetune", "{table}", "{out}", "-a", "glasses"], "holds no latents"),
        (["finetune", "{table}", "{out}", "--name", "../up", "--source-text", "face", "--target-text", "face"], "letters, digits"),
        (["report", "{empty}"], "edits"),
        (["evaluate", "nowhere/at/all"], "there is no folder"),
        (["evaluate", "{empty}", "--rows", "8", "--each", "2"], "--rows, --each: options that check a domain"),
    ],
)
def test_an_impossible_request_is_refused_with_one_message_before_ray_starts(words, says, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"out": str(tmp_path / "out"), "empty": str(tmp_path / "empty"), "table": str(PIXELFACE.held_out)}
    done = run(*(word.format(**places) for word in words), status=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.parquet"))


def test_latents_of_another_return_step_or_base_model_are_refused_by_name(latents, tmp_path):
    done = run("edit", str(latents), str(tmp_path / "out"), "-a", "none", "--return-step", "300", status=2)
    assert "were made with return_step 200, but 300 is asked for" in done.stderr


def test_an_output_of_another_request_is_not_touched_without_overwrite(latents, mixed_folder):
    before = {p.name: p.read_bytes() for p in latents.iterdir()}
    done = run("invert", str(mixed_folder), str(latents), *TINY, status=2)
    assert "block rows was 4, now 64" in done.stderr
    assert "give another folder, or --overwrite" in done.stderr
    assert {p.name: p.read_bytes() for p in latents.iterdir()} == before


def test_user_columns_pass_through_and_hugging_face_metadata_names_the_pictures(tmp_path):
    out = tmp_path / "latents"
    run("invert", str(PIXELFACE.held_out), str(out), *TINY, "--limit", "3", "--workers", "1")
    table = pq.read_table(out)
    assert table["factors"].to_pylist() == pq.read_table(PIXELFACE.held_out)["factors"].slice(0, 3).to_pylist()
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert isinstance(table.schema.field("latent").type, pa.FixedSizeListType)


def test_an_edit_model_that_is_there_is_neither_trained_again_nor_replaced_unasked(latents, tuned, capsys):
    before = {file.name: file.read_bytes() for file in tuned.glob("rosy.*")}
    words = {"name": "rosy", "source_text": "face", "target_text": "face with red hair", "batch": 4, "steps_down": 2, "cpus": 1.0}
    words |= {"held_out": 2, "patience": 3, "rank": 0, "learning_rate": 5e-5, "views": 1}
    finetune(str(latents), str(tuned), **words, epochs=2)
    assert "is there from the same request; nothing to train" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match=r"another request \(tuning epochs was 2, now 3\); give another folder or name, or --overwrite"):
        finetune(str(latents), str(tuned), **words, epochs=3)
    assert {file.name: file.read_bytes() for file in tuned.glob("rosy.*")} == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"parallel": 0}, "at least 1 attribute must be trained at a time; got --parallel 0"),
        ({"models": "hf://me/models"}, "edit models are saved in a local folder or a bucket .s3://.; got hf://me/models"),
        ({"clip_weight": 0.0, "form": "cosine"}, "--form is of the directional CLIP loss"),
        ({"identity": "face.pth"}, "--identity without a weight does nothing: give --id-weight as well"),
        ({"gpus": 1.5}, "GPUs of each worker must be"),
        ({"attribute": ["glasses", "smiling"], "workers": 0}, "^workers must be at least 1; got 0$"),
    ],
    ids=str,
)
def test_an_impossible_training_is_refused_before_ray_starts(given, says, latents, tmp_path):
    with pytest.raises(ConfigError, match=says):
        finetune(str(latents), **({"models": str(tmp_path), "attribute": ["glasses"]} | given))


WITHOUT = """
import shutil, sys
from pathlib import Path
from jobs import cli, finetune, running

gone = Path(sys.argv.pop(1))

def without(work):
    def carried_out(*arguments):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        return work(*arguments)
    return carried_out

running.run_plan, finetune.train = without(running.run_plan), without(finetune.train)
cli.main()
"""


@pytest.mark.parametrize("job", ["edit", pytest.param("finetune", marks=pytest.mark.slow)])
def test_weights_that_only_a_worker_misses_are_named_in_one_line(job, latents, tuned, tmp_path):
    """As on a node that has no such file: it is there when the job is planned, and gone when a worker looks."""
    if job == "edit":
        shutil.copytree(tuned, tmp_path / "models")
        gone, words = tmp_path / "models" / "rosy.safetensors", ("-a", "rosy", "--models", "models", "--max-reject-rate", "1")
    else:
        gone, words = Path(shutil.copytree(PIXELFACE.clip, tmp_path / "clip")), ("-a", "glasses", "--clip", "clip", "--cpus", "1")
    command = [sys.executable, "-c", WITHOUT, str(gone), job, str(latents), str(tmp_path / "out"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert str(gone) in line
    assert "every node must have the file at the same place, or be able to fetch it" in line
