"""What would be lost: one's own diffusion model is a domain without code, and a slip in its file is answered before anything runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import constants
from test_clip import put_into_cache
from tiny import save_diffusion, tiny_unet

from models.domain_files import domain_from_folder, load_domain_file
from models.domains import DOMAINS, README_RECIPE, README_TUNING
from models.flops import call_flops, network_config, network_of
from models.recipe import LOW_RANK_RATE
from models.references import WeightsError
from models.unet import load_base
from models.weights import folder_of

Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """``written("cats.yaml", "noun: cat")``: a domain file beside the folder ``diffusion`` of a network for 16x16 images."""
    save_diffusion(tmp_path / "diffusion", 16)

    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


def problems_of(file: Path) -> list[str]:
    with pytest.raises(WeightsError) as caught:
        load_domain_file(file)
    return str(caught.value).splitlines()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_three_lines_make_a_domain(written: Written, tmp_path: Path) -> None:
    domain = load_domain_file(written("cats.yaml", "noun: cat\nweights: diffusion\nlicence: mine\n"))
    assert (domain.name, domain.noun, domain.licence, domain.family) == ("cats", "cat", "mine", "")
    assert domain.weights == str(tmp_path / "diffusion")
    assert (domain.image_size, domain.learned_variance, domain.classes) == (16, False, None)
    assert (domain.recipe, domain.tuning, domain.clip) == (README_RECIPE, README_TUNING, "ViT-B-16/openai")
    assert folder_of(domain.weights) == tmp_path / "diffusion"


def test_json_says_the_same_as_yaml(written: Written) -> None:
    values = {"noun": "cat", "weights": "diffusion", "tuning": {"learning_rate": 1e-6, "rank": 4}, "clip": "RN50/openai"}
    yaml = "noun: cat\nweights: diffusion\ntuning:\n  learning_rate: 1e-6\n  rank: 4\nclip: RN50/openai\n"
    as_json, as_yaml = written("cats.json", json.dumps(values)), written("cats.yaml", yaml)
    assert load_domain_file(as_json) == load_domain_file(as_yaml)
    assert load_domain_file(as_yaml).tuning.learning_rate == 1e-6  # which YAML by itself reads as text


def test_a_file_may_start_from_a_domain_of_the_table_and_say_only_what_differs(written: Written, tmp_path: Path) -> None:
    domain = load_domain_file(
        written("mine.yml", "extends: celebahq-256\nweights: ./diffusion\nrecipe: {return_step: 300, solver: ddim}\n")
    )
    base = DOMAINS["celebahq-256"]
    assert (domain.name, domain.family, domain.noun, domain.licence) == ("mine", "human", "face", base.licence)
    assert (domain.recipe.return_step, domain.recipe.solver, domain.recipe.steps_up) == (300, "ddim", base.recipe.steps_up)
    assert domain.tuning == base.tuning
    assert domain.image_size == 16, "the network says it, not the table's"
    untouched = load_domain_file(written("bare.yaml", "extends: celebahq-256\n"))
    assert (untouched.image_size, untouched.weights) == (256, base.weights)


def test_paths_are_relative_to_the_file_and_names_of_the_hub_stay(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edits").mkdir()
    (tmp_path / "deep").mkdir()
    text = "weights: ../diffusion\nclip: ./clip\nedits: s3://bucket/edits\nheld_out: held_out.parquet\n"
    file = written("deep/a.yaml", text)
    monkeypatch.chdir(tmp_path / "deep")
    for reference in (file, Path("a.yaml"), "./a.yaml"):
        domain = load_domain_file(reference)
        assert domain.weights == str(tmp_path / "diffusion")
        assert domain.clip == str(tmp_path / "deep" / "clip")
        assert domain.edits == "s3://bucket/edits"
        assert domain.held_out == tmp_path / "deep" / "held_out.parquet"
    domain = load_domain_file(written("b.yaml", "weights: google/ddpm-cat-256\nimage_size: 256\nedits: edits\n"))
    assert (domain.weights, domain.edits, domain.clip) == ("google/ddpm-cat-256", str(tmp_path / "edits"), "ViT-B-16/openai")


def test_every_slip_is_said_at_once_with_the_nearest_name(written: Written) -> None:
    text = "nuon: cat\nweights: diffusion\nimage_size: big\nfamily: 3\nrecipe: {retrun_step: 1}\ntuning: [1]\nknown_words_only: 1\n"
    found = problems_of(written("cats.yaml", text))
    wanted = [
        "unknown name 'nuon'; did you mean 'noun'",
        "image_size must be a whole number; got 'big'",
        "family must be text; got 3",
        "recipe: unknown name 'retrun_step'; did you mean 'return_step'",
        "tuning must be names and values; got [1]",
        "known_words_only must be true or false; got 1",
    ]
    for said, problem in zip(wanted, found, strict=True):
        assert said in problem
        assert "cats.yaml" in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: celebahq\n", "did you mean 'celebahq-256'"),
        ("noun: cat\n", "weights is missing"),
        ("weights: ''\n", "image_size is missing"),
        ("weights: diffusion\nrecipe: {return_step: 1000}\n", "the return step must lie between 1 and 999; got 1000"),
        ("weights: diffusion\nfamily: cats\n", "unknown family of attributes 'cats'"),
        ("weights: ./nothing\n", "nothing is not a folder"),
        ("- a\n- b\n", "must hold names and values"),
        ("noun: [cat\n", "neither YAML nor JSON"),
        ("noun: !!python/object/apply:os.system ['true']\n", "neither YAML nor JSON"),
    ],
)
def test_what_cannot_be_is_answered_in_one_sentence(written: Written, text: str, said: str) -> None:
    (problem,) = problems_of(written("cats.yaml", text))
    assert said in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "prediction: v_prediction",
            "states prediction v_prediction, but {folder} has epsilon; leave prediction out, or correct prediction_type",
        ),
        ("schedule: cosine", "states schedule cosine, but {folder} has linear betas 0.0001..0.02, 1000 timesteps; leave schedule out"),
        (
            "learned_variance: true",
            "states learned_variance true, but {folder} has false; leave learned_variance out, or correct out_channels",
        ),
        ("classes: 10", "states classes 10, but {folder} has none; leave classes out, or correct num_class_embeds"),
    ],
)
@pytest.mark.parametrize("size", ["", "image_size: 16\n"])
def test_what_a_file_says_of_its_network_is_never_ignored(written: Written, tmp_path: Path, text: str, said: str, size: str) -> None:
    scheduler = tmp_path / "diffusion" / "scheduler_config.json"
    file = written("cats.yaml", f"weights: diffusion\n{size}{text}\n")
    config = json.loads(scheduler.read_text())
    config.pop("prediction_type")  # as in old folders
    scheduler.write_text(json.dumps(config))
    (problem,) = problems_of(file)
    assert said.format(folder=tmp_path / "diffusion") in problem
    assert problem.startswith(f"{file}: ")


def test_a_file_may_repeat_what_its_network_says(written: Written, tmp_path: Path) -> None:
    scheduler = tmp_path / "diffusion" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    text = "weights: diffusion\nlearned_variance: false\nclasses: null\nschedule: linear betas 0.0001..0.02, 1000 timesteps\n"
    assert load_domain_file(written("cats.yaml", f"{text}prediction: v_prediction\n")).prediction == "v_prediction"
    assert load_domain_file(written("cats.yaml", text)).prediction == "v_prediction"
    assert "but celebahq-256 has epsilon" in problems_of(written("faces.yaml", "extends: celebahq-256\nprediction: sample\n"))[0]


def test_low_rank_weights_get_a_rate_of_their_own_also_in_a_file(written: Written) -> None:
    full = README_TUNING.learning_rate
    for tuning, rate in (("rank: 8", full * LOW_RANK_RATE), ("rank: 8, learning_rate: 1e-3", 1e-3), ("epochs: 2", full)):
        assert load_domain_file(written("cats.yaml", f"weights: diffusion\ntuning: {{{tuning}}}\n")).tuning.learning_rate == rate
    pixelface = DOMAINS["pixelface"].tuning
    assert load_domain_file(written("a.yaml", "extends: pixelface\ntuning: {rank: 4}\n")).tuning.learning_rate == pixelface.learning_rate


def test_a_file_that_is_not_there_is_said_to_be_that(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cats\.yaml does not exist"):
        load_domain_file(tmp_path / "cats.yaml")


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_any_folder_of_a_diffusers_network_is_a_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_diffusion(tmp_path / "cats", 16)
    monkeypatch.chdir(tmp_path)
    for reference in (tmp_path / "cats", "cats", "./cats/"):
        domain = domain_from_folder(reference)
        assert (domain.name, domain.noun, domain.family, domain.image_size) == ("cats", "image", "", 16)
        assert domain.weights == str(tmp_path / "cats"), "workers may run elsewhere"
        assert (domain.recipe, domain.tuning) == (README_RECIPE, README_TUNING)


def test_height_and_width_may_be_told_apart_where_they_are_equal(tmp_path: Path) -> None:
    folder = save_diffusion(tmp_path / "cats", 16)
    config = json.loads((folder / "config.json").read_text())
    flops = call_flops(network_of(config))
    (folder / "config.json").write_text(json.dumps(config | {"sample_size": [16, 16]}))
    domain = domain_from_folder(folder)
    assert domain.image_size == 16
    assert load_base(domain.weights)(torch.zeros(1, 3, 16, 16), torch.tensor([3])).shape == (1, 3, 16, 16)
    assert call_flops(network_of(network_config(domain))) == flops, "plans count with it too"


def test_a_saved_pipeline_is_a_domain(tmp_path: Path) -> None:
    pipeline: Any = DDPMPipeline(tiny_unet(32, out_channels=6), DDPMScheduler(beta_schedule="linear"))
    pipeline.save_pretrained(tmp_path / "pipeline")
    domain = domain_from_folder(tmp_path / "pipeline")
    assert (domain.image_size, domain.learned_variance) == (32, True)
    assert domain.schedule == DOMAINS["celebahq-256"].schedule


def test_imported_weights_are_of_the_domain_that_they_extend(tmp_path: Path) -> None:
    folder = save_diffusion(tmp_path / "out", 256)
    (folder / "domain.json").write_text(json.dumps({"extends": "afhq-dog-256", "weights": "."}))
    domain = domain_from_folder(folder)
    assert (domain.name, domain.noun, domain.family) == ("afhq-dog-256", "dog", "dog")
    assert domain.weights == str(folder)
    (folder / "domain.json").write_text(json.dumps({"noun": "cat"}))
    assert (domain_from_folder(folder).name, domain_from_folder(folder).noun) == ("out", "cat")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"in_channels": 4}, "no network for square RGB images"),
        ("config.json", {"sample_size": [16, 8]}, r"for images of 16x8 pixels \(sample_size \[16, 8\]\); only square ones"),
        ("config.json", {"sample_size": [16, 16, 16]}, "no network for square RGB images"),
        ("scheduler_config.json", {"prediction_type": "flow"}, "predicts flow"),
        ("config.json", None, "no config.json"),
        ("scheduler_config.json", None, "no scheduler_config.json"),
    ],
)
def test_a_folder_that_cannot_be_walked_with_is_refused(tmp_path: Path, file: str, change: dict[str, Any] | None, said: str) -> None:
    folder = save_diffusion(tmp_path / "cats", 16)
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    with pytest.raises(WeightsError, match=said):
        domain_from_folder(folder)


def test_a_folder_of_the_hub_is_a_domain_also_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIONCLIP_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put_into_cache(tmp_path / "hub", "somebody/ddpm-cat-16", save_diffusion(tmp_path / "cats", 16))
    domain = domain_from_folder("somebody/ddpm-cat-16")
    assert (domain.name, domain.weights, domain.image_size) == ("ddpm-cat-16", "somebody/ddpm-cat-16", 16)
    with pytest.raises(WeightsError, match="somebody/ddpm-dog-16"):
        domain_from_folder("somebody/ddpm-dog-16")


def test_a_folder_of_a_bucket_is_a_domain_with_paths_of_that_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("DIFFUSIONCLIP_CACHE", str(tmp_path / "cache"))
    folder = save_diffusion(tmp_path / "cats", 16)
    (folder / "domain.json").write_text(json.dumps({"noun": "cat", "edits": "./edits"}))
    fsspec.filesystem("memory").put(str(folder), "/domains/cats", recursive=True)
    domain = domain_from_folder("memory://domains/cats")
    assert (domain.name, domain.weights, domain.edits) == ("cats", "memory://domains/cats", "memory://domains/cats/edits")
    (tmp_path / "cats.yaml").write_text("weights: memory://domains/cats\nprediction: sample\n")
    (problem,) = problems_of(tmp_path / "cats.yaml")
    assert "states prediction sample, but memory://domains/cats has epsilon" in problem
