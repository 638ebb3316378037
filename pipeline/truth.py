"""Edits against the truth: what a domain's ready-made edit models do to held-out images whose exact counterfactual is known.

The counterfactual of an image is the same face drawn with just one factor changed. Where it differs from the image is the
attribute's own region; a perfect edit is the counterfactual. Images are float32 (N, 3, H, W) in [-1, 1]; distances are mean
absolute differences of pixels in [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.attributes import Attribute, attributes_of
from models.clip import load_clip
from models.diffusion import blend, walk
from models.domains import Domain
from models.metrics import directional_score, mean_absolute_error, structural_similarity
from models.pixelface.judge import Judge, load_judge
from models.trim import trimmed
from models.unet import load_alpha_bars, load_base, load_edit_model
from pipeline import codec, schema

DEGREES = (0.0, 0.5, 1.0)
SLACK = 0.01
"""By how much the judge's probability may fall from one degree to the next: that of a certain judge trembles in its last digits."""
BATCH = 32
OnBatch = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Held-out images with their latents by the domain's recipe."""

    ids: list[str]
    x0: Tensor
    latents: Tensor


def targets(domain: Domain, attribute: str, ids: Sequence[str]) -> tuple[list[int], Tensor]:
    """Positions in ``ids`` of the images that lack an attribute, and their counterfactuals."""
    table = pq.read_table(domain.counterfactuals, filters=[("attribute", "=", attribute)])
    place = {name: row for row, name in enumerate(ids)}
    known = [
        (place[name], data) for name, data in zip(table["id"].to_pylist(), schema.image_bytes(table["image"]), strict=True) if name in place
    ]
    pictures = codec.to_tensor([codec.decode(data, domain.image_size) for _, data in known])
    return [row for row, _ in known], pictures


@torch.no_grad()
def edited(domain: Domain, files: Sequence[str], degree: float, x0: Tensor, latents: Tensor, on_batch: OnBatch) -> Tensor:
    """Latents of x0 walked down with edit models at full weight each, as ``edit --mix a=1,b=1 --degree`` does; in [-1, 1]."""
    models = [load_base(domain.weights), *(load_edit_model(domain.weights, file) for file in files)]
    model = blend(models, [1 - degree * len(files), *[degree] * len(files)])
    alpha_bars, recipe, done = load_alpha_bars(domain.weights), domain.recipe, []
    trim = recipe.trim_of_edits if len(files) == 1 and degree else 0.0
    for source, part in zip(x0.split(BATCH), latents.split(BATCH), strict=True):
        after = walk(model, part, recipe.down(alpha_bars), alpha_bars, recipe.order).clamp(-1, 1)
        done.append(trimmed(after, source, trim))
        on_batch(len(part))
    return torch.cat(done)


# ---- figures ---------------------------------------------------------------------------------------------------------


def own_region(source: Tensor, target: Tensor) -> Tensor:
    """bool (N, 1, H, W): the pixels in which images and their counterfactuals differ."""
    return ((source - target).abs() > 1 / 255).any(1, keepdim=True)


def change_outside(source: Tensor, after: Tensor, region: Tensor) -> Tensor:
    """(N,) mean absolute change of the pixels outside a region; 0 where there are none."""
    outside = (~region).float()
    change = ((after - source).abs().mean(1, keepdim=True) / 2 * outside).sum((1, 2, 3))
    return change / outside.sum((1, 2, 3)).clamp_min(1)


def edit_scores(domain: Domain, attribute: Attribute, source: Tensor, after: Tensor, target: Tensor) -> dict[str, Any]:
    """How well images that lacked an attribute came to have it, and what else changed, each a mean over the images."""
    assert attribute.changes is not None
    assert domain.judge is not None
    factor, value = attribute.changes
    judge = load_judge(domain.judge)
    was, became = judge.read(source), judge.read(after)
    kept = [a[other] == b[other] for a, b in zip(was, became, strict=True) for other in a if other != factor]
    scores: dict[str, Any] = {
        "attribute": attribute.name,
        "images": len(source),
        "success": sum(b[factor] == value for b in became) / len(source),
        "kept": sum(kept) / len(kept),
        "outside": float(change_outside(source, after, own_region(source, target)).mean()),
        "to_counterfactual": float(mean_absolute_error(target, after).mean()),
        "source_to_counterfactual": float(mean_absolute_error(target, source).mean()),
        "mae": float(mean_absolute_error(source, after).mean()),
        "ssim": float(structural_similarity(source, after).mean()),
    }
    for name, reference in (("clip_direction", domain.clip), ("scoring_clip_direction", domain.scoring_clip)):
        if reference is not None:
            clip = load_clip(reference)
            direction = clip.text_direction(attribute.source, attribute.target)
            scores[name] = float(directional_score(clip, source, after, direction).mean())
    return scores


def probability(judge: Judge, images: Tensor, factor: str, value: str) -> Tensor:
    """(N,) what the judge gives a value of a factor."""
    from models.pixelface.avatars import FACTORS

    with torch.no_grad():
        return judge(images)[factor].softmax(1)[:, FACTORS[factor].index(value)]


def monotone(probabilities: Tensor) -> float:
    """Share of the columns of (degrees, N) probabilities that never fall by more than ``SLACK``."""
    return float((probabilities.diff(dim=0) >= -SLACK).all(0).float().mean())


def sweep(domain: Domain, attribute: Attribute, file: str, x0: Tensor, latents: Tensor, on_batch: OnBatch) -> dict[str, Any]:
    """Whether the judge's probability of the attribute grows with the degree, in images that lacked it."""
    assert attribute.changes is not None
    assert domain.judge is not None
    judge = load_judge(domain.judge)
    found = torch.stack([probability(judge, edited(domain, [file], d, x0, latents, on_batch), *attribute.changes) for d in DEGREES])
    return {"attribute": attribute.name, "images": len(latents), "monotone": monotone(found), "mean_probability": found.mean(1).tolist()}


def mix(domain: Domain, files: Mapping[str, str], found: Latents, rows: Sequence[int], on_batch: OnBatch) -> dict[str, Any]:
    """Two or more attributes at once, each at full weight, on images that lack all of them."""
    assert domain.judge is not None
    chosen = list(rows)
    changes = dict(a.changes for name, a in attributes_of(domain.family).items() if name in files and a.changes)
    judge, source = load_judge(domain.judge), found.x0[chosen]
    after = edited(domain, list(files.values()), 1.0, source, found.latents[chosen], on_batch)
    was, became = judge.read(source), judge.read(after)
    kept = [a[other] == b[other] for a, b in zip(was, became, strict=True) for other in a if other not in changes]
    both = [all(b[factor] == value for factor, value in changes.items()) for b in became]
    return {"attributes": list(files), "images": len(chosen), "success": sum(both) / len(both), "kept": sum(kept) / len(kept)}
