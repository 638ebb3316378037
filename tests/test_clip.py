"""What would be lost: features that CLIP itself would give, for pictures of any size, with gradients; the right CLIP, or a
sentence that says which there are."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CLIP_CONFIG, save_clip
from torch import Tensor

from models.clip import (
    CONFIG,
    Clip,
    Preprocessing,
    absolute_clip,
    check_clip,
    clip_problems,
    creation_arguments,
    load_clip,
    model_and_tag,
    templates,
)
from models.references import WeightsError

UNKNOWN = ("smiling", "eyeglasses")
RESIZES = ("shortest", "longest", "squash")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(save_clip(tmp_path_factory.mktemp("clip") / "clip", UNKNOWN))


def images(*size: int) -> Tensor:
    return torch.rand((2, 3, *size), generator=torch.Generator().manual_seed(0)) * 2 - 1


def save_other_clip(folder: Path, model: dict[str, Any], preprocessing: dict[str, Any] | None = None) -> Path:
    """A folder whose CLIP differs from the tests' usual one in its configuration."""
    folder.mkdir(parents=True)
    config = {**CLIP_CONFIG, **model}
    kind = open_clip.model.CustomTextCLIP if config.pop("custom_text", False) else open_clip.model.CLIP
    state = {k: v.contiguous() for k, v in kind(**config).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    about = {"model_cfg": {**CLIP_CONFIG, **model}, "preprocess_cfg": preprocessing or {}}
    (folder / CONFIG).write_text(json.dumps(about))
    return folder


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (8, 8), (40, 24)])
def test_pictures_of_any_size_have_features_of_length_one(clip: Clip, size: tuple[int, int]) -> None:
    features = clip.image_features(images(*size))
    assert features.shape == (2, 8)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


def test_pictures_of_its_own_size_are_normalised_and_not_resampled(clip: Clip) -> None:
    pictures = images(16, 16)
    want = clip.model.encode_image(pictures)  # mean and standard deviation of 0.5 undo the range of -1 to 1
    torch.testing.assert_close(clip.image_features(pictures), want / want.norm(dim=1, keepdim=True))


def picture_with_edges(height: int, width: int) -> Image.Image:
    """Noise, in which aliasing shows, and sharp edges; not so bright nor dark that a filter overshoots what 8 bits hold."""
    pixels = np.random.default_rng(0).integers(70, 186, (height, width, 3), np.uint8)
    pixels[:, : width // 3] = 70
    pixels[: height // 3, width // 3 :] = 185
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", RESIZES)
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height_width", [(256, 256), (57, 57), (32, 32), (16, 16), (20, 20), (60, 33), (33, 61), (9, 40), (14, 12)])
def test_pictures_are_what_open_clips_own_transform_makes_of_them(height_width: tuple[int, int], filter: str, mode: str) -> None:
    picture = picture_with_edges(*height_width)
    config = open_clip.transform.PreprocessCfg(
        size=32,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation=filter,
        resize_mode=mode,
        fill_color=100 if mode == "longest" else 0,
    )
    want = open_clip.transform.image_transform_v2(config, is_train=False)(picture)
    ours = Preprocessing(32, config.mean, config.std, filter, mode, config.fill_color)
    got = ours.fit(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255)[0]
    assert got.shape == want.shape == (3, 32, 32)
    assert (got - want).abs().max() < 1.6 / 255  # Pillow rounds to 8 bits after the columns and again after the rows


def test_the_mean_and_deviation_are_those_of_the_weights(clip: Clip, tmp_path: Path) -> None:
    torch.testing.assert_close(clip.mean.flatten(), torch.full((3,), 0.5))
    torch.testing.assert_close(clip.std.flatten(), torch.full((3,), 0.5))
    pictures, openai = images(16, 16), load_clip(save_other_clip(tmp_path / "openai", {}))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    for channel in range(3):
        want = ((pictures[:, channel] + 1) / 2 - mean[channel]) / std[channel]
        torch.testing.assert_close(openai.preprocess(pictures)[:, channel], want)


def test_values_beyond_the_range_keep_their_gradient(clip: Clip) -> None:
    pictures = (3 * images(16, 16)).requires_grad_()
    clip.image_features(pictures)[:, 0].sum().backward()
    assert pictures.grad is not None
    assert (pictures.grad[pictures.detach().abs() > 1] != 0).float().mean() > 0.9


@pytest.mark.parametrize("mode", RESIZES)
@pytest.mark.parametrize("size", [(5, 5), (4, 7), (3, 2)])
def test_gradients_through_the_preprocessing_are_its_finite_differences(size: tuple[int, int], mode: str) -> None:
    fit = Preprocessing(4, (0.5,) * 3, (0.5,) * 3, resize_mode=mode).fit
    pictures = images(*size).double().requires_grad_()
    assert torch.autograd.gradcheck(fit, (pictures,))


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (8, 8)])
def test_gradients_reach_every_picture_and_no_weight(clip: Clip, size: tuple[int, int]) -> None:
    pictures = images(*size).requires_grad_()
    clip.image_features(pictures)[:, 0].sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


VISION = CLIP_CONFIG["vision_cfg"]


@pytest.mark.parametrize(
    "model",
    [
        {"vision_cfg": {**VISION, "image_size": 24}},
        {"embed_dim": 12, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
        {"custom_text": True},
        {"quick_gelu": True},
    ],
    ids=["larger", "resnet", "custom-text", "quick-gelu"],
)
def test_clips_of_other_sizes_and_kinds_work_alike(tmp_path: Path, model: dict[str, Any]) -> None:
    clip = load_clip(save_other_clip(tmp_path / "clip", model))
    pictures = images(20, 20).requires_grad_()
    features = clip.image_features(pictures)
    assert features.shape == (2, model.get("embed_dim", 8))
    features[:, 0].sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum() > 0
    assert clip.text_direction("face", "hat")(features).shape == features.shape
    assert clip.size == model.get("vision_cfg", VISION)["image_size"]


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_a_text_is_the_mean_of_its_eighty_templates(clip: Clip) -> None:
    assert len(templates()) == len(set(templates())) == 80
    each = []
    for template in templates():
        features = clip.model.encode_text(clip.tokenizer([template.replace("{}", "hat")]))[0]
        each.append(features / features.norm())
    mean = torch.stack(each).mean(0)
    got = clip.text_features("hat")
    torch.testing.assert_close(got, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert not got.requires_grad


def test_the_direction_leads_from_the_source_to_the_target(clip: Clip) -> None:
    features = clip.image_features(images(20, 20))
    change = clip.text_features("face with a hat") - clip.text_features("face")
    way = clip.text_direction("face", "face with a hat")(features)
    torch.testing.assert_close(way, (change / change.norm()).expand(2, -1))
    torch.testing.assert_close(clip.text_direction("face with a hat", "face")(features), -way)


def test_of_several_source_texts_each_image_starts_from_the_one_that_describes_it_best(clip: Clip) -> None:
    red, blond, target = (clip.text_features(f"face with {color} hair") for color in ("red", "blond", "grey"))
    to_grey = clip.text_direction("face with red hair|face with blond hair | ", "face with grey hair")
    got = to_grey(torch.stack([blond, red, (0.6 * red + 0.4 * blond)]))
    for row, source in zip(got, (blond, red, red), strict=True):
        torch.testing.assert_close(row, (target - source) / (target - source).norm())


def test_words_without_a_trained_token_are_found_whatever_their_case_and_company(clip: Clip) -> None:
    assert clip.unknown_words("Smiling face, without eyeglasses!") == ["smiling", "eyeglasses"]
    assert clip.unknown_words("a dark-skinned face with a hat") == []
    assert clip.unknown_words("") == []


def test_a_clip_with_all_its_words_knows_any_text(tmp_path: Path) -> None:
    assert load_clip(save_clip(tmp_path / "whole")).unknown_words("smiling zebra, xylophone 3") == []


# ---- which CLIP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "wanted"),
    [
        ("ViT-B-16/openai", ("ViT-B-16", "openai")),
        ("ViT-B/16", ("ViT-B-16", "openai")),
        ("ViT-L/14@336px", ("ViT-L-14-336", "openai")),
        ("RN50x16", ("RN50x16", "openai")),
        ("ViT-B/32/laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
        ("convnext_base_w/laion2b_s13b_b82k", ("convnext_base_w", "laion2b_s13b_b82k")),
        ("ViT-B-16-SigLIP/webli", ("ViT-B-16-SigLIP", "webli")),
    ],
)
def test_names_of_open_clip_and_of_openais_own_code_are_understood(reference: str, wanted: tuple[str, str]) -> None:
    assert model_and_tag(reference) == wanted
    assert clip_problems(reference) == []


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("ViT-B-61/openai", "did you mean 'ViT-B-16'"),
        ("vit-b-16/openai", "did you mean 'ViT-B-16'"),
        ("ViT-B-16/opnai", "did you mean 'openai'"),
        ("ViT-H-14", "ViT-H-14/laion2b_s32b_b79k"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "hf://org/name"),
    ],
)
def test_a_wrong_name_is_answered_in_one_sentence_with_the_nearest(reference: str, said: str) -> None:
    (problem,) = clip_problems(reference)
    assert said in problem
    assert "\n" not in problem
    with pytest.raises(WeightsError, match="MODEL/PRETRAINED"):
        load_clip(reference)


def test_a_folder_without_a_clip_or_its_weights_is_said_to_be_that(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert CONFIG in clip_problems(str(folder))[0]
    folder = save_clip(tmp_path / "clip")
    assert clip_problems(str(folder)) == []
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="has no weights"):  # open_clip itself would go on with random ones
        load_clip(folder)


def test_weights_that_do_not_fit_their_configuration_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    state = load_file(folder / "open_clip_model.safetensors")
    del state["token_embedding.weight"]
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=r"token_embedding\.weight") as caught:
        load_clip(folder)
    assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_pickled_code_in_a_weights_file_is_never_run(tmp_path: Path) -> None:
    folder, witness = save_clip(tmp_path / "clip"), tmp_path / "witness"
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"evil": Evil(witness)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(WeightsError):
        load_clip(folder)
    assert not witness.exists()


def test_asking_again_gives_the_same_object(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    assert load_clip(str(folder)) is load_clip(str(folder))


def test_every_model_of_the_table_is_built_with_the_activation_that_its_weights_were_trained_with() -> None:
    assert creation_arguments("ViT-B-16", "openai")["force_quick_gelu"]
    assert not creation_arguments("ViT-B-16", "laion2b_s34b_b88k")["force_quick_gelu"]
    for model, tag in open_clip.list_pretrained():
        trained = bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"))
        built = creation_arguments(model, tag)["force_quick_gelu"] or open_clip.get_model_config(model).get("quick_gelu", False)
        assert built or not trained
        assert open_clip.get_pretrained_cfg(model, tag)["hf_hub"], "weights come by way of the hub"


# ---- weights from elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, and no network."""
    monkeypatch.setenv("DIFFUSIONCLIP_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_cache(hub_cache: Path, repository: str, folder: Path) -> None:
    """As the hub's client lays out what it has downloaded."""
    commit, place = "a" * 40, hub_cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)


@pytest.fixture
def in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes ``tiny-clip/trained`` one of open_clip's models, with QuickGELU and a mean of its own; returns its folder."""
    model, about = {"quick_gelu": False}, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "quick_gelu": True, "resize_mode": "squash"}
    folder = save_other_clip(tmp_path / "trained", model)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", {**CLIP_CONFIG, **model})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"trained": {**about, "hf_hub": "somebody/tiny-clip/"}})
    return folder


def test_a_name_of_the_table_gets_its_weights_activation_and_preprocessing(hub_cache: Path, in_the_table: Path) -> None:
    with pytest.raises(WeightsError, match="offline"):
        check_clip("tiny-clip/trained")
    put_into_cache(hub_cache, "somebody/tiny-clip", in_the_table)
    check_clip("tiny-clip/trained")
    clip = load_clip("tiny-clip/trained")
    assert type(clip.model.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    assert type(clip.model.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    assert clip.preprocessing == Preprocessing(16, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bicubic", "squash")
    for name, weight in load_file(in_the_table / "open_clip_model.safetensors").items():
        torch.testing.assert_close(clip.model.state_dict()[name], weight, rtol=0, atol=0)
    load_clip.cache_clear()


def test_weights_that_cannot_be_had_are_answered_in_one_line_that_says_what_to_do(hub_cache: Path) -> None:
    with pytest.raises(WeightsError, match="offline") as caught:
        load_clip("ViT-B-16/openai")
    assert "timm/vit_base_patch16_clip_224.openai" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["hf://", "hf-hub:"])
def test_a_folder_of_the_hub_is_a_clip_like_a_local_one(hub_cache: Path, tmp_path: Path, prefix: str) -> None:
    folder = save_clip(tmp_path / "clip", UNKNOWN)
    put_into_cache(hub_cache, "somebody/clip", folder)
    assert clip_problems(f"{prefix}somebody/clip") == []
    pictures, clip = images(20, 20), load_clip(f"{prefix}somebody/clip")
    torch.testing.assert_close(clip.image_features(pictures), load_clip(folder).image_features(pictures), rtol=0, atol=0)
    load_clip.cache_clear()


def test_a_folder_of_a_bucket_is_a_clip_like_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("DIFFUSIONCLIP_CACHE", str(tmp_path / "cache"))
    folder, bucket = save_clip(tmp_path / "clip"), fsspec.filesystem("memory")
    bucket.put(str(folder), "/bucket/clip", recursive=True)
    pictures, clip = images(20, 20), load_clip("memory://bucket/clip")
    torch.testing.assert_close(clip.image_features(pictures), load_clip(folder).image_features(pictures), rtol=0, atol=0)
    check_clip("memory://bucket/clip/")
    bucket.rm("/bucket/clip/open_clip_config.json")
    for look in (load_clip, check_clip):
        with pytest.raises(WeightsError, match=r"needs open_clip_config\.json"):
            look("memory://bucket/clip/")


def test_a_local_clip_gets_its_absolute_path_and_a_name_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "mine")
    assert absolute_clip("mine") == absolute_clip("./mine") == str(tmp_path / "mine")
    for name in ("ViT-B-16/openai", "ViT-B/16", "RN50", "hf://org/name", "hf-hub:org/name", "s3://bucket/clip"):
        assert absolute_clip(name) == name


# ---- real size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_vit_b_16_sees_256_pixels_and_gives_gradients_in_its_real_size() -> None:
    model, tag = model_and_tag("ViT-B/16")
    made = open_clip.create_model(model, pretrained=None, **creation_arguments(model, tag))
    assert type(made.visual.transformer.resblocks[0].mlp.gelu) is open_clip.transformer.QuickGELU
    clip = Clip(made, open_clip.get_tokenizer(model))
    assert clip.size == 224
    torch.testing.assert_close(clip.mean.flatten(), torch.tensor([0.48145466, 0.4578275, 0.40821073]))
    pictures = images(256, 256)[:1].requires_grad_()
    similarity = clip.image_features(pictures) @ clip.text_features("face")
    similarity.sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum() > 0


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_a_folder_that_asks_to_run_its_own_code_is_refused(remote: bool, tmp_path: Path, empty_cache: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "./", "tokenizer_kwargs": {"trust_remote_code": True}}
    (folder / CONFIG).write_text(json.dumps(config))
    reference = str(folder)
    if remote:
        reference = "memory://hostile-clip"
        fsspec.filesystem("memory").put(str(folder), "/hostile-clip", recursive=True)
    with pytest.raises(WeightsError, match="run code that comes with it"):
        load_clip(reference)
