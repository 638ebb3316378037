"""Low-rank edit models (LoRA, Hu et al. 2021): on every convolution and linear layer W' = W + B A, with A and B of few rows.

A rank-8 file of the CelebA-HQ-256 network holds 2.8 million numbers instead of 114 million. Adapters are peft's while they
are trained; a file of them is added into the weights before use, so that a low-rank edit model costs nothing at run time.

A state is ``{"PATH.lora_A.weight": A, "PATH.lora_B.weight": B}`` for the path of each adapted layer: for linears A (rank, in)
and B (out, rank), for convolutions A (rank, in, height, width) and B (out, rank, 1, 1). These are the names that diffusers
and peft use in their files, without the name of the adapter. alpha = rank: the product is not scaled.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from models.weights import WeightsError

NAME = "default"
"""What peft calls an adapter that nobody named."""
EXCLUDED = "class_embedding."
"""Classes are no part of an edit."""


def layers(unet: nn.Module) -> dict[str, Any]:
    """Path -> module of every layer that gets an adapter: all ``Conv2d`` and ``Linear`` but those of the class embedding."""
    return {
        path: module for path, module in unet.named_modules() if isinstance(module, nn.Conv2d | nn.Linear) and not path.startswith(EXCLUDED)
    }


def add(unet: nn.Module, rank: int, seed: int = 0) -> None:
    """Adapters of one rank on a diffusers UNet2DModel, in place; afterwards they alone require gradients.

    B is zero, so the network computes what it did; A depends on the seed alone, on any device, and the global random
    state is left as it was. Raises ValueError for a rank below 1 or a network that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"the rank of low-rank weights must be at least 1; got {rank}")
    if adapters(unet):
        raise ValueError("this network has low-rank adapters already; start from a copy of the base model")
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds: it brings transformers along

    # A pattern of whole paths: peft shortens a long list of names to endings, which say less.
    pattern = "|".join(map(re.escape, layers(unet)))
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), unet)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(unet).values():
            a, b = adapter.lora_A[NAME].weight, adapter.lora_B[NAME].weight
            bound = a[0].numel() ** -0.5  # He et al. 2015 with the slope that torch's own layers start with
            if not a.is_meta:
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
            b.zero_()


def adapters(unet: nn.Module) -> dict[str, Any]:
    """Path -> peft's layer, of a network after ``add``; empty for a plain one."""
    return {path: module for path, module in unet.named_modules() if hasattr(module, "lora_A")}


def state(unet: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights alone, detached; they share memory with the network, as those of ``state_dict()`` do."""
    return {key: weight.detach() for key, weight in _weights(unet).items()}


def load(unet: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts a state into the adapters of a network after ``add``. Raises WeightsError, and changes nothing, if it does not fit."""
    own = _weights(unet)
    _check(state, {key: tuple(weight.shape) for key, weight in own.items()})
    with torch.no_grad():
        for key, weight in own.items():
            weight.copy_(state[key])


def rank_of(state: dict[str, Tensor]) -> int:
    """The rank that a state was made with: the rows of its A's. Raises WeightsError if it is no state of one rank."""
    ranks = {len(weight) for key, weight in state.items() if key.endswith(".lora_A.weight") and weight.dim()}
    if len(ranks) != 1:
        found = f"ranks {', '.join(map(str, sorted(ranks)))}" if ranks else "no lora_A.weight"
        raise WeightsError(f"low-rank weights have one rank throughout; these have {found}")
    return ranks.pop()


def merge_into(plain_unet: nn.Module, state: dict[str, Tensor]) -> None:
    """Adds the products B A to the weights of a plain network, in place: same outputs as with the adapters, same keys as before.

    Computed in float32 whatever the state's dtype. Raises WeightsError, and changes nothing, if the state does not fit.
    """
    targets, rank = layers(plain_unet), rank_of(state)
    wanted: dict[str, tuple[int, ...]] = {}
    for path, module in targets.items():
        out, *inner = module.weight.shape
        wanted |= {f"{path}.lora_A.weight": (rank, *inner), f"{path}.lora_B.weight": (out, rank, *(1 for _ in inner[1:]))}
    _check(state, wanted)
    with torch.no_grad():
        for path, module in targets.items():
            weight = module.weight
            a, b = (state[f"{path}.{part}.weight"].to(weight.device, torch.float32).flatten(1) for part in ("lora_A", "lora_B"))
            weight.copy_(weight.float() + (b @ a).view(weight.shape))


def _weights(unet: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{part}.weight": getattr(adapter, part)[NAME].weight
        for path, adapter in adapters(unet).items()
        for part in ("lora_A", "lora_B")
    }


def _check(state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises WeightsError with the first keys that are missing, left over or of another shape."""
    wrong = sorted(state.keys() ^ wanted.keys()) + sorted(k for k in state.keys() & wanted.keys() if tuple(state[k].shape) != wanted[k])
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise WeightsError(f"the low-rank weights do not fit the model: {shown} missing, left over or of another shape")
