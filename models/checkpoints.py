"""Checkpoint files of training code: the weights in them, without ever running code from them.

``torch.load(weights_only=True)`` and safetensors only.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.folders import read_state
from models.references import WeightsError

State = dict[str, Tensor]
"""Weights by name."""

_WRAPPERS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "state_dict", "model_state_dict", "model", "net", "unet")
"""Names under which training code keeps weights, averaged ones first: samples are drawn with those."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrapping modules put in front of every key."""


def read(file: str | Path) -> tuple[State, str]:
    """The weights in a checkpoint, float32, and where in it they were ("" if it holds nothing else).

    Raises WeightsError if the file is damaged, is no checkpoint, or could only be read by running code from it.
    """
    file = Path(file)
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror}") from None
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"{file} is a web page, not a checkpoint; download the file itself (on a hub, /resolve/ and not /blob/)")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{file} is only a pointer to a checkpoint in Git LFS; fetch the file itself with: git lfs pull")
    safe = file.suffix == ".safetensors" or head[8:9] == b"{"
    loaded = read_state(file) if safe else _load_torch(file)
    found = _unwrap(loaded)
    if found is None:
        holds = ", ".join(map(str, list(loaded)[:5])) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise WeightsError(f"{file} holds no state dict of weights (a mapping of names to tensors); it holds {holds or 'nothing'}")
    state, where = found
    return {name: tensor.to(torch.float32) for name, tensor in state.items()}, where


def _load_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are about to be refused
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # bytes that are no checkpoint can fail as anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named or "TorchScript" in str(error):
            what = named[1] if named else "a TorchScript program"
            raise WeightsError(
                f"{file} is refused, because it holds {what} beside its weights and reading that can run code from the file; "
                "where you trust it, save its weights alone: torch.save(model.state_dict(), PATH)"
            ) from None
        raise WeightsError(f"{file} is not a checkpoint of PyTorch, or it is cut off or damaged; download it again") from None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _unwrap(loaded: Any) -> tuple[State, str] | None:
    """The state dict inside of what training code saves, and where it was."""
    if _is_state(loaded):
        return _without_prefixes(dict(loaded)), ""
    if isinstance(loaded, Mapping):
        for name in _WRAPPERS:
            found = _unwrap(loaded[name]) if name in loaded else None
            if found:
                return found[0], f"{name}.{found[1]}".rstrip(".")
    if isinstance(loaded, list | tuple) and loaded:
        # The model comes first, then optimizer and counters, and at the end its moving average if there is one.
        first, last = _unwrap(loaded[0]), _unwrap(loaded[-1])
        if first and last and len(loaded) > 1 and first[0].keys() == last[0].keys():
            return last[0], f"item {len(loaded)}, the moving average"
        return (first[0], "item 1") if first else None
    return None


def _without_prefixes(state: State) -> State:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state
