"""Fine-tuning a copy of the base model for one attribute, as a generator: the caller logs, checkpoints and stops."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.clip import Clip, TextDirection
from models.diffusion import NoiseModel, moves, predicted_x0, walk
from models.identity import Identity, identity_loss
from models.losses import choice_loss, directional_loss, directional_similarity, distance
from models.recipe import Tuning
from models.views import draw_views


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What an edit must achieve, at the end of the walk down ``path``."""

    clips: tuple[tuple[Clip, TextDirection], ...]
    """One or more CLIPs, each with the text direction as it sees it; their losses are averaged."""
    path: list[int]
    alpha_bars: Tensor
    order: int
    tuning: Tuning
    identity: Identity | None = None
    """Needed if the tuning weighs an identity loss."""
    draw: torch.Generator | None = None
    """Where the views of an image come from; without it CLIP sees the images themselves."""

    def __post_init__(self) -> None:
        if self.tuning.id_weight and self.identity is None:
            raise ValueError("a tuning with an identity weight needs a network that recognises faces")


# ---- the loss --------------------------------------------------------------------------------------------------------


def image_loss(edited: Tensor, reference: Tensor, objective: Objective) -> dict[str, Tensor]:
    """Scalars ``loss``, ``clip``, ``l1``, ``similarity`` (``choice``, ``identity``) of edited images and what they are compared
    with, (B, 3, H, W) each in about [-1, 1] (DiffusionCLIP, eq. 10)."""
    tuning, similarities, terms, choices = objective.tuning, [], [], []
    l1_term = distance(edited, reference, tuning.distance)
    views = draw_views(reference, tuning.views, tuning.view_noise, objective.draw) if objective.draw is not None else None
    for clip, direction in objective.clips:
        look = partial(views.features, clip) if views is not None else clip.image_features
        with torch.no_grad():
            before = look(reference)
        after = look(edited)
        similarities.append(directional_similarity(before, after, direction(before)))
        terms.append(directional_loss(similarities[-1], tuning.form))
        if tuning.choice_weight:
            choices.append(choice_loss(before, after, direction.target, direction.sources, clip.scale, tuning.choice_lead))
    clip_term = torch.stack(terms).mean()
    losses = {"clip": clip_term, "l1": l1_term, "similarity": torch.stack(similarities).mean().detach()}
    loss = tuning.clip_weight * clip_term + tuning.l1_weight * l1_term
    if choices:
        losses["choice"] = torch.stack(choices).mean()
        loss = loss + tuning.choice_weight * losses["choice"]
    if objective.identity is not None and tuning.id_weight:
        losses["identity"] = identity_loss(objective.identity, reference, edited)
        loss = loss + tuning.id_weight * losses["identity"]
    return {"loss": loss, **losses}


def edit_losses(model: NoiseModel, latents: Tensor, reference: Tensor, objective: Objective) -> Iterator[dict[str, Tensor]]:
    """The losses of one batch that each want a backward pass and an optimizer step, by ``tuning.memory``.

    ``full`` and ``checkpoint``: one, of the image at the end of the walk; gradients flow through every step (the official
    code's ``clip_finetune``). ``stepwise``: one a step, of the x0 predicted there; between steps the graph is cut (its
    ``clip_finetune_eff``). There the identity loss looks at the predicted x0 as well; in the official code it looks at
    the noisy next x, which gives the network no gradient.
    """
    if objective.tuning.memory == "stepwise":
        for move in moves(model, latents, objective.path, objective.alpha_bars, objective.order, detached=True):
            yield image_loss(predicted_x0(move.x, move.noise, move.alpha_bar), reference, objective)
        return
    if objective.tuning.memory == "checkpoint":
        model = checkpointed(model)
    yield image_loss(walk(model, latents, objective.path, objective.alpha_bars, objective.order), reference, objective)


def checkpointed(model: NoiseModel) -> NoiseModel:
    """The same model and the same gradients; what a call needs for them is computed again instead of kept."""

    def called(x: Tensor, t: Tensor) -> Tensor:
        result = checkpoint(model, x, t, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result

    return called


@torch.no_grad()
def references(model: NoiseModel, latents: Tensor, x0: Tensor, objective: Objective) -> Tensor:
    """What edited images are compared with, (N, 3, H, W): x0 itself, or its reconstruction by the base ``model`` along
    the rungs of the training, by ``tuning.reference``."""
    if objective.tuning.reference == "source":
        return x0
    parts = latents.split(objective.tuning.batch)
    return torch.cat([walk(model, part, objective.path, objective.alpha_bars, objective.order) for part in parts])


@torch.no_grad()
def lacking(x0: Tensor, objective: Objective, count: int) -> Tensor:
    """int64 (count,): which images (N, C, H, W) lack the attribute most, as the first CLIP sees it, in order.

    Many images may show the attribute already; trained on them, a model learns to change something else. With one source text these
    are the images farthest from the target text, seen from the source text. With several, the images of each are ranked by themselves
    and taken in turn, so that no kind of change crowds out the others, and those that the target text describes best come last.
    """
    clip, direction = objective.clips[0]
    features = torch.cat([clip.image_features(part) for part in x0.split(objective.tuning.batch)])
    shown, sources = (features * direction(features)).sum(1), features @ direction.sources.T
    if len(direction.sources) == 1:
        return shown.argsort()[:count].sort().values
    place = len(x0) * (features @ direction.target > sources.amax(1)).long()
    kind = sources.argmax(1)
    for own in kind.unique():
        place[kind == own] += shown[kind == own].argsort().argsort()
    return place.argsort(stable=True)[:count].sort().values


@torch.no_grad()
def similarity_of(model: NoiseModel, latents: Tensor, reference: Tensor, objective: Objective) -> float:
    """Mean directional similarity that the model reaches on latents (N, C, H, W) it may never have seen."""
    total = 0.0
    for part, before in zip(latents.split(objective.tuning.batch), reference.split(objective.tuning.batch), strict=True):
        edited = walk(model, part, objective.path, objective.alpha_bars, objective.order)
        total += float(image_loss(edited, before, objective)["similarity"]) * len(part)
    return total / len(latents)


# ---- the state -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Training:
    """Everything that a run changes; ``state_dict`` is a checkpoint from which it goes on as if it had never stopped."""

    model: nn.Module
    """Its parameters that require gradients are trained."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss where float16 would lose small gradients; else it does nothing."""
    average: dict[str, Tensor] | None = None
    """Moving average of the trained parameters."""
    epoch: int = 0
    """Finished epochs."""
    best: dict[str, Tensor] | None = None
    """The trained parameters of the epoch with the best held-out similarity."""
    best_similarity: float = float("-inf")
    best_epoch: int = 0
    done: bool = False
    taken: int = 0
    """Optimizer steps that changed the parameters: all, but for those of float16 whose gradients overflowed."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, so that it can be loaded without running code."""
        return {
            "trained": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **{name: getattr(self, name) for name in _STATE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Tensors may be on any device; load them to the CPU, where Adam counts its steps. Raises KeyError if the state is of
        other parameters."""
        self.put(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in _STATE:
            setattr(self, name, state[name])
        self.average, self.best = self._beside(self.average), self._beside(self.best)

    def _beside(self, values: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Values on the devices of their parameters."""
        return values and {name: values[name].to(parameter.device) for name, parameter in self.trained.items()}

    def set_rate(self, tuning: Tuning) -> None:
        """For the next optimizer step: the epoch's rate, during the warm-up a growing share of it."""
        share = min(1.0, (self.taken + 1) / (tuning.warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = share * tuning.learning_rate * tuning.learning_rate_growth**self.epoch

    def update_average(self, decay: float) -> None:
        """After step n the decay is at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage: a run of some dozen
        steps would otherwise keep the weights that it began with."""
        if self.average is not None:
            decay = min(decay, (1 + self.taken) / (10 + self.taken))
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged parameters, if there are any, for as long as the context lasts."""
        if self.average is None:
            yield
            return
        kept = clones(self.trained)
        self.put(self.average)
        try:
            yield
        finally:
            self.put(kept)

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    def finish(self) -> None:
        """Leaves in the model what is to be saved: the best epoch's parameters, or the average, or the last."""
        final = self.best if self.best is not None else self.average
        if final is not None:
            self.put(final)

    @property
    def saved_epoch(self) -> int:
        """The epoch whose parameters ``finish`` leaves, counted from 1."""
        return self.epoch if self.best is None else self.best_epoch


_STATE = ("average", "epoch", "best", "best_similarity", "best_epoch", "done", "taken")
FIRST_SCALE = 2.0**12
"""Of a float16 loss. torch's own, 2^16, overflows at the start, and each overflow costs a step of a run that may have a few dozen."""


def clones(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def start_training(model: nn.Module, tuning: Tuning, device: str = "cpu", precision: str = "float32") -> Training:
    """Adam with its usual betas and no weight decay over the parameters that require gradients, as in the paper.

    The model's convolutions get the layout in memory in which they are faster.
    """
    model = model.to(memory_format=torch.channels_last)
    training = Training(
        model=model,
        optimizer=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=tuning.learning_rate),
        scaler=torch.amp.GradScaler(device, init_scale=FIRST_SCALE, enabled=precision == "float16"),
    )
    if tuning.ema:
        training.average = clones(training.trained)
    return training


# ---- the run ---------------------------------------------------------------------------------------------------------

Average = Callable[[Iterable[Tensor]], None]
"""Replaces tensors by their means over all workers, in place."""


def alone(tensors: Iterable[Tensor]) -> None:
    """The mean over one worker."""


def finetune(
    training: Training,
    latents: Tensor,
    reference: Tensor,
    objective: Objective,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    average: Average = alone,
) -> Iterator[dict[str, float]]:
    """Trains ``training.model`` in place; yields the losses of each optimizer step with its ``epoch`` and ``step``.

    latents, reference: float32 (N, C, H, W) on the model's device; ``held_out``: another such pair. The order of images in
    an epoch depends on the seed and the epoch alone, so that a run whose state was loaded from a checkpoint after any
    epoch goes on as if it had never stopped. The last step of an epoch yields ``epoch_done`` 1 and, with held-out images,
    ``held_out``: their directional similarity. ``average`` is called on gradients before each step, for several workers.
    Raises ArithmeticError if a loss is not finite, or if float16 gradients overflow in every step of an epoch.
    """
    tuning = objective.tuning
    steps = steps_per_epoch(len(latents), tuning, objective.path)
    while training.epoch < tuning.epochs and not training.done:
        epoch, taken = training.epoch, training.taken
        for i, losses in enumerate(_epoch(training, latents, reference, objective, average)):
            told = {"epoch": epoch, "step": epoch * steps + i + 1, **losses, "epoch_done": float(i + 1 == steps)}
            if told["epoch_done"]:
                if training.taken == taken:
                    raise ArithmeticError(f"the gradients overflowed in every step of epoch {epoch + 1}; use bfloat16 or float32")
                training.epoch += 1
                if held_out is not None:
                    told["held_out"] = _judge_epoch(training, held_out, objective, average)
            yield told


def steps_per_epoch(images: int, tuning: Tuning, path: Sequence[int]) -> int:
    """Optimizer steps: one a group of ``batch * accumulate`` images, or with ``stepwise`` one for each step of its walk."""
    return -(-images // (tuning.batch * tuning.accumulate)) * _steps_per_group(tuning, path)


def _steps_per_group(tuning: Tuning, path: Sequence[int]) -> int:
    return len(path) - 1 if tuning.memory == "stepwise" else 1


def _epoch(training: Training, latents: Tensor, reference: Tensor, objective: Objective, average: Average) -> Iterator[dict[str, float]]:
    tuning = objective.tuning
    shuffled = torch.Generator().manual_seed(tuning.seed * 1_000_003 + training.epoch)
    order = torch.randperm(len(latents), generator=shuffled).to(latents.device)
    if tuning.views > 1:
        objective = replace(objective, draw=shuffled)
    for group in order.split(tuning.batch * tuning.accumulate):
        batches = group.split(tuning.batch)
        shares = [len(rows) / len(group) for rows in batches]
        losses = [edit_losses(training.model, latents[rows], reference[rows], objective) for rows in batches]
        for _ in range(_steps_per_group(tuning, objective.path)):
            training.set_rate(tuning)
            yield _optimize(training, zip(losses, shares, strict=True), average, tuning.ema)


def _optimize(
    training: Training, batches: Iterable[tuple[Iterator[dict[str, Tensor]], float]], average: Average, decay: float
) -> dict[str, float]:
    """One optimizer step on the next losses of every batch, weighted by its share; one graph in memory at a time. Raises
    ArithmeticError for a loss that is not finite, which no further step would mend."""
    training.optimizer.zero_grad()
    sums: dict[str, float] = {}
    for losses, share in batches:
        now = next(losses)
        training.scaler.scale(share * now["loss"]).backward()
        sums = {name: sums.get(name, 0.0) + share * value.item() for name, value in now.items()}
    if not isfinite(sums["loss"]):
        rate = training.optimizer.param_groups[0]["lr"]
        raise ArithmeticError(
            f"the loss is not finite in epoch {training.epoch + 1} at learning rate {rate:g}; lower the rate or its growth, or use float32"
        )
    average(p.grad for p in training.trained.values() if p.grad is not None)
    scale = training.scaler.get_scale()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.scaler.get_scale() >= scale:  # a smaller one means that the step was left out
        training.taken += 1
        training.update_average(decay)
    return sums


def _judge_epoch(training: Training, held_out: tuple[Tensor, Tensor], objective: Objective, average: Average) -> float:
    """The held-out similarity after an epoch; remembers the best parameters and decides whether to stop."""
    tuning = objective.tuning
    with training.averaged():
        mean = torch.tensor(similarity_of(training.model, *held_out, objective), device=held_out[0].device)
        average([mean])
        similarity = mean.item()
        if tuning.patience and similarity > training.best_similarity:
            training.best = clones(training.trained)
        if similarity > training.best_similarity:
            training.best_similarity, training.best_epoch = similarity, training.epoch
    waited = training.epoch - training.best_epoch
    training.done = bool(tuning.patience and waited >= tuning.patience) or (tuning.stop_at is not None and similarity >= tuning.stop_at)
    return similarity
