"""What would be lost: scores that mean what their column says, one for each row."""

import pytest
import torch
from tiny import save_clip
from torch import Tensor

from models.clip import load_clip
from models.metrics import directional_score, mean_absolute_error, structural_similarity


def images(seed: int, count: int = 3, side: int = 16) -> Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def flat(value: float) -> Tensor:
    return torch.full((1, 3, 16, 16), value)


def test_the_error_is_in_units_of_a_picture_from_zero_to_one() -> None:
    assert mean_absolute_error(flat(-1.0), flat(1.0)).tolist() == [1.0]
    assert mean_absolute_error(flat(0.5), flat(0.1)).item() == pytest.approx(0.2)
    half = flat(0.0)
    half[..., :8] = 1.0
    assert mean_absolute_error(half, flat(0.0)).item() == pytest.approx(0.25)


def test_similarity_of_flat_pictures_is_what_the_formula_gives_by_hand() -> None:
    c1 = (0.01 * 2) ** 2  # no variance, so only the brightness term is left
    want = (2 * 0.5 * 0.1 + c1) / (0.5**2 + 0.1**2 + c1)
    assert structural_similarity(flat(0.5), flat(0.1)).item() == pytest.approx(want, rel=1e-4)
    assert structural_similarity(flat(0.5), flat(-0.5)).item() == pytest.approx((-0.5 + c1) / (0.5 + c1), rel=1e-4)


@pytest.mark.parametrize("score", [mean_absolute_error, structural_similarity])
def test_every_row_has_its_own_score_and_the_order_of_the_two_does_not_matter(score: object) -> None:
    assert callable(score)
    a, b = images(0), images(1)
    rows = score(a, b)
    assert rows.shape == (3,)
    for row in range(3):
        torch.testing.assert_close(score(a[row : row + 1], b[row : row + 1]), rows[row : row + 1])
    torch.testing.assert_close(score(b, a), rows)


def test_a_picture_is_like_itself_and_less_like_a_noisier_copy() -> None:
    a = images(0)
    torch.testing.assert_close(structural_similarity(a, a), torch.ones(3))
    assert (mean_absolute_error(a, a) == 0).all()
    little, much = (structural_similarity(a, a.lerp(images(1), amount)) for amount in (0.1, 0.5))
    assert (much < little).all()
    assert (little < 1).all()


def test_the_directional_score_is_the_cosine_in_the_space_of_clip(tmp_path: object) -> None:
    clip = load_clip(save_clip(tmp_path / "clip"))  # type: ignore[operator]
    source, edited, direction = images(0), images(1), clip.text_direction("face", "smiling face")
    change, way = clip.image_features(edited) - clip.image_features(source), clip.text_features("smiling face") - clip.text_features("face")
    want = (change @ way) / change.norm(dim=1) / way.norm()
    torch.testing.assert_close(directional_score(clip, source, edited, direction), want)
    assert directional_score(clip, source, source, direction).tolist() == [0, 0, 0]
