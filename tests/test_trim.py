"""Faint changes of an edit are undone beside strong ones."""

import pytest
import torch
from torch import Tensor

from models.trim import trimmed


def edit(size: int, tint: float, strength: float) -> tuple[Tensor, Tensor]:
    """A source, and an edit that tints all of it and changes its upper left quarter much."""
    source = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) - 0.5
    edited = source + tint
    edited[..., : size // 2, : size // 2] += strength - tint
    return source, edited


@pytest.mark.parametrize("size", [32, 256])
def test_a_tint_is_undone_and_the_edit_itself_stays(size: int) -> None:
    source, edited = edit(size, tint=0.05, strength=0.4)
    after, half = trimmed(edited, source, 0.4), size // 2
    far = half + size // 16  # beyond the squares that see both
    assert torch.equal(after[..., far:], source[..., far:])
    assert torch.equal(after[..., far:, :], source[..., far:, :])
    inner = (..., slice(half - size // 16), slice(half - size // 16))
    assert torch.allclose(after[inner], edited[inner], atol=1e-6)


def test_between_half_of_the_share_and_the_share_a_change_is_undone_in_part() -> None:
    source, edited = edit(32, tint=0.12, strength=0.4)  # 0.3 of the greatest: half way between 0.2 and 0.4
    assert torch.allclose((trimmed(edited, source, 0.4) - source)[..., 20:], torch.tensor(0.06), atol=1e-5)


def test_the_strength_of_an_edit_decides_nothing_and_each_image_is_taken_by_itself() -> None:
    source, edited = edit(32, tint=0.05, strength=0.4)
    weak, strong = source + 0.1 * (edited - source), edited
    together = trimmed(torch.stack([weak[0], strong[1]]), source, 0.4)
    assert torch.allclose(together[0] - source[0], 0.1 * (trimmed(edited, source, 0.4) - source)[0], atol=1e-6)
    assert torch.equal(together[1], trimmed(edited, source, 0.4)[1])


def test_no_share_changes_nothing_and_an_edit_that_changes_nothing_is_the_source() -> None:
    source, edited = edit(32, tint=0.05, strength=0.4)
    assert trimmed(edited, source, 0.0) is edited
    assert torch.equal(trimmed(source.clone(), source, 0.4), source)


def test_a_few_pixels_that_changed_altogether_do_not_make_the_rest_of_the_edit_look_faint() -> None:
    source, edited = edit(32, tint=0.05, strength=0.4)
    edited[..., 6:8, 6:8] = source[..., 6:8, 6:8] + 1.2
    after = trimmed(edited, source, 0.8)
    assert torch.allclose(after[..., :14, :14], edited[..., :14, :14], atol=1e-6)
    assert torch.equal(after[..., 20:], source[..., 20:])
