"""What each part of the embedded domain's recipe does: it is changed one part at a time, and judged against exact counterfactuals.

The images are drawn for this purpose (Node.js is needed, see docs/pixelface.md): neither those that figures are reported on nor
those that are trained on. python -m benchmarks.ablation --out benchmarks/results/ablation.json
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import typer
from torch import Tensor

from benchmarks.deviations import BARS, DOMAIN, moved, train
from jobs.evaluate import machine
from jobs.progress import console, display
from jobs.rebuild import groups
from jobs.tables import count_table
from models.attributes import attributes_of
from models.pixelface.avatars import Avatar, render, with_factor
from models.trim import trimmed
from models.unet import load_base
from pipeline import codec, schema
from pipeline.truth import edit_scores

ATTRIBUTES = ("hat", "red_hair")
SEED, AVATARS = 4, 64
STEPS_DOWN = 10
"""Half of the recipe's own: edits hardly differ, and there are many to make."""
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "another seed": {"seed": 1},
    "no trim": {"trim": 0.0},
    "trained without trim, trimmed": {"trained_trim": 0.0},
    "no choice": {"choice_weight": 0.0},
    "three times the choice": {"choice_weight": 3 * DOMAIN.tuning.choice_weight},
    "no warm-up": {"warmup": 0},
    "distance l1": {"distance": "l1"},
    "half the weight of the distance": {"l1_factor": 0.5},
    "twice the weight of the distance": {"l1_factor": 2.0},
    "CLIP sees the image itself": {"views": 1},
    "the first 64 images": {"choose_from": 0},
    "32 images, twice the epochs": {"images": 32, "epochs": 14, "learning_rate_growth": 0.933},
    "form log": {"form": "log"},
    "reference reconstruction": {"reference": "reconstruction"},
    "batch 8, half as many steps": {"batch": 8, "warmup": 8},
    "6 rungs": {"steps_down": 6},
    "rank 32": {"rank": 32},
    "full network, rate 5e-5": {"rank": None, "learning_rate": 5e-5},
    "return step 300": {"return_step": 300},
    "return step 500": {"return_step": 500},
    "two CLIPs": {"clips": (DOMAIN.clip, DOMAIN.scoring_clip)},
}


def pictures(avatars: list[Avatar]) -> Tensor:
    return codec.to_tensor([picture.transpose(2, 0, 1) for picture in render(avatars)])


def measured(name: str, changes: dict[str, Any], avatars: list[Avatar], images: int) -> dict[str, Any]:
    """One edit model, made with the recipe but for ``changes``, on avatars that lack the attribute."""
    rest = dict(changes)
    attribute = attributes_of(DOMAIN.family)[name]
    assert attribute.changes is not None
    recipe = replace(DOMAIN.recipe, **{part: rest.pop(part) for part in ("return_step", "trim") if part in rest})
    clips, trained = rest.pop("clips", (DOMAIN.clip,)), replace(recipe, trim=rest.pop("trained_trim", recipe.trim))
    of_kind = replace(DOMAIN.tuning, **dict(attribute.tuning))
    own = {"l1_weight": of_kind.l1_weight * rest.pop("l1_factor", 1.0)}
    data = schema.image_bytes(pq.read_table(DOMAIN.tuning_images)["image"])
    x0, base = codec.to_tensor([codec.decode(d, DOMAIN.image_size) for d in data]), load_base(DOMAIN.weights)
    latents = moved(base, x0, recipe.up(BARS), recipe.order)
    model = train(attribute, replace(of_kind, **{**own, **rest}), latents, x0, trained, clips)
    factor, value = attribute.changes
    without = [a for a in avatars if a["factors"][factor] != value][:images]
    source, target = pictures(without), pictures([with_factor(a, factor, value) for a in without])
    latents = moved(base, source, recipe.up(BARS), recipe.order)
    after = moved(model, latents, replace(recipe, steps_down=STEPS_DOWN).down(BARS), recipe.order).clamp(-1, 1)
    after = trimmed(after, source, recipe.trim)
    return edit_scores(DOMAIN, attribute, source, after, target)


def main(
    images: int = 40,
    attribute: Annotated[list[str] | None, typer.Option()] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only those whose name begins like this.")] = None,
    threads: int = 2,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Prints success, other factors kept and change outside the attribute's region for every variant and attribute."""
    torch.set_num_threads(threads)
    avatars = list(groups(AVATARS, 0, seed=SEED))
    names = [v for v in VARIANTS if not variant or any(v.startswith(start) for start in variant)]
    wanted = [(v, a) for v in names for a in attribute or ATTRIBUTES]
    results, lines = [], []
    with display("ablation", len(wanted), "edit models") as shown:
        for v, name in wanted:
            scores = measured(name, VARIANTS[v], avatars, images)
            results.append({"variant": v, **scores})
            lines.append((f"{name}: {v}", "success {success:.3f}, kept {kept:.3f}, outside {outside:.3f}".format(**scores)))
            shown.update(len(results), ": ".join(lines[-1]))
            if out:
                report = {"machine": machine(), "seed": SEED, "steps_down": STEPS_DOWN, "results": results}
                out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(count_table(f"{images} images at most", lines))


if __name__ == "__main__":
    typer.run(main)
