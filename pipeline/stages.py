"""What is done to rows: plain classes from pa.Table to pa.Table, one row out for each row in. No Ray here.

A stage is built once on each worker and called with many tables. A row whose ``error`` is set passes through untouched;
only decoding can set it.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.diffusion import Draw, NoiseModel, alpha_bar_at, blend, noised, project, stochastic_walk, walk
from models.domains import Domain
from models.recipe import Recipe
from models.trim import trimmed
from models.unet import NoiseUNet, load_alpha_bars, load_base, load_edit_model
from pipeline import codec, schema
from pipeline.batches import Batches
from pipeline.config import Edit, Resources

Stage = Callable[[pa.Table], pa.Table]


def row_noise(ids: Sequence[str], like: Tensor, seed: int, purpose: str) -> Draw:
    """Fresh noise that belongs to a row (by its id), the seed and the purpose: never to the rows beside it, and the same
    on every device, because it is drawn on the CPU."""

    def draw(i: int) -> Tensor:
        noise = [torch.randn(like.shape[1:], generator=_generator(f"{seed}/{purpose}/{i}/{name}")) for name in ids]
        return torch.stack(noise).to(like.device)

    return draw


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True))


def finite(images: Tensor, recipe: Recipe) -> Tensor:
    """The images themselves. Raises ArithmeticError if a number overflowed: it would become a black picture otherwise."""
    if not images.isfinite().all():
        raise ArithmeticError(f"the walk with precision {recipe.precision} gave numbers that are not finite; use --precision float32")
    return images


class Invert:
    """image -> latent: the base model's walk up, after projections into its domain if the recipe asks for them.
    Adds ``latent`` and ``error``."""

    def __init__(self, domain: Domain, recipe: Recipe, resources: Resources):
        self.domain, self.recipe, self.resources, self.batches = domain, recipe, resources, Batches(resources)
        self.model = load_base(domain.weights, recipe.precision, recipe.class_label).to(resources.device)
        self.alpha_bars = load_alpha_bars(domain.weights)
        self.path = recipe.up(self.alpha_bars)

    def __call__(self, table: pa.Table) -> pa.Table:
        size = self.domain.image_size
        pictures, errors = codec.decode_column(table["image"], size, self.resources.max_pixels)
        errors = [unread or error for unread, error in zip(codec.unread_reasons(table), errors, strict=True)]
        good = [row for row, error in enumerate(errors) if error is None]
        latents: list[np.ndarray | None] = [None] * len(errors)
        if good:
            names = table["id"].take(pa.array(good)).to_pylist()
            up = self.batches.walk(codec.to_tensor([p for p in pictures if p is not None]), names, self._walk)
            finite(up, self.recipe)
            for row, latent in zip(good, up.numpy(), strict=True):
                latents[row] = latent
        column = codec.latents_to_arrow(latents, size)
        return table.append_column("latent", column).append_column("error", pa.array(errors, pa.string()))

    @torch.no_grad()
    def _walk(self, x0: Tensor, ids: Sequence[str]) -> Tensor:
        recipe, alpha_bars = self.recipe, self.alpha_bars
        if recipe.projections:
            noise = row_noise(ids, x0, recipe.seed, "projection")
            x0 = project(self.model, x0, recipe.projection(alpha_bars), alpha_bars, recipe.projections, noise)
        if recipe.inversion == "stochastic":
            return noised(x0, row_noise(ids, x0, recipe.seed, "inversion")(0), alpha_bar_at(alpha_bars, recipe.return_step))
        return walk(self.model, x0, self.path, alpha_bars, recipe.order)


_in_use: WeakValueDictionary[tuple[Any, ...], NoiseUNet] = WeakValueDictionary()


def _shared_edit_model(base: str, file: str, precision: str, class_label: int | None) -> NoiseUNet:
    """An edit model, one object for all edits that use it at the same time: ten degrees take the memory of one."""
    key = (base, file, precision, class_label)
    model = _in_use.get(key)
    if model is None:
        model = _in_use[key] = load_edit_model(*key)
    return model


class Apply:
    """latent -> edited: the walk down with the mix of base and edit models, trimmed if the recipe asks for it. Adds ``edited``,
    ``attribute``, ``degree``."""

    def __init__(self, domain: Domain, recipe: Recipe, edit: Edit, resources: Resources):
        self.domain, self.recipe, self.edit, self.resources, self.batches = domain, recipe, edit, resources, Batches(resources)
        self.alpha_bars = load_alpha_bars(domain.weights)
        self.path = recipe.down(self.alpha_bars)
        self.model = self._mix()
        self.trim = recipe.trim_of_edits if edit.trimmable else 0.0

    def _mix(self) -> NoiseModel:
        """Base and edit models that have any weight anywhere, blended."""
        base, how = self.domain.weights, (self.recipe.precision, self.recipe.class_label)
        table = self.edit.weights
        used = [i for i in range(1 + len(self.edit.parts)) if any(row[i] for row in table.values())]
        models = [_shared_edit_model(base, self.edit.parts[i - 1].file, *how) if i else load_base(base, *how) for i in used]
        rows = {start: [row[i] for i in used] for start, row in table.items()}
        return blend([model.to(self.resources.device) for model in models], rows)

    def __call__(self, table: pa.Table) -> pa.Table:
        size = self.domain.image_size
        errors = table["error"].to_pylist()
        edited: list[dict[str, Any] | None] = [None] * len(errors)
        good = [row for row, error in enumerate(errors) if error is None]
        if good:
            latents = codec.latents_from_arrow(table["latent"].take(pa.array(good)), size)
            names = table["id"].take(pa.array(good)).to_pylist()
            down = finite(self.batches.walk(latents, names, self._walk), self.recipe)
            if self.trim:
                down = self._trimmed(down.clamp(-1, 1), table["image"].take(pa.array(good)))
            for row, picture in zip(good, codec.to_pictures(down), strict=True):
                edited[row] = {"bytes": codec.encode_png(picture), "path": None}
        count = len(errors)
        return (
            table.drop_columns(["latent"])
            .append_column("edited", pa.array(edited, schema.IMAGE))
            .append_column("attribute", pa.array([self.edit.attribute] * count))
            .append_column("degree", pa.array([self.edit.degree] * count, pa.float32()))
        )

    def _trimmed(self, edited: Tensor, pictures: pa.ChunkedArray) -> Tensor:
        """Beside the pictures, all of which were decoded before; one that cannot be any more becomes a reject when it is scored."""
        sources, _ = codec.decode_column(pictures, self.domain.image_size, self.resources.max_pixels)
        found = [row for row, source in enumerate(sources) if source is not None]
        if found:
            edited[found] = trimmed(edited[found], codec.to_tensor([s for s in sources if s is not None]), self.trim)
        return edited

    @torch.no_grad()
    def _walk(self, latents: Tensor, ids: Sequence[str]) -> Tensor:
        recipe, alpha_bars = self.recipe, self.alpha_bars
        if recipe.eta:
            return stochastic_walk(self.model, latents, self.path, alpha_bars, recipe.eta, row_noise(ids, latents, recipe.seed, "down"))
        return walk(self.model, latents, self.path, alpha_bars, recipe.order)
