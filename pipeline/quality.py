"""How good a domain is, on held-out images with known factors."""

from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.clip import load_clip
from models.diffusion import walk
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


@torch.no_grad()
def round_trip_error(domain: Domain, x0: Tensor, on_batch: Callable[[int, float], None], batch: int = 32) -> float:
    """Mean absolute difference, pictures in [0, 1], of images and their walk up and down with the domain's recipe.

    In float32 throughout: neither the latent nor the picture is rounded to what a file holds.
    """
    model, alpha_bars, recipe = load_base(domain.weights), load_alpha_bars(domain.weights), domain.recipe
    total, done = 0.0, 0
    for part in x0.split(batch):
        latent = walk(model, part, recipe.up(alpha_bars), alpha_bars, recipe.order)
        again = walk(model, latent, recipe.down(alpha_bars), alpha_bars, recipe.order)
        total += float(mean_absolute_error(part, again).sum())
        done += len(part)
        on_batch(done, total / done)
    return total / done


@torch.no_grad()
def zero_shot_accuracy(domain: Domain, pictures: Tensor, truth: Truth) -> dict[str, float]:
    """Share of pictures whose nearest text, one for each value of a factor, is the true one."""
    clip = load_clip(domain.clip)
    features = torch.cat([clip.image_features(part) for part in pictures.split(128)])
    accuracy = {}
    for name, values in FACTORS.items():
        texts = torch.stack([clip.text_features(text) for text in prompts(name)])
        best = (features @ texts.T).argmax(1).tolist()
        accuracy[name] = float(np.mean([values[b] == t[name] for b, t in zip(best, truth, strict=True)]))
    return accuracy


def judge_accuracy(domain: Domain, pictures: Tensor, truth: Truth) -> dict[str, float]:
    """Share of pictures whose factor the judge reads right."""
    assert domain.judge is not None
    read = [reading for part in pictures.split(128) for reading in load_judge(domain.judge).read(part)]
    return {name: float(np.mean([r[name] == t[name] for r, t in zip(read, truth, strict=True)])) for name in FACTORS}
