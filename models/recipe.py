"""Every number that decides a walk, and every number that decides a fine-tuning run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from torch import Tensor

from models.diffusion import SPACINGS, path_down, path_up
from models.losses import DISTANCES, FORMS

ORDERS = {"ddim": 1, "ab2": 2}
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
INVERSIONS = ("deterministic", "stochastic")
REFERENCES = ("source", "reconstruction")
MEMORY = ("full", "checkpoint", "stepwise")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How far up, on which rungs, with which solver. The defaults are the project's; ``PAPER`` the paper's."""

    return_step: int = 400
    """t0: the timestep of the latent; larger changes more."""
    steps_up: int = 20
    steps_down: int = 20
    solver: str = "ab2"
    """``ddim`` (order 1) or ``ab2`` (order 2, two-step Adams-Bashforth); one model call a step either way. Of deterministic walks;
    fresh noise (``eta``) makes the way down one of order 1."""
    spacing: str = "sigma"
    """Of the ladder: ``linspace`` (the official code's) or ``sigma``."""
    precision: str = "float32"
    """Of the network's arithmetic; the state of the walk is float32 always."""
    inversion: str = "deterministic"
    """``deterministic`` walks up with the base model; ``stochastic`` adds fresh noise in one stroke: no model calls, but the
    way back does not lead to the same image."""
    eta: float = 0.0
    """Share of fresh noise on the way down: 0 is deterministic, 1 is DDPM."""
    projections: int = 0
    """How often an image of an unseen domain is noised and walked down with the base model before it is inverted."""
    projection_step: int = 500
    """Return step of the projections."""
    projection_steps: int = 6
    """Rungs of each projection; the official code has 6."""
    trim: float = 0.0
    """Of an edit, changes fainter than this share of its strength are undone (``models.trim``); 0 undoes none. A mix is not trimmed, since
    its fainter part would be taken for a tint, nor an image that was projected, which is to resemble the domain and not its source."""
    class_label: int | None = None
    """For class-conditional base models; None lets the label contribute nothing, as the official code does."""
    seed: int = 0
    """Of fresh noise, together with the row's id: a row's pixels do not depend on its company."""

    def problems(self, timesteps: int = 1000) -> list[str]:
        """Sentences that say what is impossible about these numbers; empty if nothing is."""
        found = []
        if not 1 <= self.return_step < timesteps:
            found.append(f"the return step must lie between 1 and {timesteps - 1}; got {self.return_step}")
        most = timesteps if found else self.return_step + 1
        for name in ("steps_up", "steps_down"):
            if not 2 <= getattr(self, name) <= most:
                found.append(f"{name.replace('_', ' ')} must lie between 2 and {most} (return step + 1); got {getattr(self, name)}")
        for name, allowed in (("solver", ORDERS), ("spacing", SPACINGS), ("precision", PRECISIONS), ("inversion", INVERSIONS)):
            if getattr(self, name) not in allowed:
                found.append(f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        return found + self._noise_problems(timesteps)

    def _noise_problems(self, timesteps: int) -> list[str]:
        found = []
        if not 0 <= self.eta <= 1:
            found.append(f"eta must lie between 0 (deterministic) and 1 (DDPM); got {self.eta}")
        if not 0 <= self.trim < 1:
            found.append(f"trim must lie between 0 (every change stays) and 1; got {self.trim}")
        if self.projections < 0:
            found.append(f"projections must not be negative; got {self.projections}")
        if self.projections and not 1 <= self.projection_step < timesteps:
            found.append(f"the projection step must lie between 1 and {timesteps - 1}; got {self.projection_step}")
        elif self.projections and not 2 <= self.projection_steps <= self.projection_step + 1:
            found.append(f"projection steps must lie between 2 and {self.projection_step + 1}; got {self.projection_steps}")
        if self.class_label is not None and self.class_label < 0:
            found.append(f"the class label must not be negative; got {self.class_label}")
        return found

    @property
    def order(self) -> int:
        return ORDERS[self.solver]

    def up(self, alpha_bars: Tensor) -> list[int]:
        return path_up(self.return_step, self.steps_up, self.spacing, alpha_bars)

    def down(self, alpha_bars: Tensor) -> list[int]:
        return path_down(self.return_step, self.steps_down, self.spacing, alpha_bars)

    def projection(self, alpha_bars: Tensor) -> list[int]:
        """The rungs of one projection: down from its own return step."""
        return path_down(self.projection_step, self.projection_steps, self.spacing, alpha_bars)

    @property
    def trim_of_edits(self) -> float:
        """The share that edits are trimmed by."""
        return 0.0 if self.projections else self.trim

    @property
    def calls_up(self) -> int:
        """Model calls an image on the way up, projections included."""
        walked = self.steps_up - (self.spacing == "linspace") if self.inversion == "deterministic" else 0
        return walked + self.projections * self.projection_steps

    @property
    def calls_down(self) -> int:
        """Model calls an image and model on the way down."""
        return self.steps_down

    @property
    def has_noise(self) -> bool:
        """Whether fresh noise enters anywhere, so that the seed decides something."""
        return bool(self.eta or self.projections or self.inversion == "stochastic")

    def of_latent(self) -> dict[str, Any]:
        """What an edit of latents must have in common with the recipe that made them. Solver, spacing and seed made them too, but
        the way down may have others."""
        names = ["return_step", "steps_up", "class_label", "inversion", "projections"]
        if self.projections:
            names += ["projection_step", "projection_steps"]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``; raises ValueError for a name that is no part of a recipe."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))} is no part of a recipe; it has {', '.join(f.name for f in fields(cls))}")
        return cls(**values)


PAPER = Recipe(return_step=400, steps_up=200, steps_down=40, solver="ddim", spacing="linspace")
"""The test recipe of DiffusionCLIP (CVPR 2022): S_for = 200, S_gen = 40; 239 model calls."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The numbers of the fine-tuning run. The loss is clip_weight * directional + l1_weight * L1 + id_weight * identity
    (DiffusionCLIP, eq. 10), and choice_weight * choice beside it."""

    epochs: int = 6
    batch: int = 8
    """Images of one backward pass."""
    accumulate: int = 1
    """Batches whose gradients are added up before the optimizer steps."""
    learning_rate: float = 5e-5
    learning_rate_growth: float = 1.0
    """Factor after each epoch; the official code grows the rate by 1.3."""
    warmup: int = 0
    """Optimizer steps before the rate is reached; it grows evenly until then."""
    steps_down: int = 6
    """Rungs of the walk that gradients flow through (S_gen of training)."""
    clip_weight: float = 3.0
    l1_weight: float = 1.0
    id_weight: float = 0.0
    """Of the identity loss, which needs the weights of a face recognition network."""
    choice_weight: float = 0.0
    """Of CLIP's choice: what the target text lacks of its wanted lead over the source texts, seen from the edited image."""
    choice_lead: float = 0.5
    """The wanted lead, as a multiple of the one that the source texts have in the image before the edit."""
    distance: str = "l1"
    """What ``l1_weight`` weighs: ``l1`` (the official code's), or ``saturating``, under which a faint change of everything costs
    more than a strong one of a few pixels."""
    form: str = "log"
    reference: str = "source"
    """What the edited image is compared with: the ``source`` (the official code's) or its ``reconstruction`` by the base
    model along the same few rungs, so that their blur is not taken for the edit."""
    memory: str = "full"
    """``full`` keeps every activation of the walk, ``checkpoint`` computes them again (same gradients), ``stepwise`` trains
    on the predicted x0 of every step by itself (the paper's GPU-efficient fine-tuning)."""
    rank: int | None = None
    """Of low-rank weights on every convolution and linear layer; None trains the network itself."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is saved in their place; 0 saves the weights themselves."""
    images: int = 48
    """At most this many latents are used for training."""
    choose_from: int = 0
    """If more than ``images``: so many latents are looked at, and those trained on that lack the attribute most, by the CLIPs."""
    views: int = 1
    """If more than 1: CLIP sees so many noisy, shifted views of each image, and their mean features count."""
    view_noise: float = 0.3
    """Most noise of a view, as a standard deviation of pixels in [-1, 1]."""
    held_out: int = 0
    """Further latents that are never trained on, to measure the directional similarity on after each epoch."""
    patience: int = 0
    """Stop after so many epochs without a better held-out similarity, and keep the best; 0 never stops for this."""
    stop_at: float | None = None
    """Stop after the first epoch that reaches this held-out similarity."""
    seed: int = 0

    def problems(self) -> list[str]:
        """Sentences that say what is impossible about these numbers; empty if nothing is."""
        found = []
        least_of = {"epochs": 1, "batch": 1, "accumulate": 1, "steps_down": 2, "images": 1, "views": 1}
        least_of |= {"warmup": 0, "choose_from": 0, "held_out": 0, "patience": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                found.append(f"{name.replace('_', ' ')} must be at least {least}; got {getattr(self, name)}")
        if not 0 < self.learning_rate < 1:
            found.append(f"the learning rate must lie between 0 and 1; got {self.learning_rate}")
        if not 0 < self.learning_rate_growth < 10:
            found.append(f"the growth of the learning rate must lie between 0 and 10 (1 = constant); got {self.learning_rate_growth}")
        weights = (self.clip_weight, self.l1_weight, self.id_weight, self.choice_weight)
        if not all(0 <= w < float("inf") for w in weights) or not any(weights):
            found.append("loss weights must not be negative nor all 0; got clip {}, l1 {}, id {}, choice {}".format(*weights))
        for name, allowed in (("form", FORMS), ("distance", DISTANCES), ("reference", REFERENCES), ("memory", MEMORY)):
            if getattr(self, name) not in allowed:
                found.append(f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.rank is not None and not 1 <= self.rank <= 256:
            found.append(f"the rank of low-rank weights must lie between 1 and 256; got {self.rank}")
        if not 0 <= self.view_noise <= 2:
            found.append(f"the noise of views must lie between 0 and 2; got {self.view_noise}")
        if not 0 <= self.choice_lead <= 2:
            found.append(f"the lead of the choice must lie between 0 and 2; got {self.choice_lead}")
        if not 0 <= self.ema < 1:
            found.append(f"the decay of the moving average must lie between 0 and 1; got {self.ema}")
        if (self.patience or self.stop_at is not None) and not self.held_out:
            found.append("stopping early needs images to measure it on: give held_out as well")
        return found


LOW_RANK_RATE = 20.0
"""Learning rate of low-rank weights over that of the whole network. Measured on the embedded domain only: rank 8 at 1e-3 beside the full
network at 5e-5 (benchmarks/deviations.py)."""


def retuned(tuning: Tuning, given: Mapping[str, Any]) -> Tuning:
    """``tuning`` with what is given. Where that asks for low-rank weights of a tuning made for the whole network, and for no learning
    rate, the rate is ``LOW_RANK_RATE`` times as high: adapters start at zero and would hardly move at the other's."""
    made = replace(tuning, **given)
    if made.rank is None or tuning.rank is not None or "learning_rate" in given:
        return made
    return replace(made, learning_rate=made.learning_rate * LOW_RANK_RATE)
