"""What CLIP sees of an image while an edit is learned: several noisy, shifted views of it, whose features are averaged.

A network that sees one clean image has features that tiny changes of all pixels, a tint say, move as well as the change that was
meant; averaged over noise they follow what can be seen (randomised smoothing, Cohen et al. 2019).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import Clip

SHIFT_SHARE = 32
"""Views are shifted by at most a 32nd of the image's side: by one pixel of 32."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """How each view differs from its image; the same for an image before and after, so that they differ by the edit alone."""

    noise: Tensor
    """(views, B, C, H, W), added."""
    shifts: list[tuple[int, int]]
    """Down and right, in pixels; one a view."""

    def of(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (views * B, C, H, W), view by view. Differentiable."""
        return torch.cat([shifted(images + noise, *shift) for noise, shift in zip(self.noise.to(images), self.shifts, strict=True)])

    def features(self, clip: Clip, images: Tensor) -> Tensor:
        """(B, D) of length 1: the mean of the features of an image's views."""
        return F.normalize(clip.image_features(self.of(images)).unflatten(0, (len(self.shifts), -1)).mean(0), dim=-1)


def shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Images moved by some pixels; their edges are repeated."""
    height, width = images.shape[-2:]
    side = max(abs(down), abs(right))
    padded = F.pad(images, (side,) * 4, mode="replicate") if side else images
    return padded[..., side - down : side - down + height, side - right : side - right + width]


def draw_views(images: Tensor, count: int, noise: float, generator: torch.Generator) -> Views:
    """``count`` views of images (B, C, H, W): Gaussian noise of up to ``noise`` standard deviation, and a shift."""
    shape = (count, *images.shape)
    amount = noise * torch.rand((count, len(images), 1, 1, 1), generator=generator)
    most = images.shape[-1] // SHIFT_SHARE
    shifts = torch.randint(-most, most + 1, (count, 2), generator=generator).tolist()
    return Views(noise=amount * torch.randn(shape, generator=generator), shifts=[(down, right) for down, right in shifts])
