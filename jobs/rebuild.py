"""Rebuilds the embedded domain from nothing: ``python -m jobs.rebuild images``, then ``counterfactuals``, ``diffusion``, ``clip``,
``scoring-clip`` and ``judge``; see docs/pixelface.md.

Training continues from its last checkpoint in the build folder; the edit models are made by ``diffusionclip finetune``.
"""

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import UNet2DModel
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import nn

from jobs.progress import display
from models.attributes import attributes_of
from models.clip import templates
from models.diffusion import linear_alpha_bars
from models.domains import DOMAINS
from models.pixelface import training
from models.pixelface.avatars import FACTORS, Avatar, draw_avatar, flip_one, render, with_factor
from models.pixelface.judge import Judge

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Build = Annotated[Path, typer.Option(help="The folder for pictures and checkpoints.")]
BUILD = Path("build/pixelface")
DOMAIN = DOMAINS["pixelface"]
AVATARS, HELD_OUT, TUNING = 24_000, 1_024, 192
SMALL = ("mouth", "beard")
"""Factors that cover few pixels: CLIP's second phase looks at pairs that differ in them."""
TINT = 0.1
"""By how much channels of CLIP's pictures change in brightness and contrast, so that it follows no tint of a whole picture."""
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": False,
}
CLIP_CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 2, 1], "width": 24, "head_width": 24},
        "text_cfg": {"context_length": 40, "width": 64, "heads": 2, "layers": 3, "vocab_size": 49408},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
SCORING_CLIP_CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 28, "head_width": 28},
        "text_cfg": {"context_length": 40, "width": 64, "heads": 4, "layers": 2, "vocab_size": 49408},
    },
    "preprocess_cfg": CLIP_CONFIG["preprocess_cfg"],
}
"""Of the CLIP that only scores: another network, another seed, other batches, and pictures whose colours change."""


def make_unet() -> Any:
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        attention_head_dim=32,
    )


def make_clip(config: dict[str, Any] = CLIP_CONFIG["model_cfg"]) -> CLIP:
    return CLIP(config["embed_dim"], dict(config["vision_cfg"]), dict(config["text_cfg"]))


# ---- pictures --------------------------------------------------------------------------------------------------------


def groups(count: int, flips: int, seed: int) -> Iterator[Avatar]:
    """Each avatar, then ``flips`` counterfactuals of it in different factors."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        avatar = draw_avatar(rng)
        yield avatar
        changed: set[str] = set()
        while len(changed) < flips:
            flipped, factor = flip_one(avatar, rng)
            if factor not in changed:
                changed.add(factor)
                yield flipped


def draw(avatars: list[Avatar], name: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 3, 32, 32) pictures and int8 (N, 9) factors."""
    pictures = []
    with display(name, len(avatars), "pictures") as shown:
        for start in range(0, len(avatars), 2000):
            pictures += [picture.transpose(2, 0, 1) for picture in render(avatars[start : start + 2000])]
            shown.update(len(pictures))
    factors = [[values.index(avatar["factors"][name]) for name, values in FACTORS.items()] for avatar in avatars]
    return np.stack(pictures), np.array(factors, np.int8)


@app.command()
def images(build: Build = BUILD) -> None:
    """Draw the training pictures and the two Parquet files (four minutes; needs Node.js)."""
    build.mkdir(parents=True, exist_ok=True)
    pictures, factors = draw(list(groups(AVATARS, training.GROUP - 1, seed=1)), "training pictures")
    seen = {picture.tobytes() for picture in pictures}
    np.save(build / "train_images.npy", pictures)
    np.save(build / "train_factors.npy", factors)
    pictures, factors = draw(list(groups(HELD_OUT, 0, seed=2)), "held-out pictures")
    fresh = [row for row in range(len(pictures)) if pictures[row].tobytes() not in seen]
    assert DOMAIN.held_out is not None
    assert DOMAIN.tuning_images is not None
    write_table(DOMAIN.held_out, "avatar", pictures[fresh], factors[fresh])
    pictures, factors = draw(list(groups(TUNING, 0, seed=3)), "tuning pictures")
    write_table(DOMAIN.tuning_images, "tuning", pictures, factors)


@app.command()
def counterfactuals() -> None:
    """Draw every held-out image again for each attribute that it lacks, with that one factor changed (a minute; needs Node.js)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline import codec, schema

    avatars = list(groups(HELD_OUT, 0, seed=2))
    wanted = [
        (row, a)
        for a in attributes_of(DOMAIN.family).values()
        for row in range(HELD_OUT)
        if a.changes and not has(avatars[row], *a.changes)
    ]
    pictures, _ = draw([with_factor(avatars[row], *a.changes) for row, a in wanted if a.changes], "counterfactuals")
    columns = {
        "id": [f"avatar-{row:04d}" for row, _ in wanted],
        "attribute": [a.name for _, a in wanted],
        "image": pa.array([{"bytes": codec.encode_png(picture), "path": None} for picture in pictures], schema.IMAGE),
    }
    assert DOMAIN.counterfactuals is not None
    pq.write_table(pa.table(columns), DOMAIN.counterfactuals, row_group_size=100, compression="zstd")


def has(avatar: Avatar, factor: str, value: str) -> bool:
    return bool(avatar["factors"][factor] == value)


def write_table(file: Path, stem: str, pictures: np.ndarray, factors: np.ndarray) -> None:
    """Pictures with captions and true factors, as Parquet that the Hub viewer shows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline import codec, schema

    truth = [{name: FACTORS[name][value] for name, value in zip(FACTORS, row, strict=True)} for row in factors.tolist()]
    columns = {
        "id": [f"{stem}-{row:04d}" for row in range(len(pictures))],
        "image": pa.array([{"bytes": codec.encode_png(picture), "path": None} for picture in pictures], schema.IMAGE),
        "caption": [describe(values) for values in truth],
        "factors": pa.array(truth),
    }
    table = pa.table(columns)
    features = {f.name: schema.feature(f.type) for f in table.schema}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=32, write_page_index=True)


def describe(truth: dict[str, str]) -> str:
    """A caption that mentions every factor."""
    from models.pixelface.avatars import caption

    return "a " + caption(truth, list(FACTORS), np.random.default_rng(0))


# ---- training --------------------------------------------------------------------------------------------------------


def run(name: str, model: nn.Module, steps: int, rate: float, build: Path, make: Any) -> dict[str, torch.Tensor]:
    """Trains with checkpoints every hundred steps; returns the averaged weights. ``make(optimizer, start)`` yields losses."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "initial_lr": rate}], rate, weight_decay=0.0)
    average, file = training.Ema(model, 0.998), build / f"{name}.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.weights, average.steps = saved["average"], saved["step"]
    with display(name, steps, "steps", before=average.steps) as shown:
        for loss in make(optimizer, average.steps):
            average.update(model)
            shown.update(average.steps, f"loss {loss:.4f}")
            if average.steps % 100 == 0 or average.steps == steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "average": average.weights, "step": average.steps}, file.with_suffix(".new"))
                file.with_suffix(".new").replace(file)
    return average.weights


def half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in weights.items()}


def load_pictures(build: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(build / "train_images.npy", mmap_mode="r"), np.load(build / "train_factors.npy")


@app.command()
def diffusion(
    build: Build = BUILD,
    steps: int = 3000,
    whole_steps: int = 3000,
    last_steps: int = 3000,
    finer_steps: int = 5000,
    finest_steps: int = 8000,
) -> None:
    """Train the diffusion model (four hours on one core): where edits walk, where colours of whole pictures are decided, in between,
    and twice where small things are decided."""
    torch.manual_seed(0)
    pictures, _ = load_pictures(build)
    unet = make_unet()

    def phase(name: str, steps: int, rate: float, **how: Any) -> None:
        def make(optimizer: torch.optim.Optimizer, start: int) -> Iterator[float]:
            bars = linear_alpha_bars()
            return training.train_diffusion(lambda x, t: unet(x, t).sample, optimizer, pictures, bars, steps=steps, start=start, **how)

        unet.load_state_dict(half(run(name, unet, steps, rate, build, make)))

    phase("diffusion", steps, 8e-4)
    phase("diffusion-whole", whole_steps, 6e-4, focus=(400, 1000), most_weight=25.0, seed=1)
    phase("diffusion-last", last_steps, 6e-4, focus=(200, 700), most_weight=9.0, seed=2)
    phase("diffusion-finer", finer_steps, 6e-4, focus=(100, 700), most_weight=9.0, seed=3)
    phase("diffusion-finest", finest_steps, 6e-4, focus=(100, 700), most_weight=9.0, seed=4)
    unet.half().save_pretrained(DOMAIN.weights)
    (Path(DOMAIN.weights) / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")


def clip_phases(config: dict[str, Any], seed: int, build: Path) -> Any:
    """``phase(name, steps, rate, ...)`` trains one network further and returns its averaged weights; each phase has a seed of its own."""
    torch.manual_seed(seed)
    pictures, factors = load_pictures(build)
    model, tokenizer, seeds = make_clip(config["model_cfg"]), SimpleTokenizer(context_length=40), count(seed)

    def phase(name: str, steps: int, rate: float, **how: Any) -> dict[str, torch.Tensor]:
        shared, own = (model, tokenizer, templates()), next(seeds)

        def make(optimizer: torch.optim.Optimizer, start: int) -> Iterator[float]:
            return training.train_clip(*shared, optimizer, pictures, factors, steps=steps, start=start, seed=own, **how)

        weights = run(name, model, steps, rate, build, make)
        model.load_state_dict(weights)
        return weights

    return phase


@app.command()
def clip(build: Build = BUILD, steps: int = 3000, small_steps: int = 2500, last_steps: int = 2000) -> None:
    """Train CLIP (half an hour on one core): on all pairs, then half of them on the small factors, then tinted and with listed captions."""
    phase = clip_phases(CLIP_CONFIG, 0, build)
    phase("clip", steps, 1e-3)
    phase("clip-small", small_steps, 6e-4, focus=SMALL)
    save_clip(Path(DOMAIN.clip), phase("clip-last", last_steps, 5e-4, focus=SMALL, tint=TINT, listed=0.5), CLIP_CONFIG)


@app.command()
def scoring_clip(build: Build = BUILD, steps: int = 3000, small_steps: int = 2500, last_steps: int = 2000) -> None:
    """Train the CLIP that takes part in no loss (50 minutes on one core), in the same three phases."""
    phase = clip_phases(SCORING_CLIP_CONFIG, 7, build)
    phase("scoring-clip", steps, 1e-3, listed=0.3)
    phase("scoring-clip-small", small_steps, 6e-4, focus=SMALL, listed=0.3)
    assert DOMAIN.scoring_clip is not None
    weights = phase("scoring-clip-last", last_steps, 5e-4, focus=SMALL, tint=TINT, listed=0.5)
    save_clip(Path(DOMAIN.scoring_clip), weights, SCORING_CLIP_CONFIG)


def save_clip(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(half(zero_unseen_words(weights, SimpleTokenizer(context_length=40))), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def zero_unseen_words(weights: dict[str, torch.Tensor], tokenizer: SimpleTokenizer) -> dict[str, torch.Tensor]:
    """Zeroes the rows of tokens that no caption has: they compress to nothing, and unknown words can be told."""
    from models.pixelface.avatars import vocabulary

    texts = [template.format(word) for template in templates() for word in ("a", *vocabulary())]
    seen = torch.unique(tokenizer(texts))
    rows = torch.zeros_like(weights["token_embedding.weight"])
    rows[seen] = weights["token_embedding.weight"][seen]
    return {**weights, "token_embedding.weight": rows}


@app.command()
def judge(build: Build = BUILD, steps: int = 2500) -> None:
    """Train the factor classifier that judges edits (five minutes on one core)."""
    torch.manual_seed(0)
    pictures, factors = load_pictures(build)
    model = Judge()

    def make(optimizer: torch.optim.Optimizer, start: int) -> Iterator[float]:
        return training.train_judge(model, optimizer, pictures, factors, steps=steps, start=start)

    weights = run("judge", model, steps, 2e-3, build, make)
    assert DOMAIN.judge is not None
    save_file(half(weights), DOMAIN.judge)


if __name__ == "__main__":
    app()
