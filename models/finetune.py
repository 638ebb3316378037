"""Fine-tuning a copy of the base model for one attribute, as a generator: the caller logs, checkpoints and stops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip import Clip
from models.diffusion import walk
from models.losses import directional_loss, directional_similarity
from models.recipe import Tuning


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an edit must achieve: the text direction as ``clip`` sees it, at the end of the walk down ``path``."""

    clip: Clip
    direction: Tensor
    """(D,) of length 1."""
    path: list[int]
    alpha_bars: Tensor
    order: int
    tuning: Tuning


def edit_loss(model: nn.Module, latents: Tensor, x0: Tensor, objective: Objective) -> dict[str, Tensor]:
    """Scalars ``loss``, ``clip``, ``l1``, ``similarity`` of a batch of latents and their source images, (B, C, H, W) each.

    Gradients flow through every step of the walk (the official code's ``clip_finetune``).
    """
    tuning = objective.tuning
    edited = walk(model, latents, objective.path, objective.alpha_bars, objective.order)
    with torch.no_grad():
        before = objective.clip.image_features(x0)
    similarity = directional_similarity(before, objective.clip.image_features(edited), objective.direction)
    clip_term, l1_term = directional_loss(similarity, tuning.form), F.l1_loss(edited, x0)
    loss = tuning.clip_weight * clip_term + tuning.l1_weight * l1_term
    return {"loss": loss, "clip": clip_term, "l1": l1_term, "similarity": similarity.mean()}


def make_optimizer(model: nn.Module, tuning: Tuning) -> torch.optim.Optimizer:
    """Adam with its usual betas and no weight decay, as in the paper."""
    return torch.optim.Adam(model.parameters(), lr=tuning.learning_rate)


def finetune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    latents: Tensor,
    x0: Tensor,
    objective: Objective,
    *,
    start_epoch: int = 0,
    average_gradients: Callable[[nn.Module], None] = lambda model: None,
) -> Iterator[dict[str, float]]:
    """Trains ``model`` in place; yields the losses of each step with its ``epoch`` and ``step``.

    latents, x0: float32 (N, C, H, W) on the model's device. The order of images in an epoch depends on the seed and the
    epoch alone, so a run resumed at ``start_epoch`` with the optimizer's state goes on as if it had never stopped.
    ``average_gradients`` is called between backward and step, for several workers.
    """
    tuning = objective.tuning
    per_epoch = -(-len(latents) // tuning.batch)
    for epoch in range(start_epoch, tuning.epochs):
        for group in optimizer.param_groups:
            group["lr"] = tuning.learning_rate * tuning.learning_rate_growth**epoch
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(tuning.seed * 1_000_003 + epoch))
        for i, rows in enumerate(order.to(latents.device).split(tuning.batch)):
            losses = edit_loss(model, latents[rows], x0[rows], objective)
            optimizer.zero_grad()
            losses["loss"].backward()
            average_gradients(model)
            optimizer.step()
            yield {"epoch": epoch, "step": epoch * per_epoch + i + 1, **{k: v.item() for k, v in losses.items()}}
