"""Networks of the official codes, and how to recognise one from a state dict.

Two families are known: ``ddpm``, the PyTorch DDPM of SDEdit and DiffusionCLIP (keys like ``down.0.block.0.norm1.weight``), and
``adm``, the U-Net of improved DDPM, guided-diffusion and ILVR (keys like ``input_blocks.1.0.in_layers.0.weight``).
"""

import re
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any

from torch import Tensor

from models.checkpoints import State
from models.references import WeightsError

FAMILIES = {"ddpm": "the DDPM of SDEdit and DiffusionCLIP", "adm": "the improved DDPM or ADM of guided-diffusion and ILVR"}
ATTENTION_ORDERS = ("legacy", "new")
GROUPS = 32
"""Of every normalisation, in both families."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What the keys and shapes of a state dict say."""

    family: str
    channels: int
    """Width of the sinusoid of the timestep; multipliers of the original configuration count in these."""
    widths: tuple[int, ...]
    """Channels of each level, the finest first."""
    blocks: int
    """Residual blocks of a level on the way down; one more on the way up."""
    attention: tuple[bool, ...]
    """Whether a level has attention; the middle always has."""
    scale_shift: bool = False
    """The time embedding scales and shifts the normalised features instead of being added to them."""
    resblock_updown: bool = False
    """Residual blocks change the size, not plain convolutions."""
    learned_variance: bool = False
    """Twice as many channels come out."""
    classes: int | None = None

    def __str__(self) -> str:
        at = [str(level) for level, here in enumerate(self.attention) if here]
        return ", ".join(
            [
                f"{self.family} of {self.channels} channels",
                f"levels {'/'.join(map(str, self.widths))}",
                f"{self.blocks} residual blocks each",
                f"attention in {'level ' + ', '.join(at) + ' and ' if at else ''}the middle",
                *(["scale-shift norm"] if self.scale_shift else []),
                "resampling by residual blocks" if self.resblock_updown else "resampling by convolutions",
                "learned variance" if self.learned_variance else "fixed variance",
                f"{self.classes} classes" if self.classes else "no classes",
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A structure with what a state dict does not tell."""

    structure: Structure
    image_size: int
    head_channels: int = 0
    """Channels of an attention head; 0 is one head over all channels."""
    attention_order: str = "legacy"
    """Of the rows of the qkv matrix: ``legacy`` (head, q/k/v, channel) or ``new`` (q/k/v, head, channel)."""
    about: str = ""


def _architecture(about: str, family: str, image_size: int, channels: int, multipliers: tuple[float, ...], blocks: int,
                  attention_at: tuple[int, ...], head_channels: int = 0, **details: Any) -> Architecture:  # fmt: skip
    structure = Structure(
        family=family,
        channels=channels,
        widths=tuple(int(m * channels) for m in multipliers),
        blocks=blocks,
        attention=tuple(image_size >> level in attention_at for level in range(len(multipliers))),
        **details,
    )
    return Architecture(structure=structure, image_size=image_size, head_channels=head_channels, about=about)


_AT_256, _AT_512 = (1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)
_LATER: dict[str, Any] = {"scale_shift": True, "resblock_updown": True, "learned_variance": True}

ARCHITECTURES: dict[str, Architecture] = {
    "ddpm-256": _architecture("CelebA-HQ and LSUN at 256 (DDPM)", "ddpm", 256, 128, _AT_256, 2, (16,)),
    "iddpm-256": _architecture("FFHQ and AFHQ dog at 256 (ILVR)", "adm", 256, 128, _AT_256, 1, (16,), 64, **_LATER),
    "adm-256": _architecture("ImageNet and LSUN at 256, unconditional (ADM)", "adm", 256, 256, _AT_256, 2, (32, 16, 8), 64, **_LATER),
    "adm-256-conditional": _architecture(
        "ImageNet at 256 by class (ADM)", "adm", 256, 256, _AT_256, 2, (32, 16, 8), 64, classes=1000, **_LATER
    ),
    "adm-512": _architecture("ImageNet at 512 by class (ADM)", "adm", 512, 256, _AT_512, 2, (32, 16, 8), 64, classes=1000, **_LATER),
}


# --- recognising --------------------------------------------------------------------------------------------------------


def _count(state: State, pattern: str) -> int:
    """How many of ``pattern`` with 0, 1, 2, ... in it there are."""
    return sum(1 for _ in takewhile(lambda index: pattern.format(index) in state, count()))


def structure_of(state: State) -> Structure:
    """What the network of a state dict looks like. Raises WeightsError if it is of neither family, or of a form that
    UNet2DModel cannot express."""
    try:
        if "temb.dense.0.weight" in state:
            return _ddpm_structure(state)
        if "time_embed.0.weight" in state and "output_blocks.0.0.in_layers.2.weight" in state:
            return _adm_structure(state)
    except (KeyError, IndexError) as error:
        what = f"has no {error.args[0]}" if isinstance(error, KeyError) else "has tensors with too few dimensions"
        raise WeightsError(f"the checkpoint {what}; name its architecture to see all that does not fit") from None
    if "time_embedding.linear_1.weight" in state:
        raise WeightsError("the checkpoint is in diffusers' form already; give the folder that it came in, with its config.json")
    raise WeightsError(
        f"the checkpoint is of no known family ({'; '.join(f'{k}: {v}' for k, v in FAMILIES.items())}); "
        f"its keys are {', '.join(list(state)[:3])}{f' and {len(state) - 3} more' if len(state) > 3 else ''}"
    )


def _ddpm_structure(state: State) -> Structure:
    if any(".conv_shortcut." in name for name in state):
        raise WeightsError("the checkpoint has shortcuts of 3x3 convolutions (conv_shortcut); UNet2DModel has only 1x1 ones")
    levels = _count(state, "down.{}.block.0.conv1.weight")
    if not levels:
        raise KeyError("down.0.block.0.conv1.weight")
    if levels > 1 and not any("sample.conv" in name for name in state):
        raise WeightsError("the checkpoint resamples without convolutions (resamp_with_conv false); UNet2DModel cannot")
    found = Structure(
        family="ddpm",
        channels=state["temb.dense.0.weight"].shape[1],
        widths=tuple(state[f"down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)),
        blocks=_count(state, "down.0.block.{}.conv1.weight"),
        attention=tuple(f"down.{level}.attn.0.norm.weight" in state for level in range(levels)),
        learned_variance=_learned_variance(state["conv_in.weight"], state["conv_out.weight"]),
    )
    if found.widths[:1] != (state["conv_in.weight"].shape[0],):
        raise WeightsError("the checkpoint's first level is not as wide as its first convolution; UNet2DModel's always is")
    return found


def _adm_structure(state: State) -> Structure:
    if any(name.endswith("skip_connection.weight") and tensor.shape[-1] != 1 for name, tensor in state.items()):
        raise WeightsError("the checkpoint has shortcuts of 3x3 convolutions (skip_connection); UNet2DModel has only 1x1 ones")
    # A level on the way up ends with what enlarges it, behind the attention if there is any.
    outputs = _count(state, "output_blocks.{}.0.in_layers.2.weight")
    enlarging = r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight"
    ends = sorted(int(found[1]) for name in state if (found := re.fullmatch(enlarging, name)))
    blocks = ends[0] if ends else outputs - 1
    if blocks >= outputs:
        raise KeyError(f"output_blocks.{outputs}.0.in_layers.2.weight")
    levels = range(outputs // (blocks + 1))
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("input_blocks.")}
    if not ends and numbers != set(range(len(numbers))):
        raise WeightsError("the checkpoint resamples without convolutions (conv_resample false); UNet2DModel cannot")
    starts = [1 + level * (blocks + 1) for level in levels]
    widths = tuple(state[f"input_blocks.{start}.0.in_layers.2.weight"].shape[0] for start in starts)
    return Structure(
        family="adm",
        channels=state["time_embed.0.weight"].shape[1],
        widths=widths,
        blocks=blocks,
        attention=tuple(f"input_blocks.{start}.1.qkv.weight" in state for start in starts),
        scale_shift=state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        resblock_updown=f"input_blocks.{blocks + 1}.0.in_layers.2.weight" in state,
        learned_variance=_learned_variance(state["input_blocks.0.0.weight"], state["out.2.weight"]),
        classes=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
    )


def _learned_variance(first: Tensor, last: Tensor) -> bool:
    inside, out = first.shape[1], last.shape[0]
    if inside != 3 or out not in (3, 6):
        raise WeightsError(
            f"the checkpoint takes {inside} and gives {out} channels; only networks of images (3 to 3, or to 6 with a learned variance) "
            "are domains, not those that enlarge images or classify them"
        )
    return out == 6


def architecture_of(
    state: State, *, head_channels: int | None = None, attention_order: str | None = None, image_size: int | None = None
) -> tuple[str, Architecture]:
    """Name ("custom" if it is not in the table) and architecture of a state dict, changed by what is given.

    Raises WeightsError if the structure is not in the table and what it does not tell is not given.
    """
    found = structure_of(state)
    asked = {"head_channels": head_channels, "attention_order": attention_order, "image_size": image_size}
    if found.family == "ddpm":
        asked |= {"head_channels": asked["head_channels"] or 0, "attention_order": asked["attention_order"] or "legacy"}  # one head always
    known = [(name, a) for name, a in ARCHITECTURES.items() if a.structure == found]
    name, base = known[0] if known else ("custom", Architecture(structure=found, image_size=0, about="not in the table"))
    missing = [f"--{option.replace('_', '-')}" for option, value in asked.items() if value is None]
    if missing and not known:
        raise WeightsError(
            f"the checkpoint is of no architecture in the table ({', '.join(ARCHITECTURES)}): it is {found}; its file does not tell "
            f"the rest, so give {', '.join(missing)}, or if it should be one of those, name it with --architecture to see what differs"
        )
    return name, changed(base, head_channels=head_channels, attention_order=attention_order, image_size=image_size)


def changed(base: Architecture, **given: Any) -> Architecture:
    """``base`` with the values that are not None. Raises WeightsError for an impossible one."""
    made = replace(base, **{name: value for name, value in given.items() if value is not None})
    s = made.structure
    coarsest = 2 ** (len(s.widths) - 1)
    attended = {width for width, here in zip(s.widths, s.attention, strict=True) if here} | {s.widths[-1]}
    if made.image_size < coarsest or made.image_size % coarsest:
        raise WeightsError(f"the image size must be a multiple of {coarsest} for {len(s.widths)} levels; got {made.image_size}")
    if made.attention_order not in ATTENTION_ORDERS:
        raise WeightsError(f"the attention order is {' or '.join(ATTENTION_ORDERS)}; got {made.attention_order!r}")
    if s.family == "ddpm" and made.head_channels:
        raise WeightsError(f"a ddpm has one attention head over all channels; got {made.head_channels} channels a head")
    if made.head_channels < 0 or (made.head_channels and any(width % made.head_channels for width in attended)):
        widths = ", ".join(map(str, sorted(attended)))
        raise WeightsError(f"channels of an attention head must divide {widths}, or be 0 for a single head; got {made.head_channels}")
    uneven = [width for width in s.widths if width % GROUPS]
    if uneven:
        raise WeightsError(f"widths of levels must be multiples of {GROUPS}, the groups of the normalisation; got {uneven[0]}")
    return made
