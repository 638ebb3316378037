"""Scores of single images, so that every row of a dataset carries its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from models.clip import Clip
from models.losses import directional_similarity

Direction = Callable[[Tensor], Tensor]
"""Features of images before an edit (B, D) -> text directions (B, D): a ``models.clip.TextDirection`` or a mean of some."""


def mean_absolute_error(a: Tensor, b: Tensor) -> Tensor:
    """(B,) mean absolute difference of images (B, C, H, W) in [-1, 1], in units of a picture in [0, 1]."""
    return (a - b).abs().flatten(1).mean(1) / 2


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """(B,) SSIM with torchmetrics' defaults (Gaussian window, sigma 1.5) over the range of 2; (B, C, H, W) in [-1, 1]."""
    scores = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
    assert isinstance(scores, Tensor)
    return scores.reshape(len(a))


@torch.no_grad()
def directional_score(clip: Clip, source: Tensor, edited: Tensor, direction: Direction) -> Tensor:
    """(B,) cosine between the change of CLIP image features and the text direction (the paper's S_dir)."""
    before = clip.image_features(source)
    return directional_similarity(before, clip.image_features(edited), direction(before))
