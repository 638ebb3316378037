"""The mathematics of the walk, on one page.

Shapes: x, noise and noise predictions are float32 (B, C, H, W); t is int64 (B,); ``alpha_bars`` is float32 (T,), the
cumulative product of 1 - beta (Ho et al. 2020, eq. 4), decreasing.

A noised image is x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise. With y = x / sqrt(alpha_bar) and
sigma = sqrt((1 - alpha_bar) / alpha_bar) the deterministic (DDIM) process is dy/dsigma = noise prediction
(Song et al. 2021, eq. 14): DDIM is Euler's method on it, in either direction. Walking up gives the latent
(DiffusionCLIP, eq. 11), walking down gives the image (eq. 12).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

# x (B,C,H,W) float32, t (B,) int64 -> predicted noise, shape and dtype of x.
NoiseModel = Callable[[Tensor, Tensor], Tensor]

# number of a step -> fresh standard normal noise, shape of x: where a stochastic walk takes its randomness from.
Draw = Callable[[int], Tensor]

CLEAN = -1
"""The rung below t=0: no noise at all."""

SPACINGS = ("linspace", "sigma")
RHO = 3.0
"""Exponent of the sigma-spaced ladder (Karras et al. 2022, eq. 5 use 7 for sampling; 3 has the lowest round-trip error here)."""


def linear_alpha_bars(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """float32 (timesteps,): linear betas (Ho et al. 2020, section 4), multiplied up in float64."""
    return (1 - torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)).cumprod(0).float()


def alpha_bar_at(alpha_bars: Tensor, rung: int) -> float:
    """alpha_bar of one rung; 1 at ``CLEAN``."""
    return 1.0 if rung == CLEAN else float(alpha_bars[rung])


def ladder(top: int, steps: int, spacing: str, alpha_bars: Tensor) -> list[int]:
    """``steps`` strictly increasing timesteps from 0 to ``top``, both included.

    ``linspace`` is the official code's integer grid, ``int(v * top) for v in numpy.linspace(0, 1, steps)``, rounding and
    all, but where that names a timestep twice; ``sigma`` spaces the rungs evenly in sigma ** (1/3), denser where there is
    little noise, rounded to the nearest free timestep.
    Raises ValueError if there are fewer than two steps or more steps than timesteps.
    """
    if not 0 < top < len(alpha_bars):
        raise ValueError(f"the return step must lie between 1 and {len(alpha_bars) - 1}; got {top}")
    if not 2 <= steps <= top + 1:
        raise ValueError(f"a ladder up to {top} has between 2 and {top + 1} rungs; got {steps}")
    if spacing == "linspace":
        width = 1 / (steps - 1)  # products in numpy's order: torch.linspace differs in the last bit, and int() shows it
        return _strictly_increasing([int(i * width * top) for i in range(steps - 1)] + [top])
    if spacing != "sigma":
        raise ValueError(f"the spacing of a ladder is one of {', '.join(SPACINGS)}; got {spacing!r}")
    sigmas = ((1 - alpha_bars) / alpha_bars).sqrt().double()[: top + 1]
    low, high = sigmas[0] ** (1 / RHO), sigmas[top] ** (1 / RHO)
    wanted = (low + torch.linspace(0, 1, steps, dtype=torch.float64) * (high - low)) ** RHO
    return _strictly_increasing((sigmas[None] - wanted[:, None]).abs().argmin(1).tolist())


def _strictly_increasing(rungs: list[int]) -> list[int]:
    """Moves rungs that collide to the next free timestep, none beyond the last."""
    top, rungs = rungs[-1], list(rungs)
    for i in range(1, len(rungs)):
        rungs[i] = max(rungs[i], rungs[i - 1] + 1)
    return [min(rung, top - (len(rungs) - 1 - i)) for i, rung in enumerate(rungs)]


def path_up(top: int, steps: int, spacing: str, alpha_bars: Tensor) -> list[int]:
    """The rungs from image to latent. ``linspace`` follows the official code, which takes the image to be x at t=0;
    ``sigma`` starts at ``CLEAN``, so that the way down mirrors it. Model calls: ``len(path) - 1``."""
    rungs = ladder(top, steps, spacing, alpha_bars)
    return rungs if spacing == "linspace" else [CLEAN, *rungs]


def path_down(top: int, steps: int, spacing: str, alpha_bars: Tensor) -> list[int]:
    """The rungs from latent to image, down to ``CLEAN``. Model calls: ``steps``."""
    return [*reversed(ladder(top, steps, spacing, alpha_bars)), CLEAN]


def step(x: Tensor, noise: Tensor, alpha_bar: float, next_alpha_bar: float) -> Tensor:
    """One deterministic step along ``noise`` (Song et al. 2021, eq. 12 with sigma_t = 0), up or down."""
    sigma, next_sigma = sqrt((1 - alpha_bar) / alpha_bar), sqrt((1 - next_alpha_bar) / next_alpha_bar)
    return sqrt(next_alpha_bar) * (x / sqrt(alpha_bar) + (next_sigma - sigma) * noise)


def predicted_x0(x: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """The clean image that a noise prediction implies: x0 = (x - sqrt(1 - alpha_bar) noise) / sqrt(alpha_bar)."""
    return step(x, noise, alpha_bar, 1.0)


def noised(x0: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """x0 with fresh noise, in one stroke: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4)."""
    return sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise


class Move(NamedTuple):
    """One step of a walk: at ``x`` the model predicted ``noise``; the step led to ``next_x``. (B, C, H, W) each."""

    x: Tensor
    noise: Tensor
    alpha_bar: float
    next_x: Tensor


def moves(
    model: NoiseModel, x: Tensor, path: Sequence[int], alpha_bars: Tensor, order: int = 1, *, detached: bool = False
) -> Iterator[Move]:
    """Moves x along the rungs of ``path``, up or down, one model call and one ``Move`` a step.

    Order 1 is DDIM. Order 2 is the two-step Adams-Bashforth method with variable step size in sigma, whose first step is
    a DDIM step; it costs no further model call. At ``CLEAN`` the model is asked at t=0, the lowest level it knows.
    ``detached`` cuts the graph of gradients between the steps, so that each model call can be trained on by itself.
    """
    if order not in (1, 2):
        raise ValueError(f"the order of a walk is 1 (DDIM) or 2 (Adams-Bashforth); got {order}")
    levels = [alpha_bar_at(alpha_bars, rung) for rung in path]
    sigmas = [sqrt((1 - level) / level) for level in levels]
    previous: Tensor | None = None
    for i, rung in enumerate(path[:-1]):
        noise = direction = model(x, timesteps(x, rung))
        if order == 2 and previous is not None:
            ratio = (sigmas[i + 1] - sigmas[i]) / (sigmas[i] - sigmas[i - 1])
            direction = (1 + ratio / 2) * noise - (ratio / 2) * previous
        next_x = step(x, direction, levels[i], levels[i + 1])
        yield Move(x, noise, levels[i], next_x)
        x, previous = (next_x.detach(), noise.detach()) if detached else (next_x, noise)


def timesteps(x: Tensor, rung: int) -> Tensor:
    """int64 (B,): what the model is told at a rung."""
    return torch.full((len(x),), max(rung, 0), dtype=torch.int64, device=x.device)


def walk(model: NoiseModel, x: Tensor, path: Sequence[int], alpha_bars: Tensor, order: int = 1) -> Tensor:
    """Where the ``moves`` along ``path`` end; ``len(path) - 1`` model calls; differentiable."""
    for move in moves(model, x, path, alpha_bars, order):
        x = move.next_x
    return x


def stochastic_walk(model: NoiseModel, x: Tensor, path: Sequence[int], alpha_bars: Tensor, eta: float, draw: Draw) -> Tensor:
    """A walk down with fresh noise in every step (Song et al. 2021, eq. 12 and 16): ``eta`` 0 is DDIM, 1 is DDPM.

    The noise of a step belongs to the two rungs it lies between, whatever lies between them, so skipped steps are right
    (the official code's ``ddpm`` sampling always removes the noise of a single timestep). ``draw(i)`` is the noise of
    the i-th step. Raises ValueError for a path that leads up.
    """
    for i, (rung, below) in enumerate(pairwise(path)):
        level, next_level = alpha_bar_at(alpha_bars, rung), alpha_bar_at(alpha_bars, below)
        if next_level <= level:
            raise ValueError("a stochastic walk leads down; on the way up use the deterministic walk")
        noise = model(x, timesteps(x, rung))
        fresh = eta * sqrt((1 - next_level) / (1 - level)) * sqrt(1 - level / next_level)
        x = sqrt(next_level) * predicted_x0(x, noise, level) + sqrt(max(0.0, 1 - next_level - fresh**2)) * noise
        if fresh:
            x = x + fresh * draw(i)
    return x


def project(model: NoiseModel, x0: Tensor, path: Sequence[int], alpha_bars: Tensor, times: int, draw: Draw) -> Tensor:
    """Brings an image of an unseen domain into the model's own: ``times`` times noised to the top of ``path`` and walked
    down again (SDEdit, Meng et al. 2022; DiffusionCLIP, section 4.2). ``draw(i)`` is the noise of the i-th time."""
    level = alpha_bar_at(alpha_bars, path[0])
    for i in range(times):
        x0 = walk(model, noised(x0, draw(i), level), path, alpha_bars)
    return x0


def blend(models: Sequence[NoiseModel], weights: Sequence[float] | Mapping[int, Sequence[float]]) -> NoiseModel:
    """One noise model from several: the weighted sum of their predictions (DiffusionCLIP, eq. 13 and 14).

    ``weights`` is one number a model, or ``{from_timestep: numbers}`` where the largest key not above t holds (0 must be
    there). Weights that sum to 1 keep a noise prediction a noise prediction. A model of weight 0 is not called.
    """
    table = dict(weights) if isinstance(weights, Mapping) else {0: weights}
    if 0 not in table:
        raise ValueError("weights by timestep need an entry for timestep 0")
    if any(len(row) != len(models) for row in table.values()):
        raise ValueError(f"a mix of {len(models)} models needs {len(models)} weights for each range of timesteps")
    starts = sorted(table)

    def blended(x: Tensor, t: Tensor) -> Tensor:
        if len(starts) == 1:
            return _weighted_sum(models, [torch.tensor(w, dtype=x.dtype) for w in table[0]], x, t)
        row = torch.bucketize(t, torch.tensor(starts, device=t.device), right=True) - 1
        columns = torch.tensor([table[s] for s in starts], dtype=x.dtype, device=x.device)[row].T
        return _weighted_sum(models, [c.view(-1, 1, 1, 1) for c in columns], x, t)

    return blended


def _weighted_sum(models: Sequence[NoiseModel], weights: Sequence[Tensor], x: Tensor, t: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for model, weight in zip(models, weights, strict=True):
        if weight.any():
            total = total + weight * model(x, t)
    return total
