"""A diffusers UNet2DModel behind the NoiseModel contract."""

import json
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from models.diffusion import linear_alpha_bars
from models.weights import WeightsError, load_into


class NoiseUNet(nn.Module):
    """x (B, C, H, W) float32 in about [-1, 1], t (B,) int64 -> predicted noise, shape of x, float32.

    Channels beyond x's own are a learned variance (iDDPM, ADM) and are cut off here, once. ``precision`` is that of the
    network's arithmetic; weights stay float32.
    """

    def __init__(self, unet: UNet2DModel, precision: str = "float32"):
        super().__init__()
        self.unet: Any = unet  # diffusers hides from type checkers that it is an nn.Module
        self.dtype = getattr(torch, precision)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            noise = self.unet(x, t, return_dict=False)[0]
        return noise[:, : x.shape[1]].float()


@lru_cache(maxsize=2)
def load_base(folder: str | Path, precision: str = "float32", class_label: int | None = None) -> NoiseUNet:
    """The base model of a diffusers folder, frozen, in evaluation mode; one object however often it is asked for, so
    copy it before you change it. Raises WeightsError if the folder does not fit."""
    folder = Path(folder)
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"{folder} has no {name}; it must be a diffusers UNet2DModel folder with safetensors weights")
    try:
        unet: Any = UNet2DModel.from_config(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{folder}/config.json does not describe a UNet2DModel: {error}") from None
    load_into(unet, folder / "diffusion_pytorch_model.safetensors")  # diffusers' own loading keeps missing weights random
    return NoiseUNet(unet, precision).requires_grad_(False).eval()


def load_edit_model(folder: str | Path, file: str | Path, precision: str = "float32", class_label: int | None = None) -> NoiseUNet:
    """A copy of the base model with an edit model's weights. Raises WeightsError if they do not fit."""
    model = deepcopy(load_base(folder, precision))
    load_into(model.unet, Path(file))
    return model


def load_alpha_bars(folder: str | Path) -> Tensor:
    """float32 (T,) from ``scheduler_config.json``. Raises WeightsError for a schedule or prediction type it does not know."""
    folder = Path(folder)
    config = json.loads((folder / "scheduler_config.json").read_text())
    wanted = {"beta_schedule": "linear", "prediction_type": "epsilon", "trained_betas": None}
    other = {name: config[name] for name, value in wanted.items() if config.get(name, value) != value}
    if other:
        raise WeightsError(f"{folder}: only linear betas and noise (epsilon) prediction are supported; its scheduler has {other}")
    defaults = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}  # diffusers' own
    return linear_alpha_bars(*(config.get(name, value) for name, value in defaults.items()))
