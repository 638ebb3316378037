"""Pictures of another style brought into the embedded domain by projection: drawings of a few strokes, and smooth shaded faces.

python -m benchmarks.unseen --out docs/unseen.png
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from models.diffusion import project, walk
from models.domains import DOMAINS
from models.pixelface.judge import load_judge
from models.unet import load_alpha_bars, load_base
from pipeline import codec

DOMAIN = DOMAINS["pixelface"]
TIMES, STEP, STEPS = 4, 500, 12
"""How often pictures are projected, to what timestep, on how many rungs."""
SIDE = 256
COLORS = {
    "skin": ("#ffdbac", "#cb9e6e", "#8d5524"),
    "hair": ("#1c1c1c", "#734b22", "#e8c65a", "#cc3311", "#bcbcbc"),
    "clothes": ("#428bca", "#44c585", "#d11141", "#ffc425"),
    "background": ("#b6e3f4", "#c0aede", "#ffd5dc", "#d1f4d9"),
}


def strokes(rng: np.random.Generator) -> Image.Image:
    """A face as somebody draws it with a mouse: thick, shaky lines on a plain ground."""
    color = {name: str(rng.choice(values)) for name, values in COLORS.items()}
    image = Image.new("RGB", (SIDE, SIDE), color["background"])
    pen = ImageDraw.Draw(image)

    def line(points: list[tuple[float, float]], fill: str, width: int) -> None:
        shaken = [(x + rng.normal(0, 4), y + rng.normal(0, 4)) for x, y in points]
        pen.line(shaken, fill=fill, width=width, joint="curve")

    line([(40, 240), (90, 222), (166, 222), (216, 240)], color["clothes"], 44)
    for y in range(80, 200, 20):
        line([(72, y), (128, y + 4), (184, y)], color["skin"], 26)
    line([(62, 120), (64, 60), (128, 40), (192, 60), (194, 120)], color["hair"], 34)
    for x in (100, 156):
        line([(x - 8, 118), (x + 8, 118)], "#303030", 14)
    smile = 12 if rng.random() < 0.5 else -12
    line([(100, 170), (128, 170 + smile), (156, 170)], "#c8283c", 12)
    return image


def shaded(rng: np.random.Generator) -> Image.Image:
    """A face of soft, shaded shapes, as a photograph shrunk to 32x32 has them."""
    color = {name: str(rng.choice(values)) for name, values in COLORS.items()}
    image = Image.new("RGB", (SIDE, SIDE), color["background"])
    pen = ImageDraw.Draw(image)
    pen.ellipse((30, 200, 226, 330), fill=color["clothes"])
    pen.ellipse((52, 24, 204, 214), fill=color["hair"])
    pen.ellipse((66, 60, 190, 214), fill=color["skin"])
    for x in (100, 156):
        pen.ellipse((x - 13, 108, x + 13, 126), fill="white")
        pen.ellipse((x - 7, 110, x + 7, 124), fill="#405060")
    pen.ellipse((102, 164, 154, 184), fill="#c8283c")
    image = image.filter(ImageFilter.GaussianBlur(7))
    light = np.linspace(1.12, 0.8, SIDE)[None, :, None]
    noise = rng.normal(0, 6, (SIDE, SIDE, 1))
    return Image.fromarray(np.clip(np.asarray(image) * light + noise, 0, 255).astype(np.uint8))


def tensors(images: list[Image.Image]) -> Tensor:
    size = DOMAIN.image_size
    small = [np.asarray(i.resize((size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1) for i in images]
    return codec.to_tensor(small)


@torch.no_grad()
def brought(x0: Tensor) -> Tensor:
    """Pictures as ``invert --project`` and a walk down without an edit leave them, in [-1, 1]."""
    recipe = replace(DOMAIN.recipe, projections=TIMES, projection_step=STEP, projection_steps=STEPS)
    model, alpha_bars = load_base(DOMAIN.weights), load_alpha_bars(DOMAIN.weights)
    fresh = torch.Generator().manual_seed(0)
    x0 = project(model, x0, recipe.projection(alpha_bars), alpha_bars, TIMES, lambda _: torch.randn(x0.shape, generator=fresh))
    latent = walk(model, x0, recipe.up(alpha_bars), alpha_bars, recipe.order)
    return walk(model, latent, recipe.down(alpha_bars), alpha_bars, recipe.order).clamp(-1, 1)


def confidence(images: Tensor) -> Tensor:
    """(N,) the judge's least confidence in any factor."""
    assert DOMAIN.judge is not None
    with torch.no_grad():
        best = [logits.softmax(1).amax(1) for logits in load_judge(DOMAIN.judge)(images).values()]
    return torch.stack(best).amin(0)


def main(count: int = 8, threads: int = 2, out: Annotated[Path | None, typer.Option()] = None) -> None:
    """Prints how sure the judge is of every factor before and after; the picture has each style above what became of it."""
    torch.set_num_threads(threads)
    rng, rows = np.random.default_rng(0), []
    for name, draw in (("strokes", strokes), ("shaded", shaded)):
        before = tensors([draw(rng) for _ in range(count)])
        after = brought(before)
        sure = [float((confidence(x) >= 0.8).float().mean()) for x in (before, after)]
        print(f"{name}: the judge is sure of every factor in {sure[0]:.2f} before, {sure[1]:.2f} after, of {count} pictures")
        rows += [before, after]
    if out:
        pictures = np.concatenate([np.concatenate(list(codec.to_pictures(row)), 2) for row in rows], 1).transpose(1, 2, 0)
        Image.fromarray(pictures).resize((pictures.shape[1] * 3, pictures.shape[0] * 3), Image.Resampling.NEAREST).save(out)


if __name__ == "__main__":
    typer.run(main)
