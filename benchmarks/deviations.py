"""What each choice of the fine-tuning, of mixes and of the walk changes, on the embedded domain.

python -m benchmarks.deviations --out benchmarks/results/deviations.json

Trainings take a minute or more each; ``--only PART`` (walk, details, mixes, fine_tuning) measures it again and keeps the rest.
"""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from enum import StrEnum
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from jobs.evaluate import machine
from jobs.progress import console, display
from jobs.requests import make_edits
from jobs.tables import count_table
from models import lora, losses
from models.attributes import Attribute, attributes_of
from models.clip import Clip, alternatives, load_clip, templates
from models.diffusion import NoiseModel, alpha_bar_at, blend, noised, predicted_x0, project, stochastic_walk, timesteps, walk
from models.domains import DOMAINS
from models.finetune import Objective, finetune, lacking, references, start_training
from models.metrics import directional_score, mean_absolute_error
from models.pixelface.judge import load_judge
from models.recipe import Recipe, Tuning
from models.unet import load_alpha_bars, load_base, load_edit_model, trainable
from pipeline import codec, schema
from pipeline.quality import held_out_pictures
from pipeline.stages import row_noise


class Part(StrEnum):
    """Of the file."""

    walk = "walk"
    details = "details"
    mixes = "mixes"
    fine_tuning = "fine_tuning"


DOMAIN = DOMAINS["pixelface"]
BARS = load_alpha_bars(DOMAIN.weights)
OFFICIAL = Tuning(l1_weight=6.0)
"""What every variant changes: the official code's way to train, with an L1 weight that suits the domain. The domain's own recipe
has several of these changes at once; docs/pixelface.md says which."""
ATTRIBUTES = ("glasses", "smiling", "red_hair")
FEW = 32
VARIANTS: dict[str, dict[str, Any]] = {
    "default (log, source, full network, whole walk)": {},
    "form cosine (1 - cos)": {"form": "cosine"},
    "reference reconstruction": {"reference": "reconstruction"},
    "memory stepwise, as many epochs": {"memory": "stepwise"},
    "memory stepwise, as many optimizer steps": {"memory": "stepwise", "epochs": 1},
    "rank 8": {"rank": 8, "learning_rate": 1e-3},
    "batch 1, learning rate grows by 1.3": {"batch": 1, "epochs": 5, "learning_rate": 8e-6, "learning_rate_growth": 1.3},
    "moving average 0.9": {"ema": 0.9},
}


def train(
    attribute: Attribute, tuning: Tuning, latents: Tensor, x0: Tensor, recipe: Recipe, clips: Sequence[str] = (DOMAIN.clip,)
) -> NoiseModel:
    """An edit model of one attribute, made in this process as ``pipeline.training`` makes it on a worker."""
    networks = [load_clip(clip) for clip in clips]
    model = deepcopy(load_base(DOMAIN.weights))
    if tuning.rank is not None:
        lora.add(model.unet, tuning.rank, tuning.seed)
    else:
        for parameter in trainable(model):
            parameter.requires_grad_(True)
    objective = Objective(
        clips=tuple((clip, clip.text_direction(attribute.source, attribute.target)) for clip in networks),
        path=replace(recipe, steps_down=tuning.steps_down).down(BARS),
        alpha_bars=BARS,
        order=recipe.order,
        tuning=tuning,
    )
    chosen = lacking(x0, objective, tuning.images) if tuning.choose_from else torch.arange(min(len(x0), tuning.images))
    latents, x0 = latents[chosen], x0[chosen]
    training = start_training(model, tuning)
    for _ in finetune(training, latents, references(model, latents, x0, objective), objective):
        pass
    training.finish()
    return model.requires_grad_(False)


def judge(name: str, before: Tensor, after: Tensor) -> dict[str, float]:
    """Success among the images that lacked the attribute, other factors kept, distance, directional similarity."""
    attribute, network, clip = attributes_of(DOMAIN.family)[name], load_judge(DOMAIN.judge), load_clip(DOMAIN.clip)  # type: ignore[arg-type]
    assert attribute.changes is not None
    factor, value = attribute.changes
    was, became = network.read(before), network.read(after)
    reached = [b[factor] == value for a, b in zip(was, became, strict=True) if a[factor] != value]
    kept = [a[other] == b[other] for a, b in zip(was, became, strict=True) for other in a if other != factor]
    direction = clip.text_direction(attribute.source, attribute.target)
    return {
        "success": sum(reached) / len(reached),
        "kept": sum(kept) / len(kept),
        "mae": float(mean_absolute_error(before, after).mean()),
        "clip_direction": float(directional_score(clip, before, after, direction).mean()),
    }


@torch.no_grad()
def moved(model: NoiseModel, x: Tensor, path: list[int], order: int) -> Tensor:
    return torch.cat([walk(model, part, path, BARS, order) for part in x.split(32)])


def fine_tuning(images: int, names: list[str]) -> list[dict[str, Any]]:
    """Every variant of the training for every attribute, judged on the same held-out images."""
    recipe, base = DOMAIN.recipe, load_base(DOMAIN.weights)
    data = schema.image_bytes(pq.read_table(DOMAIN.tuning_images)["image"].slice(0, OFFICIAL.images))
    x0, unseen = codec.to_tensor([codec.decode(d, DOMAIN.image_size) for d in data]), held_out_pictures(DOMAIN)[0][:images]
    latents, unseen_latents = (moved(base, pictures, recipe.up(BARS), recipe.order) for pictures in (x0, unseen))
    results: list[dict[str, Any]] = []
    with display("fine-tuning variants", len(VARIANTS) * len(names), "edit models") as shown:
        for variant, changes in VARIANTS.items():
            for name in names:
                model = train(attributes_of(DOMAIN.family)[name], replace(OFFICIAL, **changes), latents, x0, recipe)
                edited = moved(model, unseen_latents, recipe.down(BARS), recipe.order).clamp(-1, 1)
                results.append({"variant": variant, "attribute": name, **judge(name, unseen, edited)})
                shown.update(len(results), f"{name}: {variant}")
    return results


# ---- mixes -----------------------------------------------------------------------------------------------------------

MIXED = ("glasses", "smiling")
MIXES = {
    "halves (the paper's)": "glasses=0.5,smiling=0.5",
    "one and one": "glasses=1,smiling=1",
    "by range: one above timestep 200, the other below": "0:smiling=1,base=0;200:glasses=1,base=0",
}


@torch.no_grad()
def mixes(images: int) -> list[dict[str, Any]]:
    """How often two ready-made edit models in one walk reach both attributes, among the images that lacked both."""
    recipe, base, unseen = DOMAIN.recipe, load_base(DOMAIN.weights), held_out_pictures(DOMAIN)[0][:images]
    latents, network = moved(base, unseen, recipe.up(BARS), recipe.order), load_judge(DOMAIN.judge)  # type: ignore[arg-type]
    changes = [attributes_of(DOMAIN.family)[name].changes for name in MIXED]
    wanted = dict(change for change in changes if change is not None)
    was, results = network.read(unseen), []
    for title, text in MIXES.items():
        (edit,) = make_edits(DOMAIN, [], [text], [1.0], [])
        models = [base, *(load_edit_model(DOMAIN.weights, part.file) for part in edit.parts)]
        after = moved(blend(models, edit.weights), latents, recipe.down(BARS), recipe.order).clamp(-1, 1)
        became = network.read(after)
        lacked = [b for a, b in zip(was, became, strict=True) if all(a[factor] != value for factor, value in wanted.items())]
        kept = [a[other] == b[other] for a, b in zip(was, became, strict=True) for other in a if other not in wanted]
        results.append(
            {
                "mix": title,
                "text": text,
                "images": len(lacked),
                "both": sum(all(b[factor] == value for factor, value in wanted.items()) for b in lacked) / len(lacked),
                "kept": sum(kept) / len(kept),
                "mae": float(mean_absolute_error(unseen, after).mean()),
            }
        )
    return results


# ---- the walk --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def official_ddpm(model: NoiseModel, x: Tensor, path: list[int], draw: Callable[[int], Tensor]) -> Tensor:
    """The official code's ``ddpm`` sampling: at every rung the posterior of a single timestep, whatever was skipped."""
    for i, rung in enumerate(path[:-1]):
        level, below = alpha_bar_at(BARS, rung), alpha_bar_at(BARS, rung - 1) if rung > 0 else 1.0
        beta = 1 - level / below
        clean = predicted_x0(x, model(x, timesteps(x, rung)), level)
        x = sqrt(below) * beta / (1 - level) * clean + sqrt(1 - beta) * (1 - below) / (1 - level) * x
        if rung > 0:
            x = x + sqrt(beta * (1 - below) / (1 - level)) * draw(i)
    return x


def the_walk(images: int) -> dict[str, Any]:
    """Effects that need no training."""
    recipe, base, unseen = DOMAIN.recipe, load_base(DOMAIN.weights), held_out_pictures(DOMAIN)[0][:images]
    latents = moved(base, unseen, recipe.up(BARS), recipe.order)
    down = recipe.down(BARS)

    def error(pictures: Tensor) -> float:
        return float(mean_absolute_error(unseen, pictures.clamp(-1, 1)).mean())

    def draw(i: int) -> Tensor:
        return torch.randn(latents.shape, generator=torch.Generator().manual_seed(i))

    with torch.no_grad():
        ours = stochastic_walk(base, latents, down, BARS, 1.0, draw)
    clip = load_clip(DOMAIN.clip)
    return {
        "round_trip_float32_latents": error(moved(base, latents, down, recipe.order)),
        "round_trip_float16_latents": error(moved(base, latents.half().float(), down, recipe.order)),
        "eta_1_over_skipped_steps": error(ours),
        "official_ddpm_over_skipped_steps": error(official_ddpm(base, latents, down, draw)),
        "cosine_of_text_directions": {a.name: text_cosine(clip, a) for a in attributes_of(DOMAIN.family).values()},
        "return_step": recipe.return_step,
        "steps": recipe.steps_down,
    }


@torch.no_grad()
def details(images: int) -> dict[str, float]:
    """What the solver and the rungs of each way change, where fresh noise starts, and how edit models are stored. Few images: these
    are means of differences between pictures, not shares of them."""
    recipe, base, unseen = DOMAIN.recipe, load_base(DOMAIN.weights), held_out_pictures(DOMAIN)[0][: min(images, FEW)]
    latents = moved(base, unseen, recipe.up(BARS), recipe.order)
    tuned, level = replace(recipe, steps_down=OFFICIAL.steps_down), alpha_bar_at(BARS, recipe.return_step)
    official = replace(recipe, solver="ddim", spacing="linspace")
    draw = row_noise([str(i) for i in range(len(unseen))], unseen, 0, "deviations")
    levels = (level, alpha_bar_at(BARS, recipe.return_step - 1))
    here, there = (moved(base, noised(unseen, draw(0), at), recipe.down(BARS), recipe.order).clamp(-1, 1) for at in levels)
    projected = {
        steps: project(base, unseen, replace(recipe, projection_steps=steps).projection(BARS), BARS, 2, draw).clamp(-1, 1)
        for steps in (6, 12)
    }

    def between(one: Tensor, other: Tensor) -> float:
        return float(mean_absolute_error(one, other.clamp(-1, 1)).mean())

    return {
        "images": float(len(unseen)),
        "round_trip": between(unseen, moved(base, latents, recipe.down(BARS), recipe.order)),
        "official_ends_with_these_steps": between(unseen, there_and_back(official, unseen)),
        "down_with_ddim_from_ab2_latents": between(unseen, moved(base, latents, recipe.down(BARS), 1)),
        "up_and_down_with_ddim": between(unseen, there_and_back(replace(recipe, solver="ddim"), unseen)),
        "noise_at_the_step_below": between(here, there),
        "projections_6_rungs_from_source": between(unseen, projected[6]),
        "projections_12_rungs_from_source": between(unseen, projected[12]),
        "projections_6_rungs_from_12": between(projected[6], projected[12]),
        "training_walk_ab2_sigma": between(unseen, moved(base, latents, tuned.down(BARS), tuned.order)),
        "training_walk_ddim_linspace": between(
            unseen, moved(base, latents, replace(official, steps_down=OFFICIAL.steps_down).down(BARS), 1)
        ),
        "edit_model_as_float16": between(*(moved(m, latents, recipe.down(BARS), recipe.order).clamp(-1, 1) for m in merged_and_rounded())),
        "gradient_without_least_change": gradient_without_least_change(unseen),
    }


def there_and_back(recipe: Recipe, pictures: Tensor) -> Tensor:
    base = load_base(DOMAIN.weights)
    return moved(base, moved(base, pictures, recipe.up(BARS), recipe.order), recipe.down(BARS), recipe.order)


def merged_and_rounded() -> tuple[NoiseModel, NoiseModel]:
    """The glasses edit as a whole network: base and low-rank weights added up in float32, and that rounded to float16 as an edit model of
    the whole network is stored. (The base model's own weights are float16 already.)"""
    merged = load_edit_model(DOMAIN.weights, f"{DOMAIN.edits}/glasses.safetensors")
    rounded = deepcopy(merged)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.half().float())
    return merged, rounded


@torch.enable_grad()
def gradient_without_least_change(pictures: Tensor) -> float:
    """How many times as long the gradient of the CLIP loss is without ``LEAST_CHANGE``, at pictures whose pixels are 0.001 from their
    references: where a training starts."""
    clip, norms = load_clip(DOMAIN.clip), []
    near = pictures + 0.002 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)).sign()
    before = clip.image_features(pictures).detach()
    direction = clip.text_direction("face without glasses", "face with glasses")(before)
    for least in (0.0, losses.LEAST_CHANGE):
        at = near.clone().requires_grad_(True)
        change = clip.image_features(at) - before
        length = change.square().sum(-1).clamp_min(least**2).sqrt()
        (gradient,) = torch.autograd.grad(losses.directional_loss((change * direction).sum(1) / length), at)
        norms.append(float(gradient.flatten(1).norm(dim=1).mean()))
    return norms[0] / norms[1]


@torch.no_grad()
def readings(images: int) -> dict[str, float]:
    """What half precision, a resize that is not antialiased and a wrong text change in CLIP's reading of edits, and TF32 in the walk."""
    domain_clip, unseen = load_clip(DOMAIN.clip), held_out_pictures(DOMAIN)[0][:images]
    recipe, base = DOMAIN.recipe, load_base(DOMAIN.weights)
    edited = moved(
        load_edit_model(DOMAIN.weights, f"{DOMAIN.edits}/glasses.safetensors"),
        moved(base, unseen, recipe.up(BARS), recipe.order),
        recipe.down(BARS),
        recipe.order,
    ).clamp(-1, 1)
    whole = change(domain_clip, unseen, edited)
    half = deepcopy(domain_clip).bfloat16()
    large = [F.interpolate(x, scale_factor=2.5, mode="bicubic", antialias=True) for x in (unseen, edited)]
    sharp = [F.interpolate(x, unseen.shape[-2:], mode="bicubic", antialias=False) for x in large]
    rounded = deepcopy(base)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.copy_(tf32(module.weight))
            module.register_forward_pre_hook(lambda _, inputs: tuple(tf32(x) for x in inputs))
    back = []
    for model in (base, rounded):
        latents = moved(model, unseen, recipe.up(BARS), recipe.order)
        back.append(moved(model, latents, recipe.down(BARS), recipe.order).clamp(-1, 1))
    seen = domain_clip.image_features(unseen[:1])
    grey, red = (domain_clip.text_direction("person", f"person with {color} hair")(seen)[0] for color in ("grey", "red"))
    return {
        "clip_change_cosine_bfloat16": cosine(whole, change(half, unseen.bfloat16(), edited.bfloat16()).float()),
        "clip_change_cosine_not_antialiased": cosine(change(domain_clip, *large), change(domain_clip, *sharp)),
        "round_trip_tf32": float(mean_absolute_error(unseen, back[1]).mean()),
        "round_trip_tf32_from_float32": float(mean_absolute_error(*back).mean()),
        "text_cosine_grey_and_red_hair": float(grey @ red),
    }


def change(clip: Clip, before: Tensor, after: Tensor) -> Tensor:
    """(N, D): how CLIP's features of pictures change."""
    return clip.image_features(after) - clip.image_features(before)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one, other).mean())


def tf32(x: Tensor) -> Tensor:
    """float32 rounded to the 10 bits of mantissa that TF32 multiplies, to the nearest, in float32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def text_cosine(clip: Clip, attribute: Attribute) -> float:
    """Between the text direction here (features averaged, then normalised) and the official code's (the mean of the
    differences of normalised features, template by template); of several source texts the first is taken."""
    source, target = alternatives(attribute.source)[0], attribute.target
    with torch.no_grad():
        features = [
            clip.model.encode_text(clip.tokenizer([template.format(text) for template in templates()])) for text in (source, target)
        ]
    before, after = (F.normalize(f, dim=-1).mean(0) for f in features)
    return float(F.cosine_similarity(after - before, clip.text_features(target) - clip.text_features(source), dim=0))


def main(
    images: int = 128,
    attribute: Annotated[list[str] | None, typer.Option()] = None,
    threads: int = 2,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this; keep the rest of the file.")] = None,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Prints mean success, other factors kept, distance and similarity of every variant, and the effects on the walk."""
    torch.set_num_threads(threads)
    if only and not (out and out.exists()):
        raise typer.BadParameter("--only keeps what the file of --out has, and there is none")
    measures: dict[Part, Callable[[], Any]] = {
        Part.walk: lambda: the_walk(images) | readings(images),
        Part.details: lambda: details(images),
        Part.mixes: lambda: mixes(images),
        Part.fine_tuning: lambda: fine_tuning(images, attribute or list(ATTRIBUTES)),
    }
    found = {part.value: measure() for part, measure in measures.items() if not only or part in only}
    report = {"machine": machine(), "images": images, **(json.loads(out.read_text()) if only and out else {}), **found}
    show(found, images)
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n")


def show(found: dict[str, Any], images: int) -> None:
    results = found.get("fine_tuning", [])
    lines, names = [], {r["attribute"] for r in results}
    for variant in VARIANTS if results else ():
        of = [r for r in results if r["variant"] == variant]
        mean = {k: sum(r[k] for r in of) / len(of) for k in ("success", "kept", "mae", "clip_direction")}
        words = "success {success:.3f}, kept {kept:.3f}, MAE {mae:.3f}, CLIP {clip_direction:.3f}"
        lines.append((variant, words.format(**mean)))
    if lines:
        console.print(count_table(f"fine-tuning, mean over {len(names)} attributes, {images} held-out images", lines))
    words = "both {both:.3f} of {images} that lacked both, kept {kept:.3f}, MAE {mae:.3f}"
    if "mixes" in found:
        console.print(count_table(f"mixes of {' and '.join(MIXED)}", [(r["mix"], words.format(**r)) for r in found["mixes"]]))
    for part in ("walk", "details"):
        numbers = [(k.replace("_", " "), f"{v:.5f}") for k, v in found.get(part, {}).items() if isinstance(v, float)]
        if numbers:
            console.print(count_table(f"the walk: {part}", numbers))


if __name__ == "__main__":
    typer.run(main)
