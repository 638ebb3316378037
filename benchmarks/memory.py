"""What fine-tuning, inversion and editing at real size keep in memory: counted from shapes, nothing is computed.

python -m benchmarks.memory --out benchmarks/results/memory.json
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import typer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.evaluate import machine
from jobs.progress import console, display
from jobs.tables import count_table
from models import lora
from models.clip import Clip, TextDirection
from models.conversion import config_of, empty_network
from models.diffusion import linear_alpha_bars, walk
from models.finetune import Objective, checkpointed, edit_losses
from models.latent import global_loss
from models.official import ARCHITECTURES
from models.recipe import Recipe, Tuning
from models.unet import NoiseUNet

GIB = 2**30
NAMES = ("ddpm-256", "iddpm-256", "adm-256", "adm-512")
CASES = {
    "full": ("float32", None),
    "checkpoint": ("float32", None),
    "stepwise": ("float32", None),
    "checkpoint, bfloat16": ("bfloat16", None),
    "checkpoint, bfloat16, rank 8": ("bfloat16", 8),
}
EDITS = ((1, 1), (16, 1), (16, 10))
"""Images at once and edit models of the run."""


@contextmanager
def counting(own: nn.Module, shapes: FakeTensorMode) -> Iterator[Callable[[], int]]:
    """Counts the bytes of distinct tensors that are kept for a backward pass, ``own``'s parameters apart."""
    seen = {shapes.from_tensor(p).untyped_storage()._cdata for p in own.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in seen:
            kept[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def activations_of(loss: Callable[[], object], model: NoiseUNet, x: Tensor, shapes: FakeTensorMode, memory: str) -> int:
    """Bytes that are kept for the backward pass of a loss."""
    with counting(model, shapes) as activations:
        losses = loss()
        kept = activations()
    if memory == "checkpoint":  # while one call is computed again, its activations are there too
        with counting(model, shapes) as activations:
            again = model(x, torch.zeros(1, dtype=torch.int64))
            kept += activations()
            del again
    del losses
    return kept


def needs(architecture: str, case: str, steps: int) -> dict[str, float]:
    """GiB of weights, gradients, optimizer state and activations of one image."""
    precision, rank = CASES[case]
    tuning = Tuning(memory=case.split(",")[0], batch=1, steps_down=steps, rank=rank)
    size = ARCHITECTURES[architecture].image_size
    path = Recipe(return_step=500, steps_down=steps, spacing="linspace").down(linear_alpha_bars())
    levels: Any = linear_alpha_bars().tolist()
    model = network(architecture, precision, rank)
    with FakeTensorMode(allow_non_fake_inputs=True) as shapes:
        clip = vit_b_16()
        direction = TextDirection(torch.zeros(1, 512), torch.zeros(512))
        objective = Objective(clips=((clip, direction),), path=path, alpha_bars=levels, order=1, tuning=tuning)
        x = torch.zeros(1, 3, size, size)
        kept = activations_of(lambda: next(edit_losses(model, x, torch.zeros_like(x), objective)), model, x, shapes, tuning.memory)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
        return {
            "weights": (bytes_of(model) + bytes_of(clip)) / GIB,
            "gradients": trained / GIB,
            "optimizer": 2 * trained / GIB,
            "activations": kept / GIB,
            "total": (bytes_of(model) + bytes_of(clip) + 3 * trained + kept) / GIB,
        }


def optimizing(architecture: str, memory: str, steps: int) -> dict[str, float]:
    """GiB of weights and activations of ``diffusionclip optimize``: only the latent of one image has a gradient."""
    size, model = ARCHITECTURES[architecture].image_size, network(architecture, "float32", None).requires_grad_(False)
    tuning = Tuning(memory=memory, batch=1, steps_down=steps)
    path = Recipe(return_step=500, steps_down=steps, spacing="linspace").down(linear_alpha_bars())
    levels: Any = linear_alpha_bars().tolist()
    with FakeTensorMode(allow_non_fake_inputs=True) as shapes:
        clip = vit_b_16()
        direction = TextDirection(torch.zeros(1, 512), torch.zeros(512))
        objective = Objective(clips=((clip, direction),), path=path, alpha_bars=levels, order=1, tuning=tuning)
        x0, x = torch.zeros(1, 3, size, size), torch.zeros(1, 3, size, size).requires_grad_(True)
        called = checkpointed(model) if memory == "checkpoint" else model
        kept = activations_of(lambda: global_loss(walk(called, x, path, levels), x0, objective), model, x, shapes, memory)
        weights = bytes_of(model) + bytes_of(clip)
        return {"weights": weights / GIB, "activations": kept / GIB, "total": (weights + kept) / GIB}


class Peak(TorchDispatchMode):
    """The greatest number of bytes that results of operations hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.bytes = max(self.bytes, sum(self.live.values()))
        return result


def walking(architecture: str, batch: int) -> dict[str, float]:
    """GiB of the weights of one model and of what a call without gradients holds at its most, for a batch of images."""
    size, model = ARCHITECTURES[architecture].image_size, network(architecture, "float32", None)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Peak() as peak:
        model(torch.zeros(batch, 3, size, size), torch.zeros(batch, dtype=torch.int64))
    return {"weights": bytes_of(model) / GIB, "call": peak.bytes / GIB}


def editing(architecture: str, batch: int, models: int) -> dict[str, float]:
    """GiB of ``diffusionclip edit`` of pictures with so many edit models: they, the base model and the CLIP that scores stay on the
    device; one network at a time is called."""
    size, walked = ARCHITECTURES[architecture].image_size, walking(architecture, batch)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        clip = vit_b_16()
        with Peak() as peak:
            clip.image_features(torch.zeros(batch, 3, size, size))
    weights, call = (1 + models) * walked["weights"] + bytes_of(clip) / GIB, max(walked["call"], peak.bytes / GIB)
    return {"weights": weights, "call": call, "total": weights + call}


def network(architecture: str, precision: str, rank: int | None) -> NoiseUNet:
    unet = empty_network(config_of(ARCHITECTURES[architecture])).to_empty(device="cpu")
    if rank is not None:
        lora.add(unet, rank)
    return NoiseUNet(unet, precision)


def vit_b_16() -> Clip:
    model: Any = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
    open_clip.model.set_model_preprocess_cfg(model, asdict(open_clip.transform.PreprocessCfg(size=224)))
    tokenizer: Any = None  # no text is read here
    return Clip(model, tokenizer)


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def main(steps: int = 6, out: Annotated[Path | None, typer.Option()] = None) -> None:
    """Prints the needs of one image at a time, with CLIP ViT-B/16, for the architectures of the real domains."""
    results = []
    with display("counting", len(NAMES) * len(CASES), "cases") as shown:
        for architecture in NAMES:
            for case in CASES:
                results.append({"architecture": architecture, "memory": case, **needs(architecture, case, steps)})
                shown.update(len(results), f"{architecture} {case}")
    walks = [{"architecture": name, "batch": batch, **walking(name, batch)} for name in NAMES for batch in (1, 16)]
    lines = [(f"{r['architecture']}, {r['memory']}", f"{r['total']:.1f} GiB, {r['activations']:.1f} of it activations") for r in results]
    console.print(count_table(f"fine-tuning through {steps} steps, one image", lines))
    lines = [(f"{r['architecture']}, batch {r['batch']}", f"{r['weights']:.2f} GiB a model, {r['call']:.2f} GiB a call") for r in walks]
    console.print(count_table("inversion and editing", lines))
    edits = [{"architecture": a, "batch": b, "models": n, **editing(a, b, n)} for a in NAMES for b, n in EDITS]
    lines = [(f"{r['architecture']}, batch {r['batch']}, {r['models']} edit models", f"{r['total']:.1f} GiB") for r in edits]
    console.print(count_table("editing pictures, scoring CLIP and base model included", lines))
    latents = [{"architecture": a, "memory": memory, **optimizing(a, memory, steps)} for a in NAMES for memory in ("full", "checkpoint")]
    lines = [(f"{r['architecture']}, {r['memory']}", f"{r['total']:.1f} GiB, {r['activations']:.1f} of it activations") for r in latents]
    console.print(count_table(f"optimising a latent through {steps} steps, one image", lines))
    if out:
        report = {"machine": machine(), "steps_down": steps, "finetune": rounded(results), "walk": rounded(walks)}
        report |= {"edit": rounded(edits), "optimize": rounded(latents)}
        out.write_text(json.dumps(report, indent=2) + "\n")


def rounded(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: round(v, 2) if isinstance(v, float) else v for k, v in r.items()} for r in results]


if __name__ == "__main__":
    typer.run(main)
