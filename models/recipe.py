"""Every number that decides a walk, and every number that decides a fine-tuning run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from torch import Tensor

from models.diffusion import SPACINGS, path_down, path_up
from models.losses import FORMS

ORDERS = {"ddim": 1, "ab2": 2}
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How far up, on which rungs, with which solver. The defaults are the project's; ``PAPER`` the paper's."""

    return_step: int = 400
    """t0: the timestep of the latent; larger changes more."""
    steps_up: int = 20
    steps_down: int = 20
    solver: str = "ab2"
    """``ddim`` (order 1) or ``ab2`` (order 2, two-step Adams-Bashforth); one model call a step either way."""
    spacing: str = "sigma"
    """Of the ladder: ``linspace`` (the official code's) or ``sigma``."""
    precision: str = "float32"
    """Of the network's arithmetic; the state of the walk is float32 always."""

    def problems(self, timesteps: int = 1000) -> list[str]:
        """Sentences that say what is impossible about these numbers; empty if nothing is."""
        found = []
        if not 1 <= self.return_step < timesteps:
            found.append(f"the return step must lie between 1 and {timesteps - 1}; got {self.return_step}")
        most = timesteps if found else self.return_step + 1
        for name in ("steps_up", "steps_down"):
            if not 2 <= getattr(self, name) <= most:
                found.append(f"{name.replace('_', ' ')} must lie between 2 and {most} (return step + 1); got {getattr(self, name)}")
        for name, allowed in (("solver", ORDERS), ("spacing", SPACINGS), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                found.append(f"{name} is one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        return found

    @property
    def order(self) -> int:
        return ORDERS[self.solver]

    def up(self, alpha_bars: Tensor) -> list[int]:
        return path_up(self.return_step, self.steps_up, self.spacing, alpha_bars)

    def down(self, alpha_bars: Tensor) -> list[int]:
        return path_down(self.return_step, self.steps_down, self.spacing, alpha_bars)

    @property
    def calls_up(self) -> int:
        """Model calls an image on the way up."""
        return self.steps_up - (self.spacing == "linspace")

    @property
    def calls_down(self) -> int:
        """Model calls an image and model on the way down."""
        return self.steps_down

    def of_latent(self) -> dict[str, Any]:
        """The part of the recipe that decides the latent: latents made with another part must not be reused."""
        return {name: getattr(self, name) for name in ("return_step", "steps_up", "solver", "spacing")}

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
