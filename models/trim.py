"""Undoing the faint changes of an edit, so that what it is not about stays as it was. Not in the paper."""

import torch.nn.functional as F
from torch import Tensor

WIDE = 9
"""An edit's strength is the mean over a square so many times as wide as the one in which a change is looked at."""


def trimmed(edited: Tensor, source: Tensor, share: float) -> Tensor:
    """Edited images in which each pixel that changed faintly is the source's again; (B, C, H, W) each, any range.

    A fine-tuned network tints: next to the change that was asked for, it changes everything a little. ``share`` in [0, 1] is of the
    edit's strength, the mean change where the image changed most: what changed by more stays, what changed by less than half of it is
    undone, in between it is undone in part. So half the degree trims at half the change, and a faint edit is not taken for a tint. 0 undoes
    nothing. Changes are means over squares of a 32nd of the image's side, one pixel of 32 and nine of 256; the strength is of squares
    ``WIDE`` times as wide, so that a few pixels that changed altogether, white glass before dark skin, do not make the rest look faint.
    """
    if not share:
        return edited
    change = edited - source
    side = edited.shape[-1] // 32 | 1
    size = _mean_over_squares(change.abs().mean(1, keepdim=True), side)
    strength = _mean_over_squares(size, WIDE * side).amax((1, 2, 3), keepdim=True)
    kept = (2 * size / (share * strength).clamp_min(1e-6) - 1).clamp(0, 1)
    return source + kept * change


def _mean_over_squares(images: Tensor, side: int) -> Tensor:
    """The mean over the square of odd ``side`` around each pixel, as far as it lies in the image."""
    return F.avg_pool2d(images, side, 1, side // 2, count_include_pad=False) if side > 1 else images
