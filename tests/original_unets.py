"""The two original architectures, written from their published descriptions, with the names of their state dicts.

``Ddpm`` is the U-Net of Ho et al. (2020) in the PyTorch form that SDEdit and DiffusionCLIP use; ``Adm`` that of Nichol and
Dhariwal (2021) and Dhariwal and Nichol (2021, appendix), which guided-diffusion and ILVR use. Only inference, only what
checkpoints have been published of.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.official import ARCHITECTURES


def frequencies(half: int, last: int) -> Tensor:
    """Geometric from 1 down to 1/10000, which is reached at index ``last``."""
    return torch.exp(torch.arange(half) * (-math.log(10000) / last))


def empty(**parts: nn.Module) -> nn.Module:
    """A module that only holds others under a name."""
    holder = nn.Module()
    for name, part in parts.items():
        holder.add_module(name, part)
    return holder


# --- DDPM ---------------------------------------------------------------------------------------------------------------


class DdpmBlock(nn.Module):
    def __init__(self, inside: int, out: int, time: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1)
        self.temb_proj = nn.Linear(time, out)
        self.norm2 = nn.GroupNorm(32, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if inside != out:
            self.nin_shortcut = nn.Conv2d(inside, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(emb))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DdpmAttention(nn.Module):
    """One head over all channels, by 1x1 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (getattr(self, name)(h).flatten(2) for name in "qkv")  # (B, C, pixels)
        share = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
        return x + self.proj_out((v @ share.transpose(1, 2)).view_as(x))


@dataclass
class DdpmShape:
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    attn_levels: tuple[int, ...] = ()
    out_ch: int = 3


class Ddpm(nn.Module):
    def __init__(self, shape: DdpmShape):
        super().__init__()
        self.shape, ch = shape, shape.ch
        time = 4 * ch
        self.temb = empty(dense=nn.ModuleList([nn.Linear(ch, time), nn.Linear(time, time)]))
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        widths = [ch * m for m in shape.ch_mult]
        now, skips = ch, [ch]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            stage = empty(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(shape.num_res_blocks):
                self._layer(stage, level, now, width)
                now = width
                skips.append(now)
            if level < len(widths) - 1:
                stage.add_module("downsample", empty(conv=nn.Conv2d(now, now, 3, stride=2)))
                skips.append(now)
            self.down.append(stage)
        self.mid = empty(block_1=DdpmBlock(now, now, time), attn_1=DdpmAttention(now), block_2=DdpmBlock(now, now, time))
        for level, width in reversed(list(enumerate(widths))):
            stage = empty(block=nn.ModuleList(), attn=nn.ModuleList())
            for _ in range(shape.num_res_blocks + 1):
                self._layer(stage, level, now + skips.pop(), width)
                now = width
            if level:
                stage.add_module("upsample", empty(conv=nn.Conv2d(now, now, 3, padding=1)))
            self.up.insert(0, stage)
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = nn.Conv2d(now, shape.out_ch, 3, padding=1)

    def _layer(self, stage: Any, level: int, inside: int, out: int) -> None:
        stage.block.append(DdpmBlock(inside, out, 4 * self.shape.ch))
        if level in self.shape.attn_levels:
            stage.attn.append(DdpmAttention(out))

    def _run(self, stage: Any, index: int, h: Tensor, emb: Tensor) -> Tensor:
        h = stage.block[index](h, emb)
        return stage.attn[index](h) if len(stage.attn) else h

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.shape.ch // 2
        angle = t.float()[:, None] * frequencies(half, half - 1)
        first, second = self.temb.dense
        emb = second(F.silu(first(torch.cat([angle.sin(), angle.cos()], dim=1))))
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            for index in range(self.shape.num_res_blocks):
                h = self._run(stage, index, h, emb)
                skips.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample.conv(F.pad(h, (0, 1, 0, 1)))  # only to the right and below, as TensorFlow pads
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, emb)), emb)
        for stage in reversed(self.up):
            for index in range(self.shape.num_res_blocks + 1):
                h = self._run(stage, index, torch.cat([h, skips.pop()], dim=1), emb)
            if hasattr(stage, "upsample"):
                h = stage.upsample.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv_out(F.silu(self.norm_out(h)))


# --- improved DDPM and ADM ------------------------------------------------------------------------------------------------


@dataclass
class AdmShape:
    model_channels: int = 32
    channel_mult: tuple[float, ...] = (1, 2)
    num_res_blocks: int = 1
    attention_levels: tuple[int, ...] = ()
    head_channels: int = 32
    new_attention_order: bool = False
    scale_shift: bool = False
    resblock_updown: bool = False
    num_classes: int | None = None
    out_channels: int = 3

    def width(self, level: int) -> int:
        return int(self.channel_mult[level] * self.model_channels)


class AdmBlock(nn.Module):
    """``resample``: '' keeps the size, 'down' averages 2x2, 'up' repeats 2x2; both before the first convolution."""

    def __init__(self, inside: int, out: int, shape: AdmShape, resample: str = ""):
        super().__init__()
        self.scale_shift, self.resample = shape.scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inside), nn.SiLU(), nn.Conv2d(inside, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * shape.model_channels, out * (2 if shape.scale_shift else 1)))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if inside == out else nn.Conv2d(inside, out, 1)

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(self._resized(activation(norm(x))))
        told = self.emb_layers(emb)[..., None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self._resized(x)) + h


class AdmAttention(nn.Module):
    """Heads of ``head_channels``. In the legacy order the channels of qkv are (head, q/k/v, channel), in the new one
    (q/k/v, head, channel)."""

    def __init__(self, width: int, shape: AdmShape):
        super().__init__()
        self.channels, self.new_order = shape.head_channels, shape.new_attention_order
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        heads = x.shape[1] // self.channels
        if self.new_order:
            q, k, v = qkv.unflatten(1, (3, heads, self.channels)).unbind(1)
        else:
            q, k, v = qkv.unflatten(1, (heads, 3, self.channels)).unbind(2)
        share = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(self.channels), dim=-1)
        seen = torch.einsum("bhts,bhcs->bhct", share, v).flatten(1, 2)
        return (flat + self.proj_out(seen)).view_as(x)


class AdmDown(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class AdmUp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Adm(nn.Module):
    def __init__(self, shape: AdmShape):
        super().__init__()
        self.shape = shape
        time = 4 * shape.model_channels
        self.time_embed = nn.Sequential(nn.Linear(shape.model_channels, time), nn.SiLU(), nn.Linear(time, time))
        if shape.num_classes is not None:
            self.label_emb = nn.Embedding(shape.num_classes, time)
        levels = range(len(shape.channel_mult))
        now = shape.width(0)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, now, 3, padding=1)])])
        skips = [now]
        for level in levels:
            for _ in range(shape.num_res_blocks):
                self.input_blocks.append(nn.ModuleList(self._layers(level, now)))
                now = shape.width(level)
                skips.append(now)
            if level < levels[-1]:
                down = AdmBlock(now, now, shape, "down") if shape.resblock_updown else AdmDown(now)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(now)
        self.middle_block = nn.ModuleList([AdmBlock(now, now, shape), AdmAttention(now, shape), AdmBlock(now, now, shape)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for index in range(shape.num_res_blocks + 1):
                layers = self._layers(level, now + skips.pop())
                now = shape.width(level)
                if level and index == shape.num_res_blocks:
                    layers.append(AdmBlock(now, now, shape, "up") if shape.resblock_updown else AdmUp(now))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, shape.out_channels, 3, padding=1))

    def _layers(self, level: int, inside: int) -> list[nn.Module]:
        width = self.shape.width(level)
        layers: list[nn.Module] = [AdmBlock(inside, width, self.shape)]
        return [*layers, AdmAttention(width, self.shape)] if level in self.shape.attention_levels else layers

    @staticmethod
    def _run(layers: Any, h: Tensor, emb: Tensor) -> Tensor:
        for layer in layers:
            h = layer(h, emb) if isinstance(layer, AdmBlock) else layer(h)
        return h

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.shape.model_channels // 2
        angle = t.float()[:, None] * frequencies(half, half)
        emb = self.time_embed(torch.cat([angle.cos(), angle.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for layers in self.input_blocks:
            h = self._run(layers, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for layers in self.output_blocks:
            h = self._run(layers, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


# --- with random weights ------------------------------------------------------------------------------------------------

SIZE = 8
TIMES = torch.tensor([0, 1, 37, 500, 999])
"""The first and the last timestep, and the large ones whose sinusoid is the most delicate."""


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """The same weights for the same seed, of which every one counts: also norms', which start as 1 and 0."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            for name, weight in module.named_parameters(recurse=False):
                spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2
                around = float(isinstance(module, nn.GroupNorm) and name == "weight")
                weight.copy_(around + spread * torch.randn(weight.shape, generator=noise))
    return network.eval()


def ddpm(seed: int = 0, **changes: Any) -> Any:
    return randomised(Ddpm(DdpmShape(**changes)), seed)


def adm(**changes: Any) -> Any:
    return randomised(Adm(AdmShape(**changes)))


def real(name: str) -> dict[str, Tensor]:
    """State dict of a real network without its memory; only the weights of the timestep are numbers."""
    s, a = ARCHITECTURES[name].structure, ARCHITECTURES[name]
    levels = tuple(level for level, here in enumerate(s.attention) if here)
    multipliers = tuple(width / s.channels for width in s.widths)
    with torch.device("meta"):
        if s.family == "ddpm":
            network: nn.Module = Ddpm(DdpmShape(s.channels, tuple(map(int, multipliers)), s.blocks, levels))
        else:
            shape = AdmShape(s.channels, multipliers, s.blocks, levels, a.head_channels, False, True, True, s.classes, 6)
            network = Adm(shape)
    state = network.state_dict()
    return state | ({"time_embed.0.weight": torch.zeros(4 * s.channels, s.channels)} if s.family == "adm" else {})


@torch.no_grad()
def outputs(original: nn.Module, converted: Any, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(TIMES), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    wanted = original(x, TIMES) if labels is None else original(x, TIMES, labels)
    return converted(x, TIMES, labels, return_dict=False)[0], wanted


def assert_same(original: nn.Module, converted: Any, labels: Tensor | None = None) -> None:
    got, wanted = outputs(original, converted, labels)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
