"""Ray Train: one run an attribute, fed with latents through Ray Data; many side by side."""

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.attributes import ATTRIBUTES
from models.domains import Domain
from models.weights import Card, fingerprint, save_edit_model
from pipeline import codec
from pipeline.config import ConfigError, Source, TuneRun, versions
from pipeline.dataset import block_dataset, latent_mismatch
from pipeline.sources import Input, absolute, find, only_usable, plan_blocks

if TYPE_CHECKING:
    from models.finetune import Objective
    from models.unet import NoiseUNet


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """A checked fine-tuning run: nothing has been started or written yet."""

    run: TuneRun
    found: Input

    @property
    def name(self) -> str:
        """Of the Ray Train run: the same request finds its own checkpoints again, any other request starts afresh."""
        request = {**asdict(self.run), "domain": fingerprint(self.run.domain.weights), "files": self.found.files}
        digest = hashlib.sha256(json.dumps(request, default=str, sort_keys=True).encode()).hexdigest()
        return f"{self.run.attribute}-{digest[:12]}"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A finished run: the edit model's file and how it went, or the reason why there is none."""

    attribute: str
    file: Path | None = None
    seconds: float = 0.0
    losses: dict[str, float] | None = None
    error: str | None = None


def make_tune_plan(run: TuneRun) -> TunePlan:
    """Checks everything that can be checked without a model call. Raises ConfigError with every problem found."""
    run = replace(run, latents=absolute(run.latents), output=run.output.absolute())
    problems = run.problems()
    try:
        found = find(Source(path=run.latents))
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    if not found.has_latents:
        problems.append(f"{run.latents} holds no latents; make them with: diffusionclip invert {run.latents} LATENTS")
    else:
        problems += latent_mismatch(found, run.domain, run.recipe.of_latent())
    problems += word_problems(run.domain, run.source_text, run.target_text)
    if problems:
        raise ConfigError(*problems)
    return TunePlan(run=run, found=found)


def word_problems(domain: Domain, *texts: str) -> list[str]:
    """Sentences about texts that the domain's CLIP cannot understand; empty for a real CLIP."""
    listed = {text for a in ATTRIBUTES.values() if a.domain == domain.name for text in (a.source, a.target)}
    if not domain.known_words_only or listed.issuperset(texts):
        return []
    from models.clip import load_clip

    unknown = sorted({word for text in texts for word in load_clip(domain.clip).unknown_words(text)})
    if not unknown:
        return []
    return [f"the small CLIP of {domain.name} has never seen {', '.join(map(repr, unknown))}; use the words of docs/pixelface.md"]


# ---- on the worker ---------------------------------------------------------------------------------------------------


def load_latents(shard: ray.data.DataIterator, limit: int, size: int) -> tuple[Tensor, Tensor]:
    """Latents and source images, float32 (N, 3, size, size) each, of a worker's shard; at most ``limit``."""
    latents, pictures = [], []
    for batch in shard.iter_batches(batch_size=64, batch_format="pyarrow"):
        latents.append(codec.latents_from_arrow(batch["latent"], size))
        decoded, errors = codec.decode_column(batch["image"], size, max_pixels=2**62)  # what was inverted was decoded before
        if any(errors):
            raise ValueError(f"the source of a latent cannot be decoded any more: {next(filter(None, errors))}; invert again")
        pictures.append(codec.to_tensor([picture for picture in decoded if picture is not None]))
    if not latents:
        raise ConfigError("there is not one usable latent to train on")
    return torch.cat(latents)[:limit], torch.cat(pictures)[:limit]


def average_gradients(model: nn.Module) -> None:
    """The mean of all workers' gradients. By hand, because DistributedDataParallel expects one forward a backward, and a
    walk has many."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def train_loop(config: dict[str, Any]) -> None:
    """One worker of one attribute: trains, reports each epoch with a checkpoint, goes on from the last checkpoint."""
    run, journal = config["run"], config["journal"]
    context = ray.train.get_context()
    workers, rank = context.get_world_size(), context.get_world_rank()
    shard = ray.train.get_dataset_shard("train")
    loading = ThreadPoolExecutor(1).submit(load_latents, shard, -(-run.tuning.images // workers), run.domain.image_size)

    from models.finetune import finetune, make_optimizer  # only workers need the networks; importing them takes as long as reading
    from models.unet import load_base

    torch.set_num_threads(max(1, round(run.cpus)))
    torch.manual_seed(run.tuning.seed)
    device = "cuda" if run.gpus > 0 else "cpu"
    model = deepcopy(load_base(run.domain.weights, run.recipe.precision)).requires_grad_(True).to(device)
    optimizer = make_optimizer(model, run.tuning)
    objective = make_objective(run, device)
    latents, x0 = loading.result()
    epoch = _restore(model, optimizer, device)
    sums: dict[str, float] = {}
    steps = finetune(
        model,
        optimizer,
        latents.to(device),
        x0.to(device),
        objective,
        start_epoch=epoch,
        average_gradients=average_gradients if workers > 1 else lambda model: None,
    )
    per_epoch = -(-len(latents) // run.tuning.batch)
    for losses in steps:
        if rank == 0:
            journal.add.remote(run.attribute, {**losses, "steps": per_epoch * run.tuning.epochs, "images": len(latents) * workers})
        sums = {k: sums.get(k, 0.0) + losses[k] / per_epoch for k in ("loss", "clip", "l1", "similarity")}
        if losses["step"] % per_epoch == 0:
            _report(
                model, optimizer, {**sums, "epoch": losses["epoch"] + 1, "step": losses["step"], "images": len(latents) * workers}, rank
            )
            sums = {}


def make_objective(run: TuneRun, device: str) -> "Objective":
    """The text direction and the walk of an attribute's training; the ladder is of the editing family, but shorter."""
    from models.clip import load_clip
    from models.finetune import Objective
    from models.unet import load_alpha_bars

    clip, alpha_bars = load_clip(run.domain.clip).to(device), load_alpha_bars(run.domain.weights)
    return Objective(
        clip=clip,
        direction=clip.text_direction(run.source_text, run.target_text),
        path=replace(run.recipe, steps_down=run.tuning.steps_down).down(alpha_bars),
        alpha_bars=alpha_bars,
        order=run.recipe.order,
        tuning=run.tuning,
    )


def _restore(model: "NoiseUNet", optimizer: torch.optim.Optimizer, device: str) -> int:
    """Loads the last checkpoint, if there is one, and returns the epoch to go on with."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        model.unet.load_state_dict(load_file(Path(folder, "model.safetensors")))
        optimizer.load_state_dict(torch.load(Path(folder, "optimizer.pt"), weights_only=True, map_location=device))
        return int(json.loads(Path(folder, "state.json").read_text())["epoch"])


def _report(model: "NoiseUNet", optimizer: torch.optim.Optimizer, metrics: dict[str, float], rank: int) -> None:
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.unet.state_dict().items()}, Path(folder, "model.safetensors"))
        torch.save(optimizer.state_dict(), Path(folder, "optimizer.pt"))
        Path(folder, "state.json").write_text(json.dumps(metrics))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


# ---- on the driver ---------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Journal:
    """Losses of all runs, so that the driver can show them while Ray Train is busy."""

    def __init__(self) -> None:
        self.latest: dict[str, dict[str, float]] = {}

    def add(self, attribute: str, losses: dict[str, float]) -> None:
        self.latest[attribute] = losses

    def read(self) -> dict[str, dict[str, float]]:
        return self.latest


def fit(plan: TunePlan, journal: Any, storage: Path) -> Tuned:
    """Trains one attribute with Ray Train and saves its edit model. Raises what the training raised."""
    run, started = plan.run, time.monotonic()
    rows = [block for block in plan_blocks(plan.found, 64) if block.start < run.tuning.images * 2]
    dataset = block_dataset(plan.found, rows).map_batches(only_usable, batch_format="pyarrow").limit(run.tuning.images)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"run": run, "journal": journal},
        scaling_config=ScalingConfig(
            num_workers=run.workers, use_gpu=run.gpus > 0, resources_per_worker={"CPU": run.cpus, **({"GPU": run.gpus} if run.gpus else {})}
        ),
        run_config=RunConfig(
            name=plan.name, storage_path=str(storage.resolve()), checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1)
        ),
        datasets={"train": dataset},
    )
    result = trainer.fit()
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        state = load_file(Path(folder, "model.safetensors"))
        metrics = json.loads(Path(folder, "state.json").read_text())
    file = save_edit_model(run.output, state, make_card(run, metrics))
    shutil.rmtree(storage / plan.name, ignore_errors=True)
    with suppress(OSError):  # other attributes may still have theirs
        storage.rmdir()
    return Tuned(attribute=run.attribute, file=file, seconds=time.monotonic() - started, losses=metrics)


def make_card(run: TuneRun, metrics: dict[str, float]) -> Card:
    return Card(
        attribute=run.attribute,
        domain=run.domain.name,
        domain_fingerprint=fingerprint(run.domain.weights),
        source=run.source_text,
        target=run.target_text,
        recipe=run.recipe.to_dict(),
        tuning=asdict(run.tuning),
        images=int(metrics["images"]),
        steps=int(metrics["step"]),
        losses={name: round(metrics[name], 5) for name in ("loss", "clip", "l1", "similarity")},
        versions=versions(),
    )


def fit_all(plans: list[TunePlan], parallel: int, on_progress: Callable[[dict[str, dict[str, float]]], None]) -> list[Tuned]:
    """Trains attributes side by side, at most ``parallel`` at once; one that fails does not take the others along."""
    journal = Journal.remote()  # type: ignore[attr-defined]
    results: list[Tuned] = []
    gate = threading.Semaphore(parallel)

    def one(plan: TunePlan) -> None:
        with gate:
            try:
                results.append(fit(plan, journal, plan.run.storage or plan.run.output / ".training"))
            except Exception as error:
                results.append(Tuned(attribute=plan.run.attribute, error=f"{type(error).__name__}: {str(error).strip()}"))

    threads = [threading.Thread(target=one, args=(plan,), daemon=True) for plan in plans]
    for thread in threads:
        thread.start()
    while alive := [thread for thread in threads if thread.is_alive()]:
        alive[0].join(0.5)
        on_progress(ray.get(journal.read.remote()))
    return sorted(results, key=lambda tuned: tuned.attribute)
