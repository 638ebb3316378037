"""Fine-tuning a copy of the base model for one attribute, as a generator: the caller logs, checkpoints and stops."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip import Clip
from models.diffusion import walk
from models.losses import FORMS, directional_loss, directional_similarity


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The numbers of the fine-tuning run. The loss is clip_weight * directional + l1_weight * L1 (DiffusionCLIP, eq. 10)."""

    epochs: int = 6
    batch: int = 8
    learning_rate: float = 5e-5
    learning_rate_growth: float = 1.0
    """Factor after each epoch; the official code grows the rate by 1.3."""
    steps_down: int = 6
    """Rungs of the walk that gradients flow through (S_gen of training)."""
    clip_weight: float = 3.0
    l1_weight: float = 1.0
    form: str = "log"
    images: int = 48
    """At most this many latents are used."""
    seed: int = 0

    def problems(self) -> list[str]:
        """Sentences that say what is impossible about these numbers; empty if nothing is."""
        found = []
        for name, least in (("epochs", 1), ("batch", 1), ("steps_down", 2), ("images", 1)):
            if getattr(self, name) < least:
                found.append(f"{name.replace('_', ' ')} must be at least {least}; got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            found.append(f"the learning rate must lie between 0 and 1; got {self.learning_rate}")
        if min(self.clip_weight, self.l1_weight) < 0 or self.clip_weight == self.l1_weight == 0:
            found.append(f"loss weights must not be negative nor all 0; got clip {self.clip_weight}, l1 {self.l1_weight}")
        if self.form not in FORMS:
            found.append(f"the form of the directional loss is one of {', '.join(FORMS)}; got {self.form!r}")
        return found

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})


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
