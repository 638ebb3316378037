"""How good a domain is, on held-out images with known factors."""

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.clip import load_clip
from models.diffusion import NoiseModel, path_down, predicted_x0, stochastic_walk, walk
from models.domains import Domain
from models.metrics import mean_absolute_error
from models.pixelface.avatars import FACTORS, prompts
from models.pixelface.judge import load_judge
from models.unet import load_alpha_bars, load_base
from pipeline import codec, schema

Truth = list[dict[str, str]]


def held_out_pictures(domain: Domain) -> tuple[Tensor, Truth]:
    """float32 (N, 3, size, size) and the true factors of each."""
    table = pq.read_table(domain.held_out)
    pictures = [codec.decode(data, domain.image_size) for data in schema.image_bytes(table["image"])]
    return codec.to_tensor(pictures), table["factors"].to_pylist()


class RoundTrip(NamedTuple):
    """Latents of images, (N, 3, H, W), what they lead back to, and the mean absolute difference, pictures in [0, 1]."""

    latents: Tensor
    back: Tensor
    error: float


def held_out_ids(domain: Domain) -> list[str]:
    """Of the held-out pictures, in their order."""
    names: list[str] = pq.read_table(domain.held_out, columns=["id"])["id"].to_pylist()
    return names


@torch.no_grad()
def round_trip(domain: Domain, x0: Tensor, on_batch: Callable[[int, float], None], batch: int = 32) -> RoundTrip:
    """Images walked up and down again with the domain's recipe.

    In float32 throughout: neither the latent nor the picture is rounded to what a file holds.
    """
    model, alpha_bars, recipe = load_base(domain.weights), load_alpha_bars(domain.weights), domain.recipe
    latents: list[Tensor] = []
    back: list[Tensor] = []
    errors: list[Tensor] = []
    for part in x0.split(batch):
        latents.append(walk(model, part, recipe.up(alpha_bars), alpha_bars, recipe.order))
        back.append(walk(model, latents[-1], recipe.down(alpha_bars), alpha_bars, recipe.order))
        errors.append(mean_absolute_error(part, back[-1]))
        on_batch(sum(map(len, back)), float(torch.cat(errors).mean()))
    return RoundTrip(torch.cat(latents), torch.cat(back), float(torch.cat(errors).mean()))


@torch.no_grad()
def zero_shot_accuracy(clip: str, pictures: Tensor, truth: Truth, wording: str = "plain") -> dict[str, float]:
    """Share of pictures whose nearest text, one for each value of a factor, is the true one. ``clip`` is a reference."""
    network = load_clip(clip)
    features = torch.cat([network.image_features(part) for part in pictures.split(128)])
    accuracy = {}
    for name, values in FACTORS.items():
        texts = torch.stack([network.text_features(text) for text in prompts(name, wording)])
        best = (features @ texts.T).argmax(1).tolist()
        accuracy[name] = float(np.mean([values[b] == t[name] for b, t in zip(best, truth, strict=True)]))
    return accuracy


def judge_accuracy(domain: Domain, pictures: Tensor, truth: Truth) -> dict[str, float]:
    """Share of pictures whose factor the judge reads right."""
    assert domain.judge is not None
    read = [reading for part in pictures.split(128) for reading in load_judge(domain.judge).read(part)]
    return {name: float(np.mean([r[name] == t[name] for r, t in zip(read, truth, strict=True)])) for name in FACTORS}


def clipped(model: NoiseModel, alpha_bars: Tensor) -> NoiseModel:
    """The same model with the x0 that it predicts kept in [-1, 1], as DDPM samples (Ho et al. 2020)."""

    def called(x: Tensor, t: Tensor) -> Tensor:
        level = float(alpha_bars[int(t[0])])
        clean = predicted_x0(x, model(x, t), level).clamp(-1, 1)
        return (x - sqrt(level) * clean) / sqrt(1 - level)

    return called


@torch.no_grad()
def sample(domain: Domain, count: int, steps: int, on_batch: Callable[[int], None], batch: int = 50) -> Tensor:
    """``count`` pictures from noise alone, (N, 3, size, size) in [-1, 1], by ancestral sampling over ``steps`` timesteps."""
    alpha_bars, size = load_alpha_bars(domain.weights), domain.image_size
    model = clipped(load_base(domain.weights), alpha_bars)
    path, fresh = path_down(len(alpha_bars) - 1, steps, "linspace", alpha_bars), torch.Generator().manual_seed(0)
    done: list[Tensor] = []
    while sum(map(len, done)) < count:
        shape = min(batch, count - sum(map(len, done))), 3, size, size
        draw = partial(_normal, shape, fresh)
        done.append(stochastic_walk(model, draw(-1), path, alpha_bars, 1.0, draw).clamp(-1, 1))
        on_batch(sum(map(len, done)))
    return torch.cat(done)


def _normal(shape: tuple[int, ...], generator: torch.Generator, _step: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def recognised(domain: Domain, pictures: Tensor, confidence: float = 0.8) -> Tensor:
    """bool (N,): whether the judge is at least so confident about every factor of a picture."""
    assert domain.judge is not None
    with torch.no_grad():
        best = [logits.softmax(1).amax(1) for logits in load_judge(domain.judge)(pictures).values()]
    return torch.stack(best).amin(0) >= confidence
