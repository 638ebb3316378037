"""Networks and pictures as small as they can be: the real classes with random weights, saved as the shipped ones are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import save_file

from models.references import WeightsError

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def tiny_unet(size: int, out_channels: int = 3, seed: int = 0, **changes: Any) -> UNet2DModel:
    """A random network of some thousand weights with attention and normalisation, as the real ones have."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=size,
            out_channels=out_channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            **changes,
        )


def save_diffusion(folder: Path, size: int, seed: int = 0, out_channels: int = 3) -> Path:
    """A diffusers folder, written by diffusers itself."""
    tiny_unet(size, out_channels, seed).save_pretrained(folder)
    DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").save_config(folder)
    return folder


def save_clip(folder: Path, unknown: tuple[str, ...] = (), seed: int = 1) -> Path:
    """A folder for open_clip's local loading; the tokens of ``unknown`` words have no embedding."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**CLIP_CONFIG)
    tokenizer = open_clip.SimpleTokenizer()
    with torch.no_grad():
        for word in unknown:
            model.token_embedding.weight[tokenizer.encode(word)] = 0
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": statistics}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def picture(seed: int, side: int = 16) -> Image.Image:
    """A random but smooth picture, so that JPEG and resizing leave it recognisable."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def refusal(make: Callable[[], Any]) -> str:
    """The one line that a WeightsError says."""
    with pytest.raises(WeightsError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    return message
