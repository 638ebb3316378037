"""CLIP through open_clip: differentiable image features, averaged text features."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPLATES: list[str] = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
"""The 80 ImageNet templates of Radford et al. 2021, as the official DiffusionCLIP code uses them."""


class Clip(nn.Module):
    """A frozen open_clip model with its tokenizer and the statistics of its pictures."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, tokenizer: open_clip.tokenizer.SimpleTokenizer):
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        size = model.visual.image_size
        self.size: int = size if isinstance(size, int) else size[0]
        mean, std = model.visual.image_mean, model.visual.image_std
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def image_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1], any size -> (B, D) of length 1. Differentiable."""
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        features = self.model.encode_image(((images + 1) / 2 - self.mean) / self.std)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def text_features(self, text: str) -> Tensor:
        """(D,) of length 1: the mean of a text's features over the 80 templates."""
        tokens = self.tokenizer([template.format(text) for template in TEMPLATES]).to(self.mean.device)
        features = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
        return F.normalize(features.mean(0), dim=0)

    def text_direction(self, source: str, target: str) -> Tensor:
        """(D,) of length 1: from the source text to the target text (DiffusionCLIP, eq. 8)."""
        return F.normalize(self.text_features(target) - self.text_features(source), dim=0)

    def unknown_words(self, text: str) -> list[str]:
        """Words of ``text`` that the model has no trained token for (their embedding is zero); empty for a real CLIP."""
        weight = self.model.token_embedding.weight
        words = re.findall(r"[\w-]+", text.lower())
        return [w for w in words if any(not weight[i].any() for i in self.tokenizer.encode(w))]


@lru_cache(maxsize=4)
def load_clip(folder: str | Path) -> Clip:
    """From a folder with ``open_clip_config.json`` and safetensors weights, by open_clip's own local loading."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return Clip(model, open_clip.get_tokenizer(f"local-dir:{folder}"))
