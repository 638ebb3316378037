"""Optimising the latent of one image under the global CLIP loss; no network is trained (DiffusionCLIP, section 3.1; the
official code's ``clip_latent_optim``)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.diffusion import NoiseModel, walk
from models.finetune import Objective, checkpointed
from models.identity import identity_loss
from models.losses import directional_loss


@dataclass(frozen=True, kw_only=True)
class Iterate:
    """A latent on the way, the image at the end of its walk and the losses of that image."""

    step: int
    """Adam steps so far; 0 is the latent that was given."""
    latent: Tensor
    image: Tensor
    losses: dict[str, float]


def global_loss(edited: Tensor, x0: Tensor, objective: Objective) -> dict[str, Tensor]:
    """Scalars ``loss``, ``clip``, ``l1``, ``similarity`` (and ``identity``) of edited images and their sources, (B, 3, H, W)
    each in about [-1, 1].

    The similarity is the cosine between an image and the target text, in place of that between two changes; the source text plays
    no part.
    """
    tuning = objective.tuning
    similarities = [F.cosine_similarity(clip.image_features(edited), text.target.expand(len(edited), -1)) for clip, text in objective.clips]
    clip_term = torch.stack([directional_loss(similarity, tuning.form) for similarity in similarities]).mean()
    l1_term = F.l1_loss(edited, x0)
    losses = {"clip": clip_term, "l1": l1_term, "similarity": torch.stack(similarities).mean()}
    loss = tuning.clip_weight * clip_term + tuning.l1_weight * l1_term
    if objective.identity is not None and tuning.id_weight:
        losses["identity"] = identity_loss(objective.identity, x0, edited)
        loss = loss + tuning.id_weight * losses["identity"]
    return {"loss": loss, **losses}


def optimize_latent(
    model: NoiseModel, latent: Tensor, x0: Tensor, objective: Objective, *, steps: int = 40, learning_rate: float = 0.02
) -> Iterator[Iterate]:
    """Moves a latent by Adam until its walk down ``objective.path`` ends in an image that fits the target text.

    latent, x0: float32 (B, 3, H, W), both left as they are. Yields ``steps + 1`` iterates, the first of the latent itself;
    the one with the lowest loss need not be the last. Only latents get gradients, whether or not the model's parameters
    ask for them. Raises ValueError for fewer than one step or the memory mode ``stepwise``, which trains a network.
    """
    if steps < 1:
        raise ValueError(f"a latent takes at least 1 step; got {steps}")
    if objective.tuning.memory == "stepwise":
        raise ValueError("a latent is optimised through the whole walk: memory is full or checkpoint; got stepwise")
    called = checkpointed(model) if objective.tuning.memory == "checkpoint" else model
    moving = latent.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([moving], lr=learning_rate)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):  # the last iterate is only looked at
            image = walk(called, moving, objective.path, objective.alpha_bars, objective.order)
            losses = global_loss(image, x0, objective)
        told = {name: value.item() for name, value in losses.items()}
        yield Iterate(step=step, latent=moving.detach().clone(), image=image.detach(), losses=told)
        if step < steps:
            (moving.grad,) = torch.autograd.grad(losses["loss"], moving)
            optimizer.step()
