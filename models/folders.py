"""Folders of base models, brought into one normal form. Nothing is ever unpickled: weights are safetensors, or ``.bin``
files that torch reads with ``weights_only=True``.
"""

import hashlib
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.fetching import Record, cache_error, cache_folder, digest, first_in, intact, locked, write_record
from models.references import MissingError, WeightsError, public

CONFIG, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"
"""The files of a folder in normal form."""
NETWORK: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""What in ``config.json`` decides the output of a network, with diffusers' own defaults: folders of different ages name different
parts. Size of the training images and dropout decide nothing in use."""
SCHEDULE: dict[str, Any] = {
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
}
"""The same of ``scheduler_config.json``."""
_FORMS = (WEIGHTS, "diffusion_pytorch_model.bin")
_OLD_ATTENTION = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def folder_of(reference: str | Path) -> Path:
    """Local folder of a base model in normal form: ``config.json``, ``diffusion_pytorch_model.safetensors`` and
    ``scheduler_config.json``.

    What diffusers saves is put into it: the ``unet/`` and ``scheduler/`` folders of a pipeline, ``.bin`` weights, and the
    attention weights' names before diffusers 0.12. A folder that has the form is used where it is, others are converted
    once into the cache, always to the same bytes. Raises WeightsError if something is missing or is no pixel-space model.
    """
    name, config = first_in(reference, [CONFIG, f"unet/{CONFIG}"]) or _lacking(reference, CONFIG)
    below = name.removesuffix(CONFIG)
    _, weights = first_in(reference, [below + form for form in _FORMS]) or _lacking(reference, WEIGHTS, below)
    _, scheduler = first_in(reference, [SCHEDULER, f"scheduler/{SCHEDULER}"]) or _lacking(reference, SCHEDULER)
    if below:
        _refuse_latent_space(reference)
    files = {CONFIG: config, WEIGHTS: weights, SCHEDULER: scheduler}
    if all(file == config.parent / name for name, file in files.items()) and not _has_old_names(weights):
        return config.parent
    return _normalised(files, public(reference))


def _lacking(reference: str | Path, name: str, below: str | None = None) -> NoReturn:
    if below is not None and first_in(reference, [f"{below}{form}.index.json" for form in _FORMS]):
        raise WeightsError(f"{public(reference)} has its weights in several files; save them in one, with a larger max_shard_size")
    raise WeightsError(f"{public(reference)} has no {name}; it must be a diffusers UNet2DModel folder with safetensors or .bin weights")


def _refuse_latent_space(reference: str | Path) -> None:
    index = None
    with suppress(MissingError):  # a cache may lack it
        index = first_in(reference, ["model_index.json"])
    coders = sorted({"vae", "vqvae"} & read_json(index[1]).keys()) if index else []
    if coders:
        raise WeightsError(f"{public(reference)} is a latent diffusion pipeline (it has a {coders[0]}); only models of pixels can be used")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsError if the file is none."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{file} is not a JSON object")
    return found


def decisive(folder: Path) -> dict[str, dict[str, Any]]:
    """What the configurations of a folder in normal form say that decides an output, whatever else stands in them."""
    parts = {CONFIG: NETWORK, SCHEDULER: SCHEDULE}
    return {file: {**defaults, **_known(read_json(folder / file), defaults)} for file, defaults in parts.items()}


def _known(said: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name in defaults}


def schedule_length(reference: str | Path) -> int:
    """Number of timesteps of a base model's noise schedule; its weights are not fetched for that. Raises WeightsError."""
    _, file = first_in(reference, [SCHEDULER, f"scheduler/{SCHEDULER}"]) or _lacking(reference, SCHEDULER)
    said = SCHEDULE | read_json(file)
    length = len(said["trained_betas"]) if isinstance(said["trained_betas"], list) else said["num_train_timesteps"]
    if not isinstance(length, int) or length < 2:
        raise WeightsError(f"{public(reference)}: num_train_timesteps in its {SCHEDULER} must be a whole number above 1; got {length!r}")
    return length


def network_problems(reference: str | Path, image_size: int, class_label: int | None) -> list[str]:
    """Why a base model's network cannot take images of this size and this label, from its configuration alone; empty if it can.
    Raises WeightsError if there is none."""
    _, file = first_in(reference, [CONFIG, f"unet/{CONFIG}"]) or _lacking(reference, CONFIG)
    said, found = NETWORK | read_json(file), []
    levels, classes = len(said["block_out_channels"]), said["num_class_embeds"]
    if image_size % 2 ** (levels - 1):
        found.append(
            f"the network of {public(reference)} halves images {levels - 1} times, so their size must be a multiple of "
            f"{2 ** (levels - 1)}; the domain's is {image_size}"
        )
    if class_label is not None and classes is None:
        found.append(f"the network of {public(reference)} knows no classes; leave the class label {class_label} out")
    if class_label is not None and classes is not None and class_label >= classes:
        found.append(f"the class label must lie between 0 and {classes - 1}; got {class_label}")
    return found


def _has_old_names(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return any(_OLD_ATTENTION.fullmatch(key) for key in opened.keys())  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None


def _normalised(files: dict[str, Path], reference: str) -> Path:
    """The folder in the cache that is made of these files; its name is the hash of their contents."""
    digests = {name: digest(file) for name, file in sorted(files.items())}
    folder = cache_folder() / "models" / hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]
    entry, weights = folder.with_suffix(".json"), folder / WEIGHTS
    if intact(weights, entry):
        return folder
    with locked(entry):
        if intact(weights, entry):
            return folder
        try:
            if not weights.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                _build(files, folder)
            stat = weights.stat()
            write_record(entry, Record(reference, WEIGHTS, digest(weights), stat.st_size, stat.st_mtime_ns, digests))
        except (OSError, SafetensorError) as error:
            raise cache_error(cache_folder(), error) from None
    return folder


def _build(files: dict[str, Path], folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.{uuid4().hex}.part")
    part.mkdir()
    try:
        for name in (CONFIG, SCHEDULER):
            shutil.copyfile(files[name], part / name)
        weights = files[WEIGHTS]
        if weights.suffix == ".bin" or _has_old_names(weights):
            write_state(part / WEIGHTS, _with_new_names(read_state(weights)))
        else:  # the very bytes, so that the fingerprint is the same wherever a model is kept
            _link_or_copy(weights.resolve(), part / WEIGHTS)
        try:
            part.rename(folder)
        except OSError:
            if not (folder / WEIGHTS).is_file():  # else another process was quicker, where no lock held it back
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _link_or_copy(file: Path, to: Path) -> None:
    try:
        to.hardlink_to(file)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, to)


def _with_new_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sorted by name. The oldest attention layers were 1x1 convolutions, (out, in, 1, 1); now they are linear, (out, in)."""
    renamed = {}
    for key, tensor in state.items():
        if old := _OLD_ATTENTION.fullmatch(key):
            key = f"{old[1]}.{_NEW_ATTENTION[old[2]]}.{old[3]}"
            tensor = tensor.flatten(1) if tensor.dim() > 2 else tensor
        renamed[key] = tensor.contiguous()
    return dict(sorted(renamed.items()))


def read_state(file: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, of a safetensors file, or of a ``.bin`` file without running code from it. Raises WeightsError."""
    if file.suffix != ".bin":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no pickle makes torch stumble in any way
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{file} is not a file of plain tensors, and no code is run from it: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{file} is not a dictionary of tensors")
    return {key: tensor.clone() for key, tensor in state.items()}  # safetensors keeps no shared memory


def write_state(file: Path, state: dict[str, Tensor]) -> None:
    """A safetensors file that others may read as any new file: safetensors itself gives its files to their owner alone."""
    file.touch()
    usual = file.stat().st_mode
    save_file(state, file, {"format": "pt"})
    file.chmod(usual)


def _unreadable(file: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{file} is not a readable safetensors file: {error}")
