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

from models.clip import load_clip
from models.diffusion import NoiseModel, blend, walk
from models.domains import Domain
from models.metrics import directional_score, mean_absolute_error, structural_similarity
from models.pixelface.judge import load_judge
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


class Invert:
    """image -> latent: the base model's walk up. Adds ``latent`` and ``error``."""

    def __init__(self, domain: Domain, recipe: Recipe, resources: Resources):
        self.domain, self.recipe, self.resources = domain, recipe, resources
        self.model = load_base(domain.weights, recipe.precision).to(resources.device)
        self.alpha_bars = load_alpha_bars(domain.weights)
        self.path = recipe.up(self.alpha_bars)

    def __call__(self, table: pa.Table) -> pa.Table:
        size = self.domain.image_size
        pictures, errors = decode_column(table["image"], size, self.resources.max_pixels)
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
        return torch.cat(done)


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
        return torch.cat(done)


class Score:
    """source and edited -> scores a row: error, similarity, directional CLIP, and the judge's reading where there is one."""

    def __init__(self, domain: Domain, edit: Edit, resources: Resources):
        self.domain, self.resources = domain, resources
        self.clip = load_clip(domain.clip).to(resources.device)
        self.direction = mix_direction(self.clip, edit)
        self.judge = load_judge(domain.judge) if domain.judge else None
        self.factors = tuple(self.judge.heads) if self.judge else ()

    def __call__(self, table: pa.Table) -> pa.Table:
        size, errors = self.domain.image_size, table["error"].to_pylist()
        sources, problems = decode_column(table["image"], size, self.resources.max_pixels)
        errors = [error or problem for error, problem in zip(errors, problems, strict=True)]
        good = [row for row, error in enumerate(errors) if error is None]
        rows: list[dict[str, Any]] = [{} for _ in errors]
        if good:
            edited, _ = decode_column(table["edited"].take(pa.array(good)), size, self.resources.max_pixels)
            scores = self._scores(
                codec.to_tensor([picture for row in good if (picture := sources[row]) is not None]),
                codec.to_tensor([picture for picture in edited if picture is not None]),
            )
            for row, values in zip(good, scores, strict=True):
                rows[row] = values
        for column in schema.scores_schema(self.factors):
            table = table.append_column(column, pa.array([row.get(column.name) for row in rows], column.type))
        return table.drop_columns(["error"]).append_column("error", pa.array(errors, pa.string()))

    def _scores(self, source: Tensor, edited: Tensor) -> list[dict[str, Any]]:
        device = self.resources.device
        columns: dict[str, list[Any]] = {
            "mae": mean_absolute_error(source, edited).tolist(),
            "ssim": structural_similarity(source, edited).tolist(),
        }
        if self.direction is not None:
            similarity = directional_score(self.clip, source.to(device), edited.to(device), self.direction)
            columns["clip_direction"] = similarity.tolist()
        if self.judge is not None:
            columns |= {"factors_before": self.judge.read(source), "factors_after": self.judge.read(edited)}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def decode_column(column: pa.ChunkedArray, size: int, max_pixels: int) -> tuple[list[np.ndarray | None], list[str | None]]:
    """Pictures (uint8 (3, size, size) or None) and errors (None or the reason), one of the two a row."""
    pictures: list[np.ndarray | None] = []
    errors: list[str | None] = []
    for data in schema.image_bytes(column):
        try:
            pictures.append(codec.decode(data, size, max_pixels))
            errors.append(None)
        except codec.ImageError as error:
            pictures.append(None)
            errors.append(str(error))
    return pictures, errors


def mix_direction(clip: Any, edit: Edit) -> Tensor | None:
    """(D,) of length 1: the weighted mean of the parts' text directions; None for a reconstruction."""
    if not edit.parts:
        return None
    directions = [part.weight * clip.text_direction(part.source, part.target) for part in edit.parts]
    return torch.nn.functional.normalize(torch.stack(directions).sum(0), dim=0)
