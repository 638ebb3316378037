"""The embedded domain for the eye: every ready-made edit beside its exact counterfactual, and pictures from noise alone.

python -m benchmarks.gallery --edits docs/edits.png --samples docs/samples.png
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jobs.progress import display
from jobs.requests import edit_models
from jobs.showpiece import SAMPLE_STEPS
from models.diffusion import walk
from models.domains import DOMAINS
from models.unet import load_alpha_bars, load_base
from pipeline import codec
from pipeline.quality import held_out_ids, held_out_pictures, recognised, sample
from pipeline.summary import spread
from pipeline.truth import edited, targets

DOMAIN = DOMAINS["pixelface"]
TIMES, GAP, LABEL = 2, 8, 100
"""How much larger pictures are shown, between groups of them, and what is left for a name; the last two in pixels of the picture."""
PAPER, INK, FRAME = "white", "#333333", "#e0218a"


def images_of(pictures: Tensor) -> list[Image.Image]:
    """float32 (N, 3, H, W) in [-1, 1], each pixel as a square."""
    shown = (Image.fromarray(picture.transpose(1, 2, 0)) for picture in codec.to_pictures(pictures))
    return [image.resize((image.width * TIMES, image.height * TIMES), Image.Resampling.NEAREST) for image in shown]


@torch.no_grad()
def triples(files: dict[str, str], faces: int) -> Iterable[tuple[str, list[list[Image.Image]]]]:
    """For every edit some held-out images that lack the attribute: as they are, edited, and as the generator draws the edit."""
    ids, x0 = held_out_ids(DOMAIN), held_out_pictures(DOMAIN)[0]
    base, alpha_bars, recipe = load_base(DOMAIN.weights), load_alpha_bars(DOMAIN.weights), DOMAIN.recipe
    with display("edits", len(files), "attributes") as shown:
        for number, (name, file) in enumerate(files.items(), 1):
            rows, truth = targets(DOMAIN, name, ids)
            some = spread(len(rows), faces)
            source = x0[[rows[i] for i in some]]
            latents = walk(base, source, recipe.up(alpha_bars), alpha_bars, recipe.order)
            after = edited(DOMAIN, [file], 1.0, source, latents, lambda _: None)
            yield name, [list(group) for group in zip(images_of(source), images_of(after), images_of(truth[some]), strict=True)]
            shown.update(number, name)


def table_of_edits(bands: list[tuple[str, list[list[Image.Image]]]]) -> Image.Image:
    """A line for each edit: its name, then groups of source, edited image and truth."""
    side, groups = bands[0][1][0][0].width, len(bands[0][1])
    width, font = 3 * side + GAP, ImageFont.load_default(13)
    page = Image.new("RGB", (LABEL + groups * width, 20 + len(bands) * (side + GAP)), PAPER)
    pen = ImageDraw.Draw(page)
    for group in range(groups):
        for column, title in enumerate(("source", "edit", "truth")):
            pen.text((LABEL + group * width + column * side + side / 2, 10), title, INK, font, "mm")
    for line, (name, found) in enumerate(bands):
        top = 20 + line * (side + GAP)
        pen.text((LABEL - GAP, top + side / 2), name.replace("_", " "), INK, font, "rm")
        for group, three in enumerate(found):
            for column, image in enumerate(three):
                page.paste(image, (LABEL + group * width + column * side, top))
    return page


def table_of_samples(pictures: Tensor, sure: list[bool], columns: int) -> Image.Image:
    """Pictures from noise in a grid; a frame is around those of which the judge is not sure in every factor."""
    images, frame = images_of(pictures), GAP // 2
    step = images[0].width + GAP
    page = Image.new("RGB", (columns * step, int(np.ceil(len(images) / columns)) * step), PAPER)
    pen = ImageDraw.Draw(page)
    for place, (image, certain) in enumerate(zip(images, sure, strict=True)):
        left, top = place % columns * step, place // columns * step
        if not certain:
            pen.rectangle((left, top, left + step - 1, top + step - 1), FRAME)
        page.paste(image, (left + frame, top + frame))
    return page


def main(
    edits: Annotated[Path | None, typer.Option(help="Where the picture of edits goes.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Where the picture of pictures from noise goes.")] = None,
    faces: Annotated[int, typer.Option(min=1, help="Of each edit.")] = 4,
    count: Annotated[int, typer.Option(min=1, help="Of pictures from noise.")] = 50,
    threads: int = 2,
) -> None:
    """Writes one or both pictures."""
    torch.set_num_threads(threads)
    if edits:
        table_of_edits(list(triples(edit_models(DOMAIN, []), faces))).save(edits)
    if samples:
        with display("pictures from noise", count, "images") as shown:
            pictures = sample(DOMAIN, count, SAMPLE_STEPS, shown.update)
        table_of_samples(pictures, recognised(DOMAIN, pictures).tolist(), 10).save(samples)


if __name__ == "__main__":
    typer.run(main)
