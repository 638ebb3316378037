"""Ray Train: one run an attribute, fed with latents through Ray Data; many side by side."""

import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
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
from fsspec.core import url_to_fs
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import Checkpoint, ControllerError, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.recipe import Tuning
from models.references import EVERY_NODE, public, told_in
from models.weights import Card, fingerprint, save_edit_model
from pipeline import codec
from pipeline.config import ConfigError, TuneRun, versions
from pipeline.dataset import block_dataset
from pipeline.faults import JobError, explained
from pipeline.sources import Input, only_usable, plan_blocks
from pipeline.tuning import TunePlan

if TYPE_CHECKING:
    from models.finetune import Objective, Training
    from models.unet import NoiseUNet


STATE, METRICS, WEIGHTS, SAVED = "training.pt", "metrics.json", "weights.safetensors", "saved.json"
"""Files of a checkpoint: what goes on, figures of all epochs; in the last one, finished weights and the figures of their epoch."""
DEATHS = 3
"""So many losses of workers an attribute may have; each costs the epoch that was in hand."""
LOSSES = ("loss", "clip", "l1", "identity", "similarity")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A finished run: the reference of the edit model's weights and how it went, or the reason why there is none."""

    attribute: str
    file: str | None = None
    seconds: float = 0.0
    losses: dict[str, float] | None = None
    error: str | None = None


# ---- what is tried again ---------------------------------------------------------------------------------------------


class LoopError(RuntimeError):
    """What training itself raised on a worker, as a sentence or the text of a traceback: another try would raise it again."""


class LostWorkersError(RuntimeError):
    """Workers that share an attribute have lost one another."""


class FinalErrors(UserCallback):
    """Ends a run at the first LoopError. Ray's own ``max_failures`` counts whatever a worker raises like a process that died, but an
    error of a callback is final."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, LoopError):
                raise error


# ---- on the worker ---------------------------------------------------------------------------------------------------


def load_latents(shard: ray.data.DataIterator, limit: int, size: int, max_pixels: int) -> tuple[Tensor, Tensor]:
    """Latents and source images, float32 (N, 3, size, size) each, of a worker's shard; at most ``limit``."""
    latents, pictures = [], []
    for batch in shard.iter_batches(batch_size=64, batch_format="pyarrow"):
        latents.append(codec.latents_from_arrow(batch["latent"], size))
        decoded, errors = codec.decode_column(batch["image"], size, max_pixels)
        if any(errors):
            reason = next(filter(None, errors))
            raise ConfigError(f"the source of a latent cannot be decoded: {reason}; give the --max-pixels of invert, or invert again")
        pictures.append(codec.to_tensor([picture for picture in decoded if picture is not None]))
    if not latents:
        raise ConfigError("there is not one usable latent to train on")
    return torch.cat(latents)[:limit], torch.cat(pictures)[:limit]


def average_over_workers(tensors: Iterable[Tensor]) -> None:
    """Replaces tensors by their means over all workers. By hand, because DistributedDataParallel expects one forward a
    backward, and a walk has many."""
    for tensor in tensors:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise LostWorkersError(str(error)) from error
        tensor /= dist.get_world_size()


def train_loop(config: dict[str, Any]) -> None:
    """One worker of one attribute: trains, reports each epoch with a checkpoint, goes on from the last checkpoint.

    Raises LoopError, unless another try may help: disks and stores, other nodes and other workers may be better then.
    """
    try:
        train_worker(config["run"], config["journal"])
    except (OSError, RayError, LostWorkersError):
        raise
    except Exception as error:
        if type(error) in (ArithmeticError, ConfigError):  # a sentence for people
            raise LoopError(str(error)) from None
        raise LoopError("".join(traceback.format_exception(error)).strip()) from None


def train_worker(run: TuneRun, journal: Any) -> None:
    """Trains as ``train_loop`` says, and raises whatever goes wrong."""
    tuning, context = run.tuning, ray.train.get_context()
    workers, rank = context.get_world_size(), context.get_world_rank()
    shard = ray.train.get_dataset_shard("train")
    share = [-(-count // workers) for count in (rows_wanted(tuning) - tuning.held_out, tuning.held_out)]
    loading = ThreadPoolExecutor(1).submit(load_latents, shard, sum(share), run.domain.image_size, run.max_pixels)

    from models.finetune import alone, finetune, lacking, references, start_training, steps_per_epoch  # slow to import

    torch.set_num_threads(max(1, round(run.cpus)))
    torch.manual_seed(tuning.seed)
    device = "cuda" if run.gpus > 0 else "cpu"
    model = make_model(run).to(device)
    objective = make_objective(run, device)
    training = start_training(model, tuning, device, run.recipe.precision)
    latents, x0 = (images.to(device) for images in loading.result())
    reference = references(model, latents, x0, objective)  # before any checkpoint is loaded: by the base model
    (latents, unseen), (reference, before) = (split_held_out(images, share[1]) for images in (latents, reference))
    if tuning.choose_from > tuning.images:
        chosen = lacking(x0[: len(latents)], objective, -(-tuning.images // workers))
        latents, reference = latents[chosen], reference[chosen]
    history = _restore(training)
    per_epoch = steps_per_epoch(len(latents), tuning, objective.path)
    counts = {"images": len(latents) * workers, "steps": per_epoch * tuning.epochs}
    average = average_over_workers if workers > 1 else alone
    sums: dict[str, float] = {}
    for told in finetune(training, latents, reference, objective, held_out=(unseen, before) if len(unseen) else None, average=average):
        if rank == 0:
            journal.add.remote(run.attribute, {**told, **counts})
        sums = {name: sums.get(name, 0.0) + told[name] / per_epoch for name in LOSSES if name in told}
        if told["epoch_done"]:
            metrics: dict[str, float] = {**sums, **counts, "epoch": training.epoch, "step": training.taken}
            if "held_out" in told:
                metrics["held_out"] = told["held_out"]
            history.append(metrics)
            _report(training, history, run, rank)
            sums = {}


def split_held_out(images: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """Images to train on, and the last ones, which are held out. Raises ConfigError if none is left to train on."""
    count = len(images) - held_out
    if count < 1:
        raise ConfigError(f"with {held_out} images held out, none of {len(images)} usable latents is left to train on; hold out fewer")
    return images[:count], images[count:]


def make_model(run: TuneRun) -> "NoiseUNet":
    """A copy of the base model whose parameters that require gradients are what the run trains."""
    from models.unet import load_base, trainable

    model = deepcopy(load_base(run.domain.weights, run.recipe.precision, run.recipe.class_label))
    if run.tuning.rank is not None:
        from models.lora import add

        add(model.unet, run.tuning.rank, run.tuning.seed)
    else:
        for parameter in trainable(model):
            parameter.requires_grad_(True)
    return model


def make_objective(run: TuneRun, device: str) -> "Objective":
    """The text directions and the walk of an attribute's training; the ladder is of the editing family, but shorter."""
    from models.clip import load_clip
    from models.finetune import Objective
    from models.identity import load_identity
    from models.unet import load_alpha_bars

    clips = [load_clip(reference).to(device) for reference in run.loss_clips]
    alpha_bars = load_alpha_bars(run.domain.weights)
    return Objective(
        clips=tuple((clip, clip.text_direction(run.source_text, run.target_text)) for clip in clips),
        path=replace(run.recipe, steps_down=run.tuning.steps_down).down(alpha_bars),
        alpha_bars=alpha_bars,
        order=run.recipe.order,
        tuning=run.tuning,
        identity=load_identity(run.identity).to(device) if run.identity and run.tuning.id_weight else None,
    )


def _restore(training: "Training") -> list[dict[str, float]]:
    """Loads the last checkpoint, if there is one; returns the figures of the epochs before it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        training.load_state_dict(torch.load(Path(folder, STATE), weights_only=True, map_location="cpu"))
        return list(json.loads(Path(folder, METRICS).read_text()))


def _report(training: "Training", history: list[dict[str, float]], run: TuneRun, rank: int) -> None:
    """Reports an epoch with a checkpoint; the last one holds the finished weights and the figures of their epoch too."""
    if rank != 0:
        ray.train.report(history[-1])
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(training.state_dict(), Path(folder, STATE))
        if training.done or training.epoch == run.tuning.epochs:
            training.finish()
            save_file(finished_weights(training.model, run.tuning.rank), Path(folder, WEIGHTS))
            Path(folder, SAVED).write_text(json.dumps(history[training.saved_epoch - 1]))
        Path(folder, METRICS).write_text(json.dumps(history))
        ray.train.report(history[-1], checkpoint=Checkpoint.from_directory(folder))


def finished_weights(model: Any, rank: int | None) -> dict[str, Tensor]:
    """What an edit model holds: the whole network, or its low-rank weights where only those were trained."""
    from models import lora

    state = model.unet.state_dict() if rank is None else lora.state(model.unet)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


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


def rows_wanted(tuning: Tuning) -> int:
    """Usable latents that a training looks at: those that it trains on or chooses them from, and those held out."""
    return max(tuning.images, tuning.choose_from) + tuning.held_out


def first_usable(found: Input, count: int) -> ray.data.Dataset:
    """The first ``count`` rows that were not rejected, in the order of the input; what lies behind them is not read."""
    # Which rows are trained on and which held out must not depend on which block is read first.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return block_dataset(found, plan_blocks(found, 64)).map_batches(only_usable, batch_format="pyarrow").limit(count)


def fit(plan: TunePlan, journal: Any) -> Tuned:
    """Trains one attribute with Ray Train and saves its edit model. Raises what the training raised."""
    run, started = plan.run, time.monotonic()
    # fsspec's client and not pyarrow's own: it reads the same variables, and is as patient, as where rows are written.
    fs, storage = url_to_fs(plan.storage)
    local = "file" in fs.protocol
    if run.overwrite:  # what an earlier try has left may be of the same request
        with suppress(FileNotFoundError):
            fs.rm(f"{storage}/{plan.name}", recursive=True)
    # A worker alone has nobody to agree with, and what workers agree through listens on all interfaces.
    trainer = (TorchTrainer if run.workers > 1 else DataParallelTrainer)(
        train_loop,
        train_loop_config={"run": run, "journal": journal},
        scaling_config=ScalingConfig(
            num_workers=run.workers, use_gpu=run.gpus > 0, resources_per_worker={"CPU": run.cpus, **({"GPU": run.gpus} if run.gpus else {})}
        ),
        run_config=RunConfig(
            name=plan.name,
            storage_path=os.path.realpath(storage) if local else storage,
            storage_filesystem=None if local else PyFileSystem(FSSpecHandler(fs)),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=DEATHS),
            callbacks=[FinalErrors()],  # type: ignore[list-item]  # typed as of the older Ray Train
        ),
        datasets={"train": first_usable(plan.found, rows_wanted(run.tuning))},
    )
    result = trainer.fit()
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        state = load_file(Path(folder, WEIGHTS))
        metrics = json.loads(Path(folder, SAVED).read_text())
    with explained(f"{plan.file} cannot be written"):
        file = save_edit_model(run.output, state, make_card(plan, metrics))
    with suppress(OSError):  # other attributes may still have theirs
        fs.rm(f"{storage}/{plan.name}", recursive=True)
        fs.rmdir(storage)
    return Tuned(attribute=run.attribute, file=file, seconds=time.monotonic() - started, losses=metrics)


def make_card(plan: TunePlan, metrics: dict[str, float]) -> Card:
    run = plan.run
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
        rank=run.tuning.rank,
        clips=[public(clip) for clip in run.loss_clips],
        losses={name: round(metrics[name], 5) for name in (*LOSSES, "held_out", "epoch") if name in metrics},
        versions=versions(),
        request=plan.request,
    )


def reason_of(error: Exception) -> str:
    """Why an attribute could not be trained: one line where people can mend it."""
    if isinstance(error, ControllerError) and isinstance(error.controller_failure, LoopError):
        error = error.controller_failure
    if missing := told_in(str(error)):
        return f"on a worker, {missing}; {EVERY_NODE}"
    return str(error) if isinstance(error, JobError | LoopError) else f"{type(error).__name__}: {str(error).strip()}"


def fit_all(plans: list[TunePlan], parallel: int, on_progress: Callable[[dict[str, dict[str, float]]], None]) -> list[Tuned]:
    """Trains attributes side by side, at most ``parallel`` at once; one that fails does not take the others along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    journal = Journal.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # a node that goes must not take it along
    results: list[Tuned] = []
    gate = threading.Semaphore(parallel)

    def one(plan: TunePlan) -> None:
        with gate:
            try:
                results.append(fit(plan, journal))
            except Exception as error:
                results.append(Tuned(attribute=plan.run.attribute, error=reason_of(error)))

    threads = [threading.Thread(target=one, args=(plan,), daemon=True) for plan in plans]
    for thread in threads:
        thread.start()
    while alive := [thread for thread in threads if thread.is_alive()]:
        alive[0].join(0.5)
        on_progress(ray.get(journal.read.remote()))
    return sorted(results, key=lambda tuned: tuned.attribute)
