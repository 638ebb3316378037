"""What each part of the embedded domain's recipe does: it is changed one part at a time, and judged against exact counterfactuals.

The images are drawn for this purpose (Node.js is needed, see docs/pixelface.md): neither those that figures are reported on nor
those that are trained on. Fine-tuning differs from seed to seed by as much as many a part does, so each variant is made with several.
python -m benchmarks.ablation --out benchmarks/results/ablation.json
"""

import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
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
from models.recipe import LOW_RANK_RATE, Recipe
from models.trim import trimmed
from models.unet import load_base
from pipeline import codec, schema
from pipeline.truth import edit_scores

ATTRIBUTES = ("hat", "black_hair")
DRAWN_WITH, AVATARS = 4, 64
STEPS_DOWN = 10
"""Half of the recipe's own: edits hardly differ, and there are many to make."""
VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "no trim": {"trim": 0.0},
    "no moving average": {"ema": 0.0},
    "no choice": {"choice_weight": 0.0},
    "choice without a lead": {"choice_lead": 0.0},
    "choice with the whole lead": {"choice_lead": 1.0},
    "twice the choice": {"choice_weight": 2 * DOMAIN.tuning.choice_weight},
    "no warm-up": {"warmup": 0},
    "distance l1": {"distance": "l1"},
    "half the weight of the distance": {"l1_weight": 0.5 * DOMAIN.tuning.l1_weight},
    "twice the weight of the distance": {"l1_weight": 2 * DOMAIN.tuning.l1_weight},
    "CLIP sees the image itself": {"views": 1},
    "the first 96 images": {"choose_from": 0},
    "48 images, twice the epochs": {"images": 48, "epochs": 12, "learning_rate_growth": 0.911},
    "form log": {"form": "log"},
    "reference reconstruction": {"reference": "reconstruction"},
    "batch 4, twice as many steps": {"batch": 4, "warmup": 48},
    "batch 16, half as many steps": {"batch": 16, "warmup": 12},
    "6 rungs": {"steps_down": 6},
    "ladder linspace": {"spacing": "linspace"},
    "rank 32": {"rank": 32},
    "full network, a twentieth of the rate": {"rank": None, "learning_rate": DOMAIN.tuning.learning_rate / LOW_RANK_RATE},
    "return step 300": {"return_step": 300},
    "return step 500": {"return_step": 500},
    "two CLIPs": {"clips": (DOMAIN.clip, DOMAIN.scoring_clip)},
}
COLUMNS = {"kept": "kept", "outside": "outside", "to the truth": "to_counterfactual", "scoring CLIP": "scoring_clip_direction"}


def pictures(avatars: list[Avatar]) -> Tensor:
    return codec.to_tensor([picture.transpose(2, 0, 1) for picture in render(avatars)])


@cache
def drawn() -> tuple[list[Avatar], Tensor]:
    avatars = list(groups(AVATARS, 0, seed=DRAWN_WITH))
    return avatars, pictures(avatars)


@cache
def inverted(recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """The images to tune with, their latents, and those of the drawn avatars."""
    base = load_base(DOMAIN.weights)
    data = schema.image_bytes(pq.read_table(DOMAIN.tuning_images)["image"])
    x0 = codec.to_tensor([codec.decode(d, DOMAIN.image_size) for d in data])
    latents, of_avatars = (moved(base, x, recipe.up(BARS), recipe.order) for x in (x0, drawn()[1]))
    return x0, latents, of_avatars


def measured(name: str, variant: str, seed: int, images: int) -> dict[str, Any]:
    """One edit model, made with the recipe but for one part, on at most ``images`` avatars that lack the attribute."""
    rest = dict(VARIANTS[variant])
    attribute = attributes_of(DOMAIN.family)[name]
    assert attribute.changes is not None
    recipe = replace(DOMAIN.recipe, **{part: rest.pop(part) for part in ("return_step", "spacing", "trim") if part in rest})
    clips = rest.pop("clips", (DOMAIN.clip,))
    tuning = replace(DOMAIN.tuning, seed=seed, **rest)
    x0, latents, of_avatars = inverted(replace(recipe, trim=0.0))
    model = train(attribute, tuning, latents, x0, recipe, clips)
    factor, value = attribute.changes
    avatars, sources = drawn()
    rows = [i for i, avatar in enumerate(avatars) if avatar["factors"][factor] != value][:images]
    source, target = sources[rows], pictures([with_factor(avatars[i], factor, value) for i in rows])
    after = moved(model, of_avatars[rows], replace(recipe, steps_down=STEPS_DOWN).down(BARS), recipe.order).clamp(-1, 1)
    scores = edit_scores(DOMAIN, attribute, source, trimmed(after, source, recipe.trim), target)
    return {"variant": variant, "seed": seed, **scores}


def over_seeds(results: list[dict[str, Any]]) -> str:
    success = [r["success"] for r in results]
    others = ", ".join(f"{title} {mean(r[key] for r in results):.3f}" for title, key in COLUMNS.items())
    return f"success {mean(success):.2f} ({min(success):.2f} to {max(success):.2f}), {others}"


def main(
    images: int = 40,
    attribute: Annotated[list[str] | None, typer.Option()] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only those whose name begins like this.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Edit models of each variant.")] = 3,
    processes: Annotated[int, typer.Option(min=1, help="Edit models that are made at a time, with one thread each.")] = 2,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Prints for every variant and attribute the mean over the seeds, and of success the least and the greatest too."""
    names = [v for v in VARIANTS if not variant or any(v.startswith(start) for start in variant)]
    if not names:
        raise typer.BadParameter(f"no variant begins like that; there are {', '.join(VARIANTS)}")
    if unknown := set(attribute or ()) - attributes_of(DOMAIN.family).keys():
        raise typer.BadParameter(f"unknown attribute {', '.join(unknown)}; there are {', '.join(attributes_of(DOMAIN.family))}")
    wanted = [(a, v, seed) for seed in range(seeds) for a in attribute or ATTRIBUTES for v in names]
    results: list[dict[str, Any]] = []
    with (
        display("ablation", len(wanted), "edit models") as shown,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        for done in as_completed([pool.submit(measured, *one, images) for one in wanted]):
            results.append(done.result())
            shown.update(len(results), "{attribute}: {variant}: success {success:.2f}".format(**results[-1]))
            if out:
                report = {"machine": machine(), "drawn_with": DRAWN_WITH, "steps_down": STEPS_DOWN}
                in_order = sorted(results, key=lambda r: wanted.index((r["attribute"], r["variant"], r["seed"])))
                out.write_text(json.dumps({**report, "results": in_order}, indent=2) + "\n")
    lines = []
    for a in attribute or ATTRIBUTES:
        for v in names:
            lines.append((f"{a}: {v}", over_seeds([r for r in results if (r["attribute"], r["variant"]) == (a, v)])))
    console.print(count_table(f"{images} images at most, {seeds} seeds", lines))


if __name__ == "__main__":
    typer.run(main)
