"""A diffusers UNet2DModel behind the NoiseModel contract."""

from copy import deepcopy
from functools import lru_cache
from itertools import pairwise
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from models.domains import PREDICTIONS
from models.folders import CONFIG, SCHEDULER, WEIGHTS, read_json
from models.references import WeightsError, public
from models.weights import file_of, folder_of, load_card, load_into, read_state

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class OptionalEmbedding(nn.Embedding):
    """An embedding in which label -1 is no class: it contributes nothing. Its state dict is that of ``nn.Embedding``."""

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(labels.clamp(min=0)) * (labels >= 0).unsqueeze(-1)


class NoiseUNet(nn.Module):
    """x (B, 3, H, W) float32 in about [-1, 1], t (B,) int64 -> predicted noise, shape of x, float32.

    What networks differ in ends here: channels beyond x's own are a learned variance (iDDPM, ADM) and are cut off; a
    network that predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, section 4) or x0 itself
    ("sample") is solved for the noise, for which it needs ``alpha_bars`` float32 (T,); a class-conditional one is told
    ``class_label`` for all images, or with None no class, as in the official DiffusionCLIP code.
    ``precision`` is that of the network's arithmetic; weights stay float32. ``float32`` and ``tf32`` differ on GPUs that round
    the factors of convolutions and products to TF32, for the whole process: torch knows no setting for one network.
    ``unet`` is not copied, and its class embedding
    is replaced by an ``OptionalEmbedding`` with the same weights. Raises WeightsError if the label does not fit.
    """

    alpha_bars: Tensor | None

    def __init__(
        self,
        unet: UNet2DModel,
        precision: str = "float32",
        class_label: int | None = None,
        prediction: str = "epsilon",
        alpha_bars: Tensor | None = None,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise WeightsError(f"a network predicts one of {', '.join(PREDICTIONS)}; got {prediction!r}")
        if prediction != "epsilon" and alpha_bars is None:
            raise ValueError(f"a network that predicts {prediction!r} needs alpha_bars")
        self.unet: Any = unet  # diffusers hides from type checkers that it is an nn.Module
        self.dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        self.prediction = prediction
        self.register_buffer("alpha_bars", None if prediction == "epsilon" else alpha_bars, persistent=False)
        self.label = _told(unet, class_label)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        labels = None if self.label is None else torch.full((len(x),), self.label, device=x.device)
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.unet(x, t, class_labels=labels, return_dict=False)[0]
        predicted = predicted[:, : x.shape[1]].float()
        if self.alpha_bars is None:
            return predicted
        alpha_bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        if self.prediction == "v_prediction":
            return alpha_bar.sqrt() * predicted + (1 - alpha_bar).sqrt() * x
        return (x - alpha_bar.sqrt() * predicted) / (1 - alpha_bar).sqrt()


def _told(unet: Any, label: int | None) -> int | None:
    """The label that a network is given for every image, made ready for it: None if it knows no classes, -1 for no class."""
    classes, table = unet.config.num_class_embeds, unet.class_embedding
    if unet.config.class_embed_type is not None:
        raise WeightsError(f"class embeddings of type {unet.config.class_embed_type!r} are not supported; only a table of classes is")
    if classes is None:
        if label is not None:
            raise WeightsError(f"this network knows no classes; leave the class label {label} out")
        return None
    if label is not None and not 0 <= label < classes:
        raise WeightsError(f"the class label must lie between 0 and {classes - 1}; got {label}")
    if not isinstance(table, OptionalEmbedding):
        unet.class_embedding = OptionalEmbedding.from_pretrained(table.weight, freeze=not table.weight.requires_grad)
    return -1 if label is None else label


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that fine-tuning may change, whether or not they require gradients now: all but those of
    ``time_proj``, the sinusoids of the timesteps, which some folders keep as a table."""
    return [parameter for name, parameter in model.named_parameters() if "time_proj" not in name.split(".")]


# ---- from folders ----------------------------------------------------------------------------------------------------


def load_base(reference: str | Path, precision: str = "float32", class_label: int | None = None) -> NoiseUNet:
    """The base model of a diffusers folder, frozen, in evaluation mode; one object however often it is asked for, so
    copy it before you change it. Raises WeightsError if the folder or the label does not fit."""
    return _base(str(reference), precision, class_label)


@lru_cache(maxsize=2)
def _base(reference: str, precision: str, class_label: int | None) -> NoiseUNet:
    folder = folder_of(reference)
    unet, alpha_bars = _network(folder, public(reference)), load_alpha_bars(folder)
    if unet.config.time_embedding_type == "learned" and unet.time_proj.num_embeddings < len(alpha_bars):
        raise WeightsError(
            f"{public(reference)} has {len(alpha_bars)} timesteps in {SCHEDULER} and {unet.time_proj.num_embeddings} in its network"
        )
    load_into(unet, folder / WEIGHTS)  # diffusers' own loading keeps missing weights random
    prediction = read_json(folder / SCHEDULER).get("prediction_type", "epsilon")
    return NoiseUNet(unet, precision, class_label, prediction, alpha_bars).requires_grad_(False).eval()


def _network(folder: Path, name: str) -> Any:
    """The UNet2DModel that ``config.json`` describes, with random weights."""
    config = read_json(folder / CONFIG)
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise WeightsError(f"{name} holds a {kind}; only a UNet2DModel, an unconditional or class-conditional model of pixels, can be used")
    try:
        unet: Any = UNet2DModel.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{folder / CONFIG} does not describe a UNet2DModel: {error}") from None
    channels = unet.config.in_channels, unet.config.out_channels
    if channels not in {(3, 3), (3, 6)}:
        raise WeightsError(
            f"{name} takes {channels[0]} channels and returns {channels[1]}; it must take 3 and return 3, or 6 with a variance"
        )
    if unet.config.time_embedding_type == "fourier":
        raise WeightsError(f"{name} is told noise levels and not timesteps (time_embedding_type fourier), which is not supported")
    return unet


def load_edit_model(
    base_reference: str | Path, edit_reference: str | Path, precision: str = "float32", class_label: int | None = None
) -> NoiseUNet:
    """A copy of the base model with an edit model's weights, or with its low-rank changes added to them. Raises WeightsError
    if they do not fit."""
    card, file = load_card(edit_reference), file_of(edit_reference)
    model = deepcopy(load_base(base_reference, precision, class_label))
    if card.rank is None:
        load_into(model.unet, file)
        return model
    from models import lora

    lora.merge_into(model.unet, read_state(file))
    return model


def load_alpha_bars(reference: str | Path) -> Tensor:
    """float32 (T,) in (0, 1), decreasing: diffusers' ``alphas_cumprod`` of a folder's ``scheduler_config.json``, multiplied up
    in float64. Raises WeightsError for a schedule or prediction that is not supported."""
    config = read_json(folder_of(reference) / SCHEDULER)
    problem = _unsupported(config)
    if problem:
        raise WeightsError(f"{public(reference)}: {problem}")
    try:
        alpha_bars = (1 - _betas(config)).cumprod(0).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{public(reference)}: its {SCHEDULER} has impossible numbers: {error}") from None
    if not (len(alpha_bars) > 1 and alpha_bars[-1] > 0 and alpha_bars[0] < 1 and (alpha_bars.diff() < 0).all()):
        raise WeightsError(f"{public(reference)}: its betas must lie between 0 and 1")
    return alpha_bars


def _unsupported(config: dict[str, Any]) -> str | None:
    """What is wrong with a scheduler's configuration; None if it can be followed."""
    if config.get("prediction_type", "epsilon") not in PREDICTIONS:
        return f"predictions of type {config['prediction_type']!r} are not supported; supported are {', '.join(PREDICTIONS)}"
    if config.get("rescale_betas_zero_snr"):
        return "schedules that end in pure noise (rescale_betas_zero_snr) are not supported: at alpha_bar = 0 the walk has no noise level"
    if config.get("trained_betas") is not None:
        return None
    if "_class_name" in config and "beta_schedule" not in config:
        return f"its scheduler {config['_class_name']} has no betas, so it is no DDPM"
    if config.get("beta_schedule", "linear") not in SCHEDULES:
        return f"the beta schedule {config['beta_schedule']!r} is not supported; supported are {', '.join(SCHEDULES)} and trained_betas"
    return None


def _betas(config: dict[str, Any]) -> Tensor:
    """float64 (T,). Defaults are diffusers' own."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    steps, start, end = config.get("num_train_timesteps", 1000), config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    schedule = config.get("beta_schedule", "linear")
    if schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. 17, with betas capped at 0.999
        levels = [cos((i / steps + 0.008) / 1.008 * pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(levels)], dtype=torch.float64)
    if schedule == "scaled_linear":  # Rombach et al. 2022: linear in the square root
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "sigmoid":
        return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start
    return torch.linspace(start, end, steps, dtype=torch.float64)  # Ho et al. 2020, section 4
