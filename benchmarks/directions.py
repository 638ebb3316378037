"""Which way an exact edit goes: the cosine between CLIP's change from held-out images to their counterfactuals and text directions.

The counterfactual of an image is the same face drawn with just one factor changed, so no edit could follow the text better. Where
this cosine is low, a perfect edit has a high loss. And how far it goes: by how much the target text leads in CLIP's choice.
python -m benchmarks.directions --out benchmarks/results/directions.json
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from jobs.progress import console, display
from jobs.tables import count_table
from models.attributes import Attribute, attributes_of
from models.clip import Clip, alternatives, load_clip
from models.domains import DOMAINS
from models.losses import directional_similarity, target_lead
from models.views import draw_views
from pipeline.quality import held_out_ids, held_out_pictures
from pipeline.truth import targets

DOMAIN = DOMAINS["pixelface"]
WAYS = ("from the noun", "from the first source text", "from the best source text")
LEADS = ("in the source", "in the counterfactual", "in its noisy views")


@torch.no_grad()
def cosines(clip: Clip, attribute: Attribute, source: Tensor, target: Tensor) -> dict[str, float]:
    """Mean over images (N, 3, H, W) and their counterfactuals, by where the text direction begins."""
    before, after = clip.image_features(source), clip.image_features(target)
    texts = DOMAIN.noun, alternatives(attribute.source)[0], attribute.source
    ways = [clip.text_direction(text, attribute.target)(before) for text in texts]
    return {name: float(directional_similarity(before, after, way).mean()) for name, way in zip(WAYS, ways, strict=True)}


@torch.no_grad()
def leads(clip: Clip, attribute: Attribute, source: Tensor, target: Tensor) -> dict[str, float]:
    """Mean lead of the target text over images (N, 3, H, W), over their counterfactuals, and over views of these as training has them."""
    direction, tuning = clip.text_direction(attribute.source, attribute.target), DOMAIN.tuning
    views = draw_views(target, tuning.views, tuning.view_noise, torch.Generator().manual_seed(tuning.seed))
    seen = clip.image_features(source), clip.image_features(target), views.features(clip, target)
    found = [target_lead(features, direction.target, direction.sources, clip.scale) for features in seen]
    return {name: float(lead.mean()) for name, lead in zip(LEADS, found, strict=True)}


def main(
    images: Annotated[int, typer.Option(min=1, help="Of each attribute.")] = 256, out: Annotated[Path | None, typer.Option()] = None
) -> None:
    """Prints the cosines of every attribute, from the noun alone and from its source texts, and the leads of its target text."""
    clip, ids, pictures = load_clip(DOMAIN.clip), held_out_ids(DOMAIN), held_out_pictures(DOMAIN)[0]
    results: list[dict[str, Any]] = []
    attributes = attributes_of(DOMAIN.family).values()
    with display("text directions", len(attributes), "attributes") as shown:
        for attribute in attributes:
            rows, target = targets(DOMAIN, attribute.name, ids)
            pair = pictures[rows[:images]], target[:images]
            about = {"attribute": attribute.name, "images": len(rows[:images]), "sources": len(alternatives(attribute.source))}
            results.append({**about, **cosines(clip, attribute, *pair), "lead": leads(clip, attribute, *pair)})
            shown.update(len(results), attribute.name)
    lines = [(r["attribute"], ", ".join(f"{name} {r[name]:.2f}" for name in WAYS)) for r in results]
    console.print(count_table(f"cosine of an exact edit with its text, {images} images at most", lines))
    lines = [(r["attribute"], ", ".join(f"{name} {r['lead'][name]:.1f}" for name in LEADS)) for r in results]
    console.print(count_table("lead of the target text, logarithm of a ratio of probabilities", lines))
    if out:
        out.write_text(json.dumps({"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
