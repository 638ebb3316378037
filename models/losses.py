"""The terms of the fine-tuning loss (DiffusionCLIP, eq. 9 and 10) and the score that belongs to them."""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("log", "cosine")
DISTANCES = ("l1", "saturating")
SATURATION = 0.25
"""Change of a pixel, as a mean over its channels in [-1, 1], at which the saturating distance has half of its greatest value."""
LEAST_CHANGE = 0.01
SURE = 0.7
"""Share of the choice at which an image is read as the target text, and the loss asks for no more."""


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


def choice_loss(after: Tensor, target: Tensor, sources: Tensor, scale: float) -> Tensor:
    """How badly CLIP's zero-shot choice among the texts takes edited images for the target text, mean over the batch: the cross-entropy
    above that of a choice that is ``SURE``, 0 for an image that is read as the target.

    after (B, D), target (D,), sources (S, D), all of length 1; ``scale`` is CLIP's own factor on cosines. The directional loss asks for
    the right way and not for its length: a few longer strands follow "short hair" to "long hair" as well as long hair does. This one asks
    that the edited image is read as the target. It is not in the paper.
    """
    logits = scale * after @ torch.cat([target[None], sources]).T
    entropy = F.cross_entropy(logits, torch.zeros(len(after), dtype=torch.long, device=after.device), reduction="none")
    return F.relu(entropy + log(SURE)).mean()


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
