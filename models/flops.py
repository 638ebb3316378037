"""Floating-point operations of networks, counted from their shapes on the meta device: no weights are needed, nothing is computed.

A multiplication and an addition are two. Normalisation, activations and resampling are not counted (``torch.utils.flop_counter`` counts
what tensor cores do: convolutions, matrix products, attention).
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.clip import CONFIG as CLIP_CONFIG
from models.clip import clip_problems, is_folder, model_and_tag
from models.conversion import config_of, empty_network
from models.domains import Domain
from models.fetching import first_in
from models.folders import read_json
from models.official import ARCHITECTURES
from models.references import WeightsError, place_of, public


def network_config(domain: Domain) -> dict[str, Any]:
    """The configuration of a domain's UNet2DModel: that of its local weights, else of the table's architecture, else the
    ``config.json`` of its folder, of which nothing else is fetched. Raises WeightsError if there is none."""
    local = domain.weights and place_of(domain.weights).kind == "local"
    if domain.architecture and not local:
        return config_of(ARCHITECTURES[domain.architecture])
    found = first_in(domain.weights, ("config.json", "unet/config.json"))
    if found is None:
        raise WeightsError(f"{public(domain.weights)} has no config.json; it must be a diffusers UNet2DModel folder")
    return read_json(found[1])


def counted(work: Callable[[], Any]) -> int:
    """Floating-point operations of what is called, on meta tensors."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def example(network: Any, device: str = "meta", images: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros of the shapes that a UNet2DModel takes: x (B, 3, size, size) and t (B,)."""
    size = network.config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.zeros(images, 3, height, width, device=device), torch.zeros(images, dtype=torch.int64, device=device)


def call_flops(network: Any) -> int:
    """Of one call of a UNet2DModel of shapes only, for one image."""
    x, t = example(network)
    labels = None if network.config.num_class_embeds is None else t
    with torch.no_grad():
        return counted(lambda: network(x, t, class_labels=labels))


def training_flops(network: Any, rank: int | None) -> tuple[int, int]:
    """Of one call and its backward pass, for one image, and how many numbers are trained: all of the network's, or with a rank
    those of low-rank weights, which are added to it."""
    if rank is not None:
        from models import lora

        with torch.device("meta"):
            lora.add(network, rank)
    else:
        network.requires_grad_(True)
    x, t = example(network)
    labels = None if network.config.num_class_embeds is None else t
    flops = counted(lambda: network(x.requires_grad_(True), t, class_labels=labels)[0].sum().backward())
    return flops, sum(p.numel() for p in network.parameters() if p.requires_grad)


def network_of(config: Mapping[str, Any]) -> Any:
    """A UNet2DModel of shapes only. Raises WeightsError if the configuration describes none."""
    try:
        return empty_network(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"the configuration does not describe a UNet2DModel: {error}") from None


@cache
def clip_flops(reference: str) -> int:
    """Of a CLIP's look at one picture. Raises WeightsError if there is no such CLIP, or its configuration cannot be had."""
    import open_clip

    if problems := clip_problems(reference):
        raise WeightsError(" ".join(problems))
    with torch.device("meta"):
        if is_folder(reference):
            found = first_in(reference, [CLIP_CONFIG])
            if found is None:
                raise WeightsError(f"{public(reference)} has no {CLIP_CONFIG}")
            model: Any = open_clip.model.CLIP(**read_json(found[1])["model_cfg"])
        else:
            model = _without_weights(model_and_tag(reference)[0])
        side = model.visual.image_size
        height, width = side if isinstance(side, tuple) else (side, side)
        with torch.no_grad():
            model.eval()
            return counted(lambda: model.encode_image(torch.zeros(1, 3, height, width)))


def _without_weights(name: str) -> Any:
    """A CLIP of open_clip's table, without its warning that there are no weights."""
    import open_clip

    logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    finally:
        logging.disable(logging.NOTSET)


@cache
def identity_flops() -> int:
    """Of the face recognition network's look at one picture."""
    from models.identity import IRSE50, SIDE

    with torch.device("meta"), torch.no_grad():
        network = IRSE50().eval()
        return counted(lambda: network(torch.zeros(1, 3, SIDE, SIDE)))
