"""What would be lost: one picture is changed by words in a single command, and an impossible request leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.optimize import optimize
from models.diffusion import walk
from models.domains import DOMAINS
from models.recipe import Recipe
from models.unet import load_alpha_bars, load_base
from models.weights import WeightsError
from pipeline import codec, schema
from pipeline.config import ConfigError

PIXELFACE = DOMAINS["pixelface"]
QUICK = ("--return-step", "300", "--steps-up", "4", "--steps-down", "4", "--loss-steps-down", "3", "--steps", "8", "--l1-weight", "0.5")


def run(*words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "optimize", *words], capture_output=True, text=True, timeout=250)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out face that wears no glasses."""
    table = pq.read_table(PIXELFACE.held_out)
    row = next(i for i, factors in enumerate(table["factors"].to_pylist()) if factors["glasses"] == "no")
    file = tmp_path_factory.mktemp("face") / "face.png"
    file.write_bytes(schema.image_bytes(table["image"].slice(row, 1))[0] or b"")
    return file


@pytest.fixture(scope="module")
def result(face: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("optimized") / "out"
    run(str(face), str(out), "--target-text", "face with glasses", *QUICK)
    return out


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), np.float32)


def test_the_picture_is_closer_to_the_text_and_the_record_says_by_how_much(result: Path) -> None:
    record = json.loads((result / "optimize.json").read_text())
    assert record["edited"]["similarity"] > record["reconstruction"]["similarity"] + 0.02
    assert len(record["losses"]) == 9
    assert record["best_step"] == min(range(9), key=lambda step: record["losses"][step]["loss"])
    assert record["command"].startswith("diffusionclip optimize ")
    assert np.abs(pixels(result / "edited.png") - pixels(result / "reconstruction.png")).mean() > 1


def test_the_kept_latent_walks_down_to_the_edited_picture(result: Path) -> None:
    recipe = Recipe.from_dict(json.loads((result / "optimize.json").read_text())["recipe"])
    bars, latent = load_alpha_bars(PIXELFACE.weights), load_file(result / "latent.safetensors")["latent"]
    with torch.no_grad():
        image = walk(load_base(PIXELFACE.weights), latent, recipe.down(bars), bars, recipe.order)
    assert np.abs(codec.to_pictures(image)[0].transpose(1, 2, 0) - pixels(result / "edited.png")).max() <= 1


def test_the_strip_shows_source_way_and_result_side_by_side(result: Path) -> None:
    strip = pixels(result / "steps.png")
    width = strip.shape[1] // 8
    assert strip.shape[0] == width == 128
    np.testing.assert_array_equal(strip[::4, :width:4], pixels(result / "source.png"))
    np.testing.assert_array_equal(strip[::4, -width::4], pixels(result / "edited.png"))


def test_an_earlier_result_is_not_touched_without_overwrite(result: Path, face: Path) -> None:
    before = {file.name: file.read_bytes() for file in result.iterdir()}
    assert "--overwrite" in run(str(face), str(result), "--target-text", "sad face", *QUICK, status=2).stderr
    assert {file.name: file.read_bytes() for file in result.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_text": "  "}, "the target text is empty"),
        ({"target_text": "face of a Klingon"}, "has never seen 'klingon'"),
        ({"image": "{face}.gone"}, "there is no file"),
        ({"image": "{text}"}, "cannot be used"),
        ({"memory": "stepwise"}, "full or checkpoint"),
        ({"steps": 0}, "at least 1 step"),
        ({"id_weight": 1.0}, "give --identity"),
        ({"clip": ["ViT-B-61/openai"]}, "unknown CLIP 'ViT-B-61/openai'"),
        ({"out": "{face}"}, "a file in its place"),
        ({"gpu": True}, "there is no CUDA device"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_an_impossible_request_is_refused_with_one_line_and_leaves_nothing(
    changes: dict[str, Any], says: str, face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "text.png").write_text("hello")
    places = {"face": face, "text": tmp_path / "text.png"}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in changes.items()}
    request = {"image": str(face), "out": tmp_path / "out", "target_text": "sad face"} | given
    with pytest.raises((ConfigError, WeightsError)) as caught:
        optimize(**request | {"out": Path(request["out"])})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
