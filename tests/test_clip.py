"""What would be lost: features that CLIP itself would give, for pictures of any size, with gradients."""

from pathlib import Path

import pytest
import torch
from tiny import save_clip
from torch import Tensor

from models.clip import TEMPLATES, Clip, load_clip

UNKNOWN = ("smiling", "eyeglasses")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(save_clip(tmp_path_factory.mktemp("clip") / "clip", UNKNOWN))


def images(*size: int) -> Tensor:
    return torch.rand((2, 3, *size), generator=torch.Generator().manual_seed(0)) * 2 - 1


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


def test_the_statistics_of_the_folder_are_used(clip: Clip) -> None:
    torch.testing.assert_close(clip.mean.flatten(), torch.full((3,), 0.5))
    torch.testing.assert_close(clip.std.flatten(), torch.full((3,), 0.5))


@pytest.mark.parametrize("size", [(16, 16), (32, 32)])
def test_gradients_reach_the_picture_and_no_weight(clip: Clip, size: tuple[int, int]) -> None:
    pictures = images(*size).requires_grad_()
    clip.image_features(pictures)[:, 0].sum().backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())


def test_a_text_is_the_mean_of_its_eighty_templates(clip: Clip) -> None:
    assert len(TEMPLATES) == 80
    each = []
    for template in TEMPLATES:
        features = clip.model.encode_text(clip.tokenizer([template.replace("{}", "hat")]))[0]
        each.append(features / features.norm())
    mean = torch.stack(each).mean(0)
    got = clip.text_features("hat")
    torch.testing.assert_close(got, mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert not got.requires_grad


def test_the_direction_leads_from_the_source_to_the_target(clip: Clip) -> None:
    direction = clip.text_direction("face", "face with a hat")
    change = clip.text_features("face with a hat") - clip.text_features("face")
    torch.testing.assert_close(direction, change / change.norm())
    torch.testing.assert_close(clip.text_direction("face with a hat", "face"), -direction)


def test_words_without_a_trained_token_are_found_whatever_their_case_and_company(clip: Clip) -> None:
    assert clip.unknown_words("Smiling face, without eyeglasses!") == ["smiling", "eyeglasses"]
    assert clip.unknown_words("a dark-skinned face with a hat") == []
    assert clip.unknown_words("") == []


def test_a_clip_with_all_its_words_knows_any_text(tmp_path: Path) -> None:
    assert load_clip(save_clip(tmp_path / "whole")).unknown_words("smiling zebra, xylophone 3") == []
