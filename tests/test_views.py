"""What would be lost: CLIP's features are averaged over views that are the same before and after an edit."""

import torch
from conftest import TinyDomain

from models.clip import load_clip
from models.views import Views, draw_views, shifted


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_shift_moves_the_picture_and_repeats_its_edge() -> None:
    x = images()
    moved = shifted(x, 1, -2)
    assert torch.equal(moved[..., 1:, :-2], x[..., :-1, 2:])
    assert torch.equal(moved[..., 0, :-2], x[..., 0, 2:])
    assert torch.equal(shifted(x, 0, 0), x)


def test_views_depend_on_the_generator_alone_and_differ_from_each_other() -> None:
    x = images()
    one, again = (draw_views(x, 4, 0.3, torch.Generator().manual_seed(5)).of(x) for _ in range(2))
    assert torch.equal(one, again)
    assert one.shape == (8, 3, 32, 32)
    assert not torch.equal(one[:2], one[2:4])


def test_features_of_one_plain_view_are_those_of_the_image_and_of_two_their_mean(tiny_domain: TinyDomain) -> None:
    clip, x = load_clip(tiny_domain(16).clip), images()
    plain, noisy = torch.zeros_like(x), 0.5 * images(2).flip(0)
    assert torch.allclose(Views(noise=plain[None], shifts=[(0, 0)]).features(clip, x), clip.image_features(x), atol=1e-6)
    both = Views(noise=torch.stack([plain, noisy]), shifts=[(0, 0), (0, 0)]).features(clip, x)
    mean = (clip.image_features(x) + clip.image_features(x + noisy)) / 2
    assert torch.allclose(both, torch.nn.functional.normalize(mean, dim=-1), atol=1e-6)
