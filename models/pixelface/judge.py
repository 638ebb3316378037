"""A small factor classifier, trained on renders; it judges edits and takes part in no loss."""

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.pixelface.avatars import FACTORS


class Judge(nn.Module):
    """(B, 3, 32, 32) float32 in [-1, 1] -> {factor: logits (B, number of values)}."""

    def __init__(self, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, stride in ((width, 2), (2 * width, 1), (2 * width, 2), (3 * width, 1), (3 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in FACTORS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The most likely value of each factor, one dict an image."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(images).items()}
        return [{name: FACTORS[name][best[name][row]] for name in FACTORS} for row in range(len(images))]


@lru_cache(maxsize=1)
def load_judge(file: Path) -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(file))
    return judge.requires_grad_(False).eval()
