"""The terms of the fine-tuning loss (DiffusionCLIP, eq. 9 and 10) and the score that belongs to them."""

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("log", "cosine")
DISTANCES = ("l1", "saturating")
SATURATION = 0.25
"""Change of a pixel, as a mean over its channels in [-1, 1], at which the saturating distance has half of its greatest value."""
LEAST_CHANGE = 0.01


def directional_similarity(before: Tensor, after: Tensor, text_direction: Tensor) -> Tensor:
    """(B,) cosines between the change of image features (B, D), of length 1 each, and the text directions, (D,) or
    (B, D).

    A change shorter than ``LEAST_CHANGE`` counts as one of that length, so that none at all is 0 and has a bounded gradient:
    an edit model starts as the base model, and with the reconstruction as reference its first change is exactly 0.
    """
    change = after - before
    length = change.square().sum(-1).clamp_min(LEAST_CHANGE**2).sqrt()
    return (change * F.normalize(text_direction, dim=-1)).sum(-1) / length


def directional_loss(similarity: Tensor, form: str = "log") -> Tensor:
    """Mean over the batch: ``log`` is the official code's -log((1 + cos) / 2), ``cosine`` the paper's 1 - cos (eq. 9)."""
    if form == "cosine":
        return (1 - similarity).mean()
    if form != "log":
        raise ValueError(f"the form of the directional loss is one of {', '.join(FORMS)}; got {form!r}")
    return -torch.log(((1 + similarity) / 2).clamp_min(1e-6)).mean()


def target_lead(features: Tensor, target: Tensor, sources: Tensor, scale: float) -> Tensor:
    """(B,) by how much the target text leads in CLIP's zero-shot choice among the texts: the logarithm of its probability over that of
    all source texts together. features (B, D), target (D,), sources (S, D), all of length 1; ``scale`` is CLIP's own factor on cosines."""
    return scale * features @ target - (scale * features @ sources.T).logsumexp(1)


def choice_loss(before: Tensor, after: Tensor, target: Tensor, sources: Tensor, scale: float, lead: float) -> Tensor:
    """How much edited images (features ``after``) lack of the lead that the target text is to have, mean over the batch.

    It is to lead by ``lead`` times as much as the source texts did in the image that the edit began with (``before``), and more earns
    nothing: 1 asks that CLIP is as sure of the edit as it was of the source, 0 that it is just about read as the target. The directional
    loss asks for the right way and not for its length: a few longer strands follow "short hair" to "long hair" as well as long hair does.
    It is not in the paper. Shapes as for ``target_lead``.
    """
    wanted = -lead * target_lead(before, target, sources, scale)
    return F.relu(wanted.clamp_min(0) - target_lead(after, target, sources, scale)).mean()


def distance(edited: Tensor, reference: Tensor, form: str = "l1") -> Tensor:
    """Scalar distance of images (B, C, H, W): ``l1`` is the official code's mean absolute difference.

    ``saturating`` maps each pixel's mean absolute difference m to (1 + c) m / (m + c), c = ``SATURATION``: 1 for m = 1 as with
    ``l1``, but five times as steep at 0. A tint of the whole picture costs more than under ``l1``, a few pixels that change
    altogether cost no more: an edit is to be strong in one place, not faint in all.
    """
    if form == "l1":
        return F.l1_loss(edited, reference)
    if form != "saturating":
        raise ValueError(f"the distance is one of {', '.join(DISTANCES)}; got {form!r}")
    change = (edited - reference).abs().mean(1)
    return (1 + SATURATION) * (change / (change + SATURATION)).mean()
