"""What would be lost: weights are found in what training code saves, and nothing in a file is ever executed."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import refusal

from models.checkpoints import read

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
AVERAGED = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
PARALLEL = {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}
COUNTERS = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


@pytest.mark.parametrize(
    ("held", "wanted", "where"),
    [
        (WEIGHTS, WEIGHTS, ""),
        ({"state_dict": WEIGHTS, **COUNTERS}, WEIGHTS, "state_dict"),
        ({"model": PARALLEL, **COUNTERS}, WEIGHTS, "model"),
        ({"model": WEIGHTS, "ema": AVERAGED}, AVERAGED, "ema"),
        ({"ema": 0.999, "model": {"state_dict": WEIGHTS}}, WEIGHTS, "model.state_dict"),
        ([PARALLEL, COUNTERS["optimizer"], 3, 100], WEIGHTS, "item 1"),
        ((WEIGHTS, COUNTERS["optimizer"], 3, 100, AVERAGED), AVERAGED, "item 5, the moving average"),
        ({name: tensor.half() for name, tensor in WEIGHTS.items()}, WEIGHTS, ""),
    ],
    ids=["plain", "state_dict", "model_of_parallel", "average_first", "nested", "list", "list_with_average", "half"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old_format"])
def test_weights_are_found_in_what_training_code_saves(held, wanted, where, zipped, tmp_path):
    torch.save(held, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    state, found_in = read(tmp_path / "model.pt")
    assert found_in == where
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) and state[name].dtype == torch.float32 for name in wanted)


def test_safetensors_are_known_by_their_bytes(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.ckpt")
    state, _ = read(tmp_path / "model.ckpt")
    assert all(torch.equal(state[name], WEIGHTS[name]) for name in WEIGHTS)


class WritesFile:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old_format"])
def test_code_in_a_checkpoint_is_refused_by_name_and_does_not_run(zipped, tmp_path):
    ran = tmp_path / "ran"
    torch.save({"state_dict": WEIGHTS, "extra": WritesFile(ran)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: read(tmp_path / "evil.pth"))
    assert "is refused, because it holds posix.mkdir" in message
    assert not ran.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert ran.exists()  # so it would have run


def test_harmless_objects_are_refused_too_with_what_to_do(tmp_path):
    torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1)}, tmp_path / "run.pth")
    message = refusal(lambda: read(tmp_path / "run.pth"))
    assert "argparse.Namespace" in message
    assert "torch.save(model.state_dict(), PATH)" in message


def cut(zipped: bool) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        torch.save({"a": torch.zeros(1000)}, file, _use_new_zipfile_serialization=zipped)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return write


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda file: None, "cannot be read: No such file or directory"),
        (lambda file: file.mkdir(), "cannot be read: Is a directory"),
        (lambda file: file.write_bytes(b""), "not a checkpoint of PyTorch, or it is cut off"),
        (lambda file: file.write_text("hello, this is text"), "not a checkpoint of PyTorch, or it is cut off"),
        (lambda file: file.write_bytes(bytes(range(256)) * 9), "not a checkpoint of PyTorch, or it is cut off"),
        (cut(zipped=True), "not a checkpoint of PyTorch, or it is cut off"),
        (cut(zipped=False), "not a checkpoint of PyTorch, or it is cut off"),
        (lambda file: file.write_text("\n<!DOCTYPE html><html>"), "/resolve/ and not /blob/"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
        (lambda file: file.write_bytes((90).to_bytes(8, "little") + b'{"a":'), "not a readable safetensors file"),
        (lambda file: torch.save({"epoch": 3, "lr": 0.1}, file), "it holds epoch, lr"),
        (lambda file: torch.save([], file), "it holds list"),
        (lambda file: torch.save({}, file), "it holds nothing"),
        (lambda file: torch.save(torch.zeros(3), file), "it holds Tensor"),
    ],
)
def test_files_without_weights_are_refused_in_a_sentence(write, says, tmp_path):
    file = tmp_path / "model.ckpt"
    write(file)
    message = refusal(lambda: read(file))
    assert says in message
    assert str(file) in message
