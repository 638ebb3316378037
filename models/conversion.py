"""State dicts of the official codes -> diffusers UNet2DModel folders.

Both families of ``models.official`` are the same chain of residual blocks, attention and resampling as UNet2DModel's, so that a
conversion only renames weights, except for two things:

- ``adm`` keeps query, key and value in one matrix, in one of two orders that the file does not tell apart; it is split.
- The sinusoid of the timestep is as wide as the model's channels, in UNet2DModel as wide as its first level. Where the two
  differ (ADM 512: 256 and 128) the sinusoid of all timesteps becomes a learned table: with its singular value
  decomposition U S V' and the first layer's weight W, ``time_proj`` holds U_k S_k and ``linear_1`` holds W V_k, k being
  the first level's width. That is exact because so smooth a table has a low rank (256 wide, 1000 timesteps: what is cut
  off is 1e-15 of its norm); where it is not, the checkpoint is refused.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.checkpoints import State
from models.folders import WEIGHTS, read_state, write_state
from models.official import GROUPS, Architecture, Structure
from models.references import WeightsError

TIMESTEPS = 1000
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
"""Of the noise, by the names of guided-diffusion (``--noise_schedule``): Ho et al. 2020, and Nichol and Dhariwal 2021, eq. 17."""

# --- names --------------------------------------------------------------------------------------------------------------

_Part = tuple[str, str, dict[str, str]]
"""Prefix in the file, prefix in UNet2DModel, and the names below the two."""
_ITSELF = {"": ""}
_DDPM_BLOCK = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
               "nin_shortcut": "conv_shortcut"}  # fmt: skip
_DDPM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ADM_BLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
              "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
_ADM_ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
_TO_QKV = ("to_q", "to_k", "to_v")


def _ddpm_parts(s: Structure) -> Iterator[_Part]:
    last = len(s.widths) - 1
    yield "temb.dense.0", "time_embedding.linear_1", _ITSELF
    yield "temb.dense.1", "time_embedding.linear_2", _ITSELF
    yield "conv_in", "conv_in", _ITSELF
    for level, attention in enumerate(s.attention):
        for side, own, blocks in (("down", level, s.blocks), ("up", last - level, s.blocks + 1)):
            for index in range(blocks):
                yield f"{side}.{level}.block.{index}", f"{side}_blocks.{own}.resnets.{index}", _DDPM_BLOCK
                if attention:
                    yield f"{side}.{level}.attn.{index}", f"{side}_blocks.{own}.attentions.{index}", _DDPM_ATTENTION
        if level < last:
            yield f"down.{level}.downsample.conv", f"down_blocks.{level}.downsamplers.0.conv", _ITSELF
        if level > 0:
            yield f"up.{level}.upsample.conv", f"up_blocks.{last - level}.upsamplers.0.conv", _ITSELF
    yield "mid.block_1", "mid_block.resnets.0", _DDPM_BLOCK
    yield "mid.attn_1", "mid_block.attentions.0", _DDPM_ATTENTION
    yield "mid.block_2", "mid_block.resnets.1", _DDPM_BLOCK
    yield "norm_out", "conv_norm_out", _ITSELF
    yield "conv_out", "conv_out", _ITSELF


def _adm_parts(s: Structure) -> Iterator[_Part]:
    last = len(s.widths) - 1
    yield "time_embed.0", "time_embedding.linear_1", _ITSELF
    yield "time_embed.2", "time_embedding.linear_2", _ITSELF
    yield "label_emb", "class_embedding", _ITSELF
    yield "input_blocks.0.0", "conv_in", _ITSELF
    number = count(1)
    for level, attention in enumerate(s.attention):
        for index in range(s.blocks):
            here = f"input_blocks.{next(number)}"
            yield f"{here}.0", f"down_blocks.{level}.resnets.{index}", _ADM_BLOCK
            if attention:
                yield f"{here}.1", f"down_blocks.{level}.attentions.{index}", _ADM_ATTENTION
        if level < last:
            inside = _ADM_BLOCK if s.resblock_updown else {"op": "conv"}
            yield f"input_blocks.{next(number)}.0", f"down_blocks.{level}.downsamplers.0", inside
    yield "middle_block.0", "mid_block.resnets.0", _ADM_BLOCK
    yield "middle_block.1", "mid_block.attentions.0", _ADM_ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", _ADM_BLOCK
    number = count()
    for level, attention in enumerate(reversed(s.attention)):
        for index in range(s.blocks + 1):
            here = f"output_blocks.{next(number)}"
            yield f"{here}.0", f"up_blocks.{level}.resnets.{index}", _ADM_BLOCK
            if attention:
                yield f"{here}.1", f"up_blocks.{level}.attentions.{index}", _ADM_ATTENTION
        if level < last:  # behind the level's last block and attention
            inside = _ADM_BLOCK if s.resblock_updown else {"conv": "conv"}
            yield f"{here}.{1 + attention}", f"up_blocks.{level}.upsamplers.0", inside
    yield "out.0", "conv_norm_out", _ITSELF
    yield "out.2", "conv_out", _ITSELF


def _renamed(structure: Structure, own: State) -> dict[str, list[str]]:
    """Key in the file -> its key in UNet2DModel, or its three for a qkv matrix. Only of what ``own`` has: only some blocks
    have a shortcut, only some networks classes, and an embedding has no bias."""
    found = {}
    parts = _ddpm_parts(structure) if structure.family == "ddpm" else _adm_parts(structure)
    for theirs, ours, inside in parts:
        for below, our_below in inside.items():
            for kind in ("weight", "bias"):
                key, target = (".".join(filter(None, words)) for words in ((theirs, below, kind), (ours, our_below, kind)))
                targets = [target.replace("to_qkv", name) for name in _TO_QKV] if "to_qkv" in target else [target]
                if targets[0] in own:
                    found[key] = targets
    return found


# --- converting ---------------------------------------------------------------------------------------------------------


def config_of(a: Architecture) -> dict[str, Any]:
    """The configuration of the UNet2DModel that ``convert`` makes the weights of."""
    s = a.structure
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if s.resblock_updown else ("DownBlock2D", "UpBlock2D")
    resample = "resnet" if s.resblock_updown else "conv"
    config: dict[str, Any] = {
        "sample_size": a.image_size,
        "in_channels": 3,
        "out_channels": 6 if s.learned_variance else 3,
        "block_out_channels": list(s.widths),
        "layers_per_block": s.blocks,
        "down_block_types": ["AttnDownBlock2D" if here else plain[0] for here in s.attention],
        "up_block_types": ["AttnUpBlock2D" if here else plain[1] for here in reversed(s.attention)],
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": a.head_channels or None,
        "norm_num_groups": GROUPS,
        "num_class_embeds": s.classes,
    }
    if s.family == "ddpm":  # sine before cosine, whose last frequency is 1/10000; padded only to the right and below
        return config | {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0}
    config |= {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1}
    if s.scale_shift:  # which would leave the middle attention without its norm
        config |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": GROUPS}
    if s.channels != s.widths[0]:
        config |= {"time_embedding_type": "learned", "num_train_timesteps": TIMESTEPS, "time_embedding_dim": 4 * s.channels}
    return config


def empty_network(config: Mapping[str, Any]) -> Any:
    """A UNet2DModel of shapes only (meta device)."""
    from diffusers import UNet2DModel  # only now, because it takes seconds and a file may have been refused before

    with torch.device("meta"):
        return UNet2DModel.from_config(dict(config))


def convert(state: State, a: Architecture, name: str = "its architecture") -> tuple[dict[str, Any], State]:
    """Configuration and state dict (float32) of the UNet2DModel that computes what the original network computes.

    ``name`` is what the architecture is called in messages. Raises WeightsError if keys or shapes of ``state`` are not those
    of ``a``.
    """
    config = config_of(a)
    own = empty_network(config).state_dict()
    keys = _renamed(a.structure, own)
    _check(state, a, {key: [own[target].shape for target in targets] for key, targets in keys.items()}, name)
    made: State = {}
    for key, targets in keys.items():
        tensor = state[key]
        if len(targets) == 3:
            made |= zip(targets, _split(tensor, a), strict=True)
        else:
            made[targets[0]] = tensor.flatten(1) if own[targets[0]].ndim == 2 else tensor
    if config.get("time_embedding_type") == "learned":
        table, weight = learned_time(state["time_embed.0.weight"], a.structure.widths[0])
        made |= {"time_proj.weight": table, "time_embedding.linear_1.weight": weight}
    return config, made


def _check(state: State, a: Architecture, wanted: Mapping[str, list[torch.Size]], name: str) -> None:
    """Raises WeightsError if ``state`` has other keys or shapes than ``wanted``: for each key the shapes of its pieces."""
    missing, left = [key for key in wanted if key not in state], [key for key in state if key not in wanted]
    odd = []
    for key, pieces in wanted.items():
        shape = [len(pieces) * pieces[0][0], *pieces[0][1:]]
        if key == "time_embed.0.weight":
            shape[1] = a.structure.channels  # before its columns become those of the learned table
        # 1x1 convolutions become matrices: their shape has one or two trailing ones more.
        given = list(state[key].shape) if key in state else shape
        if given != shape and not (len(shape) == 2 and given[:2] == shape and set(given[2:]) == {1}):
            odd.append(f"{key} {tuple(given)} instead of {tuple(shape)}")
    problems = [
        f"{_some(keys)} {'is' if len(keys) == 1 else 'are'} {what}"
        for keys, what in ((missing, "missing"), (left, "left over"), (odd, "of another shape"))
        if keys
    ]
    if problems:
        raise WeightsError(f"the checkpoint does not fit {name} ({a.structure}): {'; '.join(problems)}")


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _split(qkv: Tensor, a: Architecture) -> list[Tensor]:
    """Rows of the three of a qkv weight (3C, C, 1) or bias (3C,), each (C, C) or (C,)."""
    rows = qkv.flatten(1) if qkv.ndim > 1 else qkv
    width = rows.shape[0] // 3
    if a.attention_order == "new":
        return list(rows.chunk(3))
    by_head = rows.unflatten(0, (-1, 3, a.head_channels or width))
    return [piece.flatten(0, 1) for piece in by_head.unbind(1)]


def learned_time(weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A sinusoid of another width as a table: (TIMESTEPS, width), and the first layer's weight (out, channels) turned into
    (out, width) that yields the same on it. Raises WeightsError if ``width`` is too small for that."""
    channels = weight.shape[1]
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(TIMESTEPS, dtype=torch.float64)[:, None] * frequencies
    u, s, v = torch.linalg.svd(torch.cat([angles.cos(), angles.sin()], dim=1), full_matrices=False)
    lost = float(s[width:].norm() / s.norm())
    if lost > 1e-6:
        raise WeightsError(
            f"the sinusoid of the timestep is {channels} wide and the first level {width}, in which it does not fit "
            f"(a share of {lost:.1g} would be lost); UNet2DModel cannot express this network"
        )
    rank = min(width, channels)
    table, turned = torch.zeros(TIMESTEPS, width), torch.zeros(weight.shape[0], width)
    table[:, :rank] = (u * s)[:, :rank].float()
    turned[:, :rank] = (weight.double() @ v.T[:, :rank]).float()
    return table, turned


# --- writing ------------------------------------------------------------------------------------------------------------


def refuse_full(folder: Path, overwrite: bool) -> None:
    """Raises WeightsError if ``folder`` cannot be written to, or holds something and may not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise WeightsError(f"{folder} already holds something; give another folder, or --overwrite")


def save(
    folder: Path,
    config: Mapping[str, Any],
    state: State,
    *,
    schedule: str = "linear",
    more: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """A diffusers folder: ``config.json``, weights, ``scheduler_config.json`` with a schedule of ``SCHEDULES`` (all of the table are
    linear), and the text files in ``more``. It appears when it is complete. Raises WeightsError if it holds something already."""
    refuse_full(folder, overwrite)
    folder = folder.resolve()
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        building.mkdir(parents=True)
        _write(building, config, state, schedule)
        for name, text in (more or {}).items():
            (building / name).write_text(text)
        _put_in_place(building, folder)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write(folder: Path, config: Mapping[str, Any], state: State, schedule: str) -> None:
    from diffusers import DDPMScheduler

    empty_network(config).save_config(folder)
    write_state(folder / WEIGHTS, {key: tensor.contiguous() for key, tensor in state.items()})
    scheduler: Any = DDPMScheduler(  # diffusers hides its methods from type checkers
        num_train_timesteps=TIMESTEPS,
        **SCHEDULES[schedule],
        prediction_type="epsilon",
        clip_sample=False,
        variance_type="learned_range" if config["out_channels"] == 6 else "fixed_small",
    )
    scheduler.save_config(folder)


def _put_in_place(building: Path, folder: Path) -> None:
    if not folder.exists():
        building.replace(folder)
        return
    (folder / "domain.json").unlink(missing_ok=True)  # it described what was here before
    for file in building.iterdir():  # others' files in the folder are not ours to delete
        file.replace(folder / file.name)


def distance(state: State, base: Path) -> float:
    """Share by which the weights ``state`` differ from those in the safetensors file ``base``, in the norm of all: some
    percent for one fine-tuned from the other, more than 1 for strangers. Raises WeightsError if keys or shapes differ."""
    weights = read_state(base)
    wrong = sorted(weights.keys() ^ state.keys()) + [k for k in weights.keys() & state.keys() if weights[k].shape != state[k].shape]
    if wrong:
        raise WeightsError(
            f"the checkpoint is not of the domain's network: {_some(wrong)} {'is' if len(wrong) == 1 else 'are'} missing, left over or "
            "of another shape"
        )
    same = [key for key in weights if not key.startswith(("time_proj.", "time_embedding.linear_1."))]  # a table is unique up to a rotation
    away = sum(float((state[key] - weights[key]).double().square().sum()) for key in same)
    norm = sum(float(weights[key].double().square().sum()) for key in same)
    return math.sqrt(away / norm)
