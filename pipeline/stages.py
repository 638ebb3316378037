"""What is done to rows: plain classes from pa.Table to pa.Table, one row out for each row in. No Ray here.

A stage is built once on each worker and called with many tables. A row whose ``error`` is set passes through untouched;
only decoding can set it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.diffusion import NoiseModel, blend, walk
from models.domains import Domain
from models.recipe import Recipe
from models.unet import load_alpha_bars, load_base, load_edit_model
from pipeline import codec, schema
from pipeline.config import Edit, Resources

Stage = Callable[[pa.Table], pa.Table]


def padded_batches(images: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Batches of exactly ``size`` and how many of their images count; the last is filled up with copies of its last.

    One shape for all batches means one arithmetic: an image's pixels do not depend on how many rows came with it.
    """
    for part in images.split(size):
        missing = size - len(part)
        yield (torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part), len(part)


def finite(images: Tensor, recipe: Recipe) -> Tensor:
    """The images themselves. Raises ArithmeticError if a number overflowed: it would become a black picture otherwise."""
    if not images.isfinite().all():
        raise ArithmeticError(f"the walk with precision {recipe.precision} gave numbers that are not finite; use --precision float32")
    return images


class Invert:
    """image -> latent: the base model's walk up. Adds ``latent`` and ``error``."""

    def __init__(self, domain: Domain, recipe: Recipe, resources: Resources):
        self.domain, self.recipe, self.resources = domain, recipe, resources
        self.model = load_base(domain.weights, recipe.precision).to(resources.device)
        self.alpha_bars = load_alpha_bars(domain.weights)
        self.path = recipe.up(self.alpha_bars)

    def __call__(self, table: pa.Table) -> pa.Table:
        size = self.domain.image_size
        pictures, errors = codec.decode_column(table["image"], size, self.resources.max_pixels)
        good = [row for row, error in enumerate(errors) if error is None]
        latents: list[np.ndarray | None] = [None] * len(errors)
        if good:
            up = self._walk(codec.to_tensor([p for p in pictures if p is not None]))
            for row, latent in zip(good, up.numpy(), strict=True):
                latents[row] = latent
        column = codec.latents_to_arrow(latents, size)
        return table.append_column("latent", column).append_column("error", pa.array(errors, pa.string()))

    @torch.no_grad()
    def _walk(self, x0: Tensor) -> Tensor:
        done = []
        for batch, count in padded_batches(x0, self.resources.batch):
            up = walk(self.model, batch.to(self.resources.device), self.path, self.alpha_bars, self.recipe.order)
            done.append(up[:count].cpu())
        return finite(torch.cat(done), self.recipe)


class Apply:
    """latent -> edited: the walk down with the mix of base and edit models. Adds ``edited``, ``attribute``, ``degree``."""

    def __init__(self, domain: Domain, recipe: Recipe, edit: Edit, resources: Resources):
        self.domain, self.recipe, self.edit, self.resources = domain, recipe, edit, resources
        self.alpha_bars = load_alpha_bars(domain.weights)
        self.path = recipe.down(self.alpha_bars)
        self.model = self._mix()

    def _mix(self) -> NoiseModel:
        folder, precision = self.domain.weights, self.recipe.precision
        base, *weights = self.edit.weights
        models = [(load_base(folder, precision), base)] if base else []
        models += [(load_edit_model(folder, p.file, precision), w) for p, w in zip(self.edit.parts, weights, strict=True) if w]
        return blend([m.to(self.resources.device) for m, _ in models], [w for _, w in models])

    def __call__(self, table: pa.Table) -> pa.Table:
        size = self.domain.image_size
        errors = table["error"].to_pylist()
        edited: list[dict[str, Any] | None] = [None] * len(errors)
        good = [row for row, error in enumerate(errors) if error is None]
        if good:
            latents = codec.latents_from_arrow(table["latent"].take(pa.array(good)), size)
            for row, picture in zip(good, codec.to_pictures(self._walk(latents)), strict=True):
                edited[row] = {"bytes": codec.encode_png(picture), "path": None}
        count = len(errors)
        return (
            table.drop_columns(["latent"])
            .append_column("edited", pa.array(edited, schema.IMAGE))
            .append_column("attribute", pa.array([self.edit.attribute] * count))
            .append_column("degree", pa.array([self.edit.degree] * count, pa.float32()))
        )

    @torch.no_grad()
    def _walk(self, latents: Tensor) -> Tensor:
        done = []
        for batch, count in padded_batches(latents, self.resources.batch):
            down = walk(self.model, batch.to(self.resources.device), self.path, self.alpha_bars, self.recipe.order)
            done.append(down[:count].cpu())
        return finite(torch.cat(done), self.recipe)
