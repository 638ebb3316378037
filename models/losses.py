"""The terms of the fine-tuning loss (DiffusionCLIP, eq. 9 and 10) and the score that belongs to them."""

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("log", "cosine")


def directional_similarity(before: Tensor, after: Tensor, text_direction: Tensor) -> Tensor:
    """(B,) cosines between the change of image features (B, D) and the text direction (D,); 0 where nothing changed."""
    return F.cosine_similarity(after - before, text_direction.expand_as(after), dim=-1)


def directional_loss(similarity: Tensor, form: str = "log") -> Tensor:
    """Mean over the batch: ``log`` is the official code's -log((1 + cos) / 2), ``cosine`` the paper's 1 - cos (eq. 9)."""
    if form == "cosine":
        return (1 - similarity).mean()
    if form != "log":
        raise ValueError(f"the form of the directional loss is one of {', '.join(FORMS)}; got {form!r}")
    return -torch.log(((1 + similarity) / 2).clamp_min(1e-6)).mean()
