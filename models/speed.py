"""How fast a network runs: from a table of GPUs and an assumed utilisation, or measured on this machine with random weights.

What the table holds are the makers' peaks, which no convolution reaches; utilisation says what share of them is assumed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.flops import call_flops, example, network_of
from models.unet import NoiseUNet

UTILISATION = 0.35
"""Share of the peak that is assumed; nothing here was measured on a GPU."""
LEAST, MOST = 0.2, 0.5
"""Utilisations between which convolutional networks of this kind are expected."""
WARM_UP = 2
"""Calls before the clock starts: they choose algorithms and allocate memory."""
OnCall = Callable[[int, float], None]
"""Told the number of calls and the seconds that were timed so far."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense peaks in TFLOP/s (data sheets that print them "with sparsity" are halved); None is a precision without hardware."""

    float32: float
    tf32: float | None
    bfloat16: float | None
    float16: float
    source: str


GPUS: dict[str, Gpu] = {
    "t4": Gpu(float32=8.1, tf32=None, bfloat16=None, float16=65, source="NVIDIA T4 data sheet"),
    "v100": Gpu(float32=15.7, tf32=None, bfloat16=None, float16=125, source="NVIDIA V100 data sheet, SXM2"),
    "a10": Gpu(float32=31.2, tf32=62.5, bfloat16=125, float16=125, source="NVIDIA A10 data sheet"),
    "l4": Gpu(float32=30.3, tf32=60, bfloat16=121, float16=121, source="NVIDIA L4 data sheet, without sparsity"),
    "l40s": Gpu(float32=91.6, tf32=183, bfloat16=362, float16=362, source="NVIDIA L40S data sheet"),
    "a100": Gpu(float32=19.5, tf32=156, bfloat16=312, float16=312, source="NVIDIA A100 data sheet"),
    "h100-pcie": Gpu(float32=51, tf32=378, bfloat16=756, float16=756, source="NVIDIA H100 data sheet, PCIe, without sparsity"),
    "h100": Gpu(float32=67, tf32=494, bfloat16=989, float16=989, source="NVIDIA H100 data sheet, SXM, without sparsity"),
    "h200": Gpu(float32=67, tf32=494, bfloat16=989, float16=989, source="NVIDIA H200 data sheet, SXM, without sparsity"),
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Floating-point operations a second of one device, and between what they may lie."""

    flops: float
    slowest: float
    fastest: float
    measured: bool
    about: str


def assumed(name: str, precision: str, utilisation: float = UTILISATION) -> Speed:
    """Of a GPU of the table. Raises KeyError if it is not there, ValueError if it has no hardware for the precision."""
    peak = getattr(GPUS[name], precision)
    if peak is None:
        raise ValueError(f"{name} has no hardware for {precision}; take float16 or float32")
    about = f"assumed: {utilisation:.0%} of the {peak:g} TFLOP/s of {GPUS[name].source}"
    low, high = min(LEAST, utilisation), max(MOST, utilisation)
    return Speed(flops=peak * utilisation * 1e12, slowest=peak * low * 1e12, fastest=peak * high * 1e12, measured=False, about=about)


def measured(
    config: Mapping[str, Any], device: str, precision: str, batch: int, seconds: float, on_call: OnCall = lambda calls, seconds: None
) -> Speed:
    """Of a network with random weights, in calls of ``batch`` images for at least so many seconds and two calls after the warm-up."""
    from diffusers import UNet2DModel

    flops = call_flops(network_of(config)) * batch
    model = NoiseUNet(UNet2DModel.from_config(dict(config)), precision).requires_grad_(False).eval().to(device)
    x, t = example(model.unet, device, batch)
    took: list[float] = []
    with torch.no_grad():
        while len(took) < WARM_UP + 2 or sum(took[WARM_UP:]) < seconds:
            took.append(_seconds_of(lambda: model(x, t), device))
            on_call(len(took), sum(took[WARM_UP:]))
    timed = took[WARM_UP:]
    about = f"measured on this machine's {_named(device)}: {len(timed)} calls of {batch} images, {min(timed):.2g} to {max(timed):.2g} s"
    return Speed(flops=flops * len(timed) / sum(timed), slowest=flops / max(timed), fastest=flops / min(timed), measured=True, about=about)


def _seconds_of(call: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
