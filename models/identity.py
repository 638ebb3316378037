"""Is it the same person: ArcFace features (Deng et al. 2019) of faces, as a loss and as a score.

The network is IR-SE50, with the weights' names of github.com/TreB1eN/InsightFace_Pytorch, whose file ``model_ir_se50.pth`` the
official DiffusionCLIP code uses. The weights are not shipped.
"""

import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.fetching import check_file
from models.weights import WeightsError, file_of

SIDE = 112
"""Of the network's input."""
CROP = (35 / 256, 223 / 256, 32 / 256, 220 / 256)
"""First and last row, first and last column of the face, as shares of an aligned (CelebA-HQ, FFHQ) picture."""
GROUPS = ((64, 3), (128, 4), (256, 14), (512, 3))
"""Channels and residual units of each group; the first unit of a group halves the picture."""
WANTED = (
    "the identity network is IR-SE50 as in model_ir_se50.pth of github.com/TreB1eN/InsightFace_Pytorch (about 175 MB, .pth or "
    ".safetensors; as far as known its weights are for non-commercial research only)"
)


class SqueezeExcitation(nn.Module):
    """Channels weighed by what the whole picture says about them (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.fc1(mean).relu()).sigmoid()


class Unit(nn.Module):
    """The improved residual unit of ArcFace (normalisation first, stride in the second convolution) with squeeze-excitation."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.shortcut_layer: nn.Sequential | None = None
        if channels != out:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out, 3, 1, 1, bias=False),
            nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            SqueezeExcitation(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept = x[:, :, :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return kept + self.res_layer(x)


class IRSE50(nn.Module):
    """(B, 3, 112, 112) float32 RGB in [-1, 1] -> (B, 512) float32, not normalised. 43.8 million weights."""

    def __init__(self) -> None:
        super().__init__()
        first = GROUPS[0][0]
        self.input_layer = nn.Sequential(nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first))
        units: list[nn.Module] = []
        channels = first
        for out, count in GROUPS:
            for number in range(count):
                units.append(Unit(channels, out, 1 if number else 2))
                channels = out
        self.body = nn.Sequential(*units)
        # Nothing is dropped once trained, but dropout and flattening count in the weights' names.
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Dropout(), nn.Flatten(), nn.Linear(channels * 7 * 7, 512), nn.BatchNorm1d(512)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(x)))


class Identity(nn.Module):
    """Features of aligned faces; frozen, always in evaluation mode.

    Pictures are RGB in [-1, 1], because every published figure made with these weights (pSp, DiffusionCLIP) feeds them so. The
    weights themselves were trained on blue-green-red pictures (the repository's issue 13: its data reader stores what OpenCV
    decodes without swapping); its author expects no difference (issue 28). Whoever compares figures must keep to one order.
    """

    def __init__(self, net: IRSE50):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Identity":
        """Stays in evaluation mode: the statistics of the batch must not enter a person's features."""
        return super().train(False)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] RGB, aligned faces of any size -> (B, 512) float32 of length 1. Differentiable."""
        return F.normalize(self.net(face_of(images)), dim=-1)

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of pictures, as for ``features`` -> (B,) float32 cosines; 1 is the same face."""
        return (self.features(a) * self.features(b)).sum(-1)


def face_of(images: Tensor) -> Tensor:
    """(B, 3, H, W) aligned faces of any size -> (B, 3, 112, 112) float32: the part from forehead to chin.

    At 256x256 this is the official code's crop and pooling; elsewhere the same share of the picture. Large crops are averaged
    (no aliasing), those below 112 pixels enlarged bilinearly.
    """
    height, width = images.shape[-2:]
    top, bottom = round(CROP[0] * height), round(CROP[1] * height)
    left, right = round(CROP[2] * width), round(CROP[3] * width)
    face = images[..., top:bottom, left:right].float()
    if min(face.shape[-2:]) >= SIDE:
        return F.adaptive_avg_pool2d(face, SIDE)
    return F.interpolate(face, (SIDE, SIDE), mode="bilinear", antialias=True)


def identity_loss(net: Identity, source: Tensor, edited: Tensor) -> Tensor:
    """Mean of 1 - cosine over a batch of pictures, as for ``Identity.features`` -> scalar. No gradient reaches ``source``.

    The official code's memory-saving mode computes it on detached noisy pictures, where it is a constant; ``edited`` must be
    the picture that the gradient shall reach, here as in its other modes.
    """
    with torch.no_grad():
        wanted = net.features(source)
    return (1 - (net.features(edited) * wanted).sum(-1)).mean()


def check_identity(reference: str) -> None:
    """Raises WeightsError, as ``load_identity`` does, if the weights cannot be had; reads and fetches none of them."""
    try:
        check_file(reference)
    except WeightsError as error:
        raise WeightsError(f"{error}; {WANTED}") from None


@lru_cache(maxsize=2)
def load_identity(reference: str | Path) -> Identity:
    """The network from ``model_ir_se50.pth`` or the same weights as safetensors; one object however often it is asked for.

    ``reference`` is what ``models.weights.file_of`` takes. Never runs code from the file. Raises WeightsError if the file is
    missing, unreadable, or holds other weights.
    """
    try:
        file = file_of(str(reference))
    except WeightsError as error:
        raise WeightsError(f"{error}; {WANTED}") from None
    state = {k: v for k, v in _read(file).items() if not k.endswith(".num_batches_tracked")}  # old files have none, nothing uses it
    with torch.device("meta"):  # random weights for all these would take longer than reading them
        net = IRSE50()
    own = {k: v for k, v in net.state_dict().items() if not k.endswith(".num_batches_tracked")}
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (
            ("missing", own.keys() - state.keys()),
            ("left over", state.keys() - own.keys()),
            ("of another shape", {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape}),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{file} does not fit; {'; '.join(problems)}; {WANTED}")
    net.to_empty(device="cpu")
    net.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)  # what must be there was checked above
    return Identity(net)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        state: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file} holds more than weights, or is no file of torch.save; it is not read, because that could run code "
            f"({str(error).splitlines()[0][:160]}); {WANTED}"
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {(str(error) or type(error).__name__).splitlines()[0][:160]}; {WANTED}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{file} does not map names to weights; {WANTED}")
    return state


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
