"""Scores of each row's edit. Apart from the other stages, because CLIP and the metrics take seconds to import."""

from itertools import chain
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from models.clip import Clip, load_clip
from models.domains import Domain
from models.identity import load_identity
from models.metrics import Direction, directional_score, mean_absolute_error, structural_similarity
from models.pixelface.judge import load_judge
from pipeline import codec, schema
from pipeline.batches import Batches
from pipeline.config import Edit, Resources


class Score:
    """source and edited -> scores a row: error, similarity, directional CLIP, and what else there are networks for.

    ``clip`` and ``identity`` are references; without a CLIP, and for a reconstruction, ``clip_direction`` is null.
    """

    def __init__(self, domain: Domain, edit: Edit, resources: Resources, clip: str | None = None, identity: str | None = None):
        self.domain, self.resources, self.batches = domain, resources, Batches(resources)
        self.clip = load_clip(clip).to(resources.device) if clip and edit.parts else None
        self.direction = mix_direction(self.clip, edit) if self.clip else None
        self.identity = load_identity(identity).to(resources.device) if identity else None
        self.judge = load_judge(domain.judge) if domain.judge else None
        self.factors = tuple(self.judge.heads) if self.judge else ()

    def __call__(self, table: pa.Table) -> pa.Table:
        size, errors = self.domain.image_size, table["error"].to_pylist()
        sources, problems = codec.decode_column(table["image"], size, self.resources.max_pixels)
        errors = [error or problem for error, problem in zip(errors, problems, strict=True)]
        good = [row for row, error in enumerate(errors) if error is None]
        edited, _ = codec.decode_column(table["edited"], size, schema.MAX_PIXELS)
        rows: list[dict[str, Any]] = [{} for _ in errors]

        def scores(start: int, stop: int) -> list[dict[str, Any]]:
            part = good[start:stop]
            return self._scores(*(codec.to_tensor([p for row in part if (p := column[row]) is not None]) for column in (sources, edited)))

        for row, values in zip(good, chain.from_iterable(self.batches.each(len(good), scores)), strict=True):
            rows[row] = values
        for column in schema.scores_schema(self.factors, self.identity is not None):
            table = table.append_column(column, pa.array([row.get(column.name) for row in rows], column.type))
        return table.drop_columns(["error"]).append_column("error", pa.array(errors, pa.string()))

    def _scores(self, source: Tensor, edited: Tensor) -> list[dict[str, Any]]:
        source, edited = source.to(self.resources.device), edited.to(self.resources.device)
        columns: dict[str, list[Any]] = {
            "mae": mean_absolute_error(source, edited).tolist(),
            "ssim": structural_similarity(source, edited).tolist(),
        }
        if self.identity is not None:
            columns["identity"] = self._identity(source, edited)
        if self.clip is not None and self.direction is not None:
            similarity = directional_score(self.clip, source, edited, self.direction)
            columns["clip_direction"] = similarity.tolist()
        if self.judge is not None:
            columns |= {"factors_before": self.judge.read(source.cpu()), "factors_after": self.judge.read(edited.cpu())}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @torch.no_grad()
    def _identity(self, source: Tensor, edited: Tensor) -> list[float]:
        assert self.identity is not None
        return self.identity.similarity(source, edited).tolist()


def mix_direction(clip: Clip, edit: Edit) -> Direction:
    """The weighted mean of the parts' text directions: features of images before the edit (B, D) -> (B, D) of length 1. There must be
    a part."""
    parts = [(part.weight, clip.text_direction(part.source, part.target)) for part in edit.parts]
    return lambda before: torch.nn.functional.normalize(torch.stack([weight * way(before) for weight, way in parts]).sum(0), dim=-1)
